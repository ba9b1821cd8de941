"""The numbers to reach, and what the records of a results file say about each.

A value is one of three: how many times as fast (other's time over own), a *rate* (own TFLOP/s in one case over another)
or a *share* (a time over the time of what it serves). Rows without a bar are there to be seen.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from records import OURS

DENSE = ("cuDNN + subtraction", "SDPA + subtraction")  # the peer on a GPU, and where there is none
FLEX = ("FlexAttention + subtraction",)
FA4, FA4_DENSE = ("FA4 block-sparse + subtraction",), ("FA4 dense + subtraction",)
XFORMERS = ("xFormers + subtraction",)
CUBLAS = ("cuBLAS",)
LARGE, TOKEN = "large blocks", "one token a row, model-like lists"
FITTED_TOKENS = 1 << 15  # exponents of growth are of these lengths and longer
TRANSFORMER, YOCO = "Transformer", "YOCO + DIFF V2"

Value = Callable[["Found", str], float]


@dataclass(frozen=True)
class Bar:
    """One number.

    Attributes:
        row: what is compared with what, in words.
        value: reads it off the records for one backend; LookupError where a record is missing or failed.
        bar, reach: the number to meet, and the one to reach for; None where there is none.
        at_most: whether less is better.
        backend: whose number it is; None for all.
    """

    row: str
    value: Value
    bar: float | None = None
    reach: float | None = None
    at_most: bool = False
    backend: str | None = None


class Found:
    """The records of one file, by what they measured."""

    def __init__(self, records: list[dict]):
        self.records = records

    def __call__(
        self, group: str, case: str, phase: str, kinds: Iterable[str] = (OURS,), backend: str | None = None
    ) -> dict:
        for record in self.records:
            what = tuple(record[key] for key in ("group", "case", "phase", "backend"))
            if what == (group, case, phase, backend) and record["kind"] in kinds:
                if "error" in record:
                    raise LookupError(f"{record['kind']}: {record['error']}")
                return record
        raise LookupError(f"not measured: {' or '.join(kinds)} in {group}, {case}, {phase}")

    def backends(self) -> list[str]:
        """The backends of our own attention, in the order of their first record."""
        attending = [r for r in self.records if r["kind"] == OURS and r["phase"] != "select"]
        return list(dict.fromkeys(record["backend"] for record in attending))


def evaluate(bars: Iterable[Bar], records: list[dict]) -> list[dict]:
    """One row per bar and backend: {row, backend, value, bar, reach, at_most, met}; `why` where there is no value."""
    found, rows = Found(records), []
    for backend in found.backends():
        for bar in (bar for bar in bars if bar.backend in (None, backend)):
            row = {"row": bar.row, "backend": backend, "value": None, "bar": bar.bar, "reach": bar.reach}
            row |= {"at_most": bar.at_most, "met": None}
            try:
                row["value"] = value = round(bar.value(found, backend), 4)
            except LookupError as error:
                row["why"] = str(error)
            else:
                if bar.bar is not None:
                    row["met"] = value <= bar.bar if bar.at_most else value >= bar.bar
            rows.append(row)
    return rows


def faster(
    group: str, case: str, phase: str, than: tuple[str, ...], *, at: tuple[str, str, str] | None = None
) -> Value:
    """The time of a peer over ours; `at`: where the peer was measured, if not in the same case."""
    return lambda found, backend: (
        found(*(at or (group, case, phase)), than)["median_ms"]
        / found(group, case, phase, backend=backend)["median_ms"]
    )


def rate(group: str, case: str, phase: str, *, of: tuple[str, str, str] | None = None) -> Value:
    """Our TFLOP/s over those in large blocks; `of`: where these were measured, if not in the same group and phase."""
    return lambda found, backend: (
        found(group, case, phase, backend=backend)["tflops"]
        / found(*(of or (group, LARGE, phase)), backend=backend)["tflops"]
    )


def of_cublas(group: str, phase: str) -> Value:
    """Our TFLOP/s in large blocks over those of a large matrix product."""
    return lambda found, backend: (
        found(group, LARGE, phase, backend=backend)["tflops"] / found(group, "matrix product", "fwd", CUBLAS)["tflops"]
    )


def than_triton(group: str, case: str, phase: str) -> Value:
    return lambda found, backend: (
        found(group, case, phase, backend="triton")["median_ms"]
        / found(group, case, phase, backend=backend)["median_ms"]
    )


def slower(case: str) -> Value:
    """Our time of a forward over that in large blocks."""
    return lambda found, backend: (
        found("forward", case, "fwd", backend=backend)["median_ms"]
        / found("forward", LARGE, "fwd", backend=backend)["median_ms"]
    )


def share(case: str) -> Value:
    """The time of a selection over that of the attention it feeds."""
    return lambda found, backend: (
        found("selection", case, "select", backend="auto")["median_ms"]
        / found("selection", case, "fwd", backend=backend)["median_ms"]
    )


def memory(found: Found, backend: str) -> float:
    """What the longest forward takes beyond its inputs and output, over those."""
    record = found("million", LARGE, "fwd", backend=backend)
    if "peak_gib" not in record:
        raise LookupError("not measured: memory, on a GPU alone")
    needed = record["inputs_gib"] + record["output_gib"]
    return (record["inputs_gib"] + record["peak_gib"]) / needed - 1


def evenness(found: Found, backend: str) -> float:
    """Lowest over highest TFLOP/s of one shape and budget along the lengths, the worst of the sweep."""
    rates: dict[tuple, list[float]] = {}
    for record in found.records:
        if (record["group"], record["kind"], record["backend"]) == ("sweep", OURS, backend) and "tflops" in record:
            shape = record["shape"]
            rates.setdefault((shape["D"], shape["HQ"], shape["blocks"]), []).append(record["tflops"])
    if not rates:
        raise LookupError("not measured: the sweep")
    return min(min(row) / max(row) for row in rates.values())


_AT_LARGE = ("forward", LARGE, "fwd")
_LONG_DENSE = ("million", "dense, extrapolated", "fwd")

ATTENTION = (
    Bar("fwd, 128 × 128 × 32: × FlexAttention", faster(*_AT_LARGE, FLEX), 1.12, 1.2),
    Bar(
        "fwd, 64 × 64 × 64: × FlexAttention at 128",
        faster("forward", "medium blocks", "fwd", FLEX, at=_AT_LARGE),
        1.08,
    ),
    Bar("fwd, block_m 16: rate of block_m 128", rate("forward", "short rows", "fwd"), 0.85),
    Bar(
        "fwd, block_m 1, random lists: rate of block_m 128",
        rate("forward", "one token a row, random lists", "fwd"),
        0.1,
        0.3,
    ),
    Bar("fwd, block_m 1, model-like lists: rate of block_m 128", rate("forward", TOKEN, "fwd"), 0.3, 0.6),
    Bar("fwd + bwd, 64K, 128 × 128 × 32: × FlexAttention", faster("training", LARGE, "fwd+bwd", FLEX), 1.12, 1.25),
    Bar("fwd + bwd, 64K, block_m 1, model-like: rate of block_m 128", rate("training", TOKEN, "fwd+bwd"), 0.25, 0.5),
    Bar("selection, 128 × 128: share of its attention", share(LARGE), 0.12, at_most=True),
    Bar("selection, 64 × 64: share of its attention", share("medium blocks"), 0.22, at_most=True),
    Bar('selection, 128 × 128, "first": share of its attention', share("large blocks, first"), 0.02, at_most=True),
    Bar('selection, 64 × 64, "first": share of its attention', share("medium blocks, first"), at_most=True),
    Bar("selection, block_m 1: share of its attention", share("one token a row"), at_most=True),
    Bar(
        "selection + fwd, 128K: × dense",
        faster("selection", LARGE, "select+fwd", DENSE, at=("selection", "dense", "fwd")),
        11,
        13,
    ),
    Bar(
        'selection + fwd, 1M, "all": × dense, extrapolated',
        faster("million", LARGE, "select+fwd", DENSE, at=_LONG_DENSE),
        55,
    ),
    Bar(
        'selection + fwd, 1M, "first": × dense, extrapolated',
        faster("million", "large blocks, first", "select+fwd", DENSE, at=_LONG_DENSE),
        90,
    ),
    Bar("fwd, per_class, half in common: time over pair_mean's", slower("per class, half common"), 1.5, 1.35, True),
    Bar("fwd, per_class, disjoint: time over pair_mean's", slower("per class, disjoint"), at_most=True),
    Bar("peak memory, fwd at 1M: beyond inputs + output", memory, 0.1, at_most=True),
    Bar("dense fwd, 32K: × dense peer", faster("dense", "dense", "fwd", DENSE)),
    Bar("dense fwd + bwd, 32K: × dense peer", faster("dense", "dense", "fwd+bwd", DENSE)),
    Bar("sweep, fwd: lowest over highest TFLOP/s along the lengths", evenness),
)


_HOPPER = (
    Bar("fwd, 128 × 128 × 32: × triton", than_triton(*_AT_LARGE), 1.33, 1.45),
    Bar("fwd, 128 × 128 × 32: rate of cuBLAS", of_cublas("forward", "fwd"), 0.88, 0.95),
    Bar("fwd, 128 × 128 × 32: × FA4", faster(*_AT_LARGE, FA4), 1.05, 1.15),
    Bar("fwd, 64 × 64 × 64: × triton", than_triton("forward", "medium blocks", "fwd"), 1.28),
    Bar("bwd, 128 × 128 × 32: executed products, rate of cuBLAS", of_cublas("backward", "bwd"), 0.8, 0.88),
    Bar("bwd, 128 × 128 × 32: × triton", than_triton("backward", LARGE, "bwd")),
    Bar("fwd + bwd, 64K, 128 × 128 × 32: × FlexAttention", faster("training", LARGE, "fwd+bwd", FLEX), 1.5, 1.7),
    Bar("fwd + bwd, 64K, 128 × 128 × 32: × FA4", faster("training", LARGE, "fwd+bwd", FA4)),
    Bar("dense fwd, 32K: × dense peer", faster("dense", "dense", "fwd", DENSE), 1.0),
    Bar("dense fwd, 32K: × FA4", faster("dense", "dense", "fwd", FA4_DENSE), reach=1.0),
    Bar("dense fwd + bwd, 32K: × FA4", faster("dense", "dense", "fwd+bwd", FA4_DENSE), 0.88, 1.0),
    Bar("fwd, heads of 64: rate of the first row", rate("shapes", "heads of half the size", "fwd", of=_AT_LARGE), 0.6),
    Bar(
        "fwd, 4 heads × 16 tokens: rate of the first row",
        rate("shapes", "rows of half a tile", "fwd", of=_AT_LARGE),
        0.45,
    ),
    Bar(
        "fwd, 16 heads a group: rate of the first row",
        rate("shapes", "twice the heads in a group", "fwd", of=_AT_LARGE),
        0.85,
    ),
    Bar("fwd, 16K tokens: rate of the first row", rate("shapes", "few tokens", "fwd", of=_AT_LARGE), 0.85),
    Bar("fwd, 1M tokens: rate of the first row", rate("million", LARGE, "fwd", of=_AT_LARGE), 0.85),
    Bar("fwd, block_m 16: rate of the first row", rate("forward", "short rows", "fwd", of=_AT_LARGE), 0.85),
)
ATTENTION += tuple(replace(bar, row=f"Hopper: {bar.row}", backend="hopper") for bar in _HOPPER)

_LONGEST, _SHORTER = "1M keys, batch 1", "32K keys, batch 1"


def growth(found: Found, backend: str) -> float:
    """Our step over a cache of 1M keys over that at 32K."""
    long, short = (found("decode", case, "step", backend=backend) for case in (_LONGEST, _SHORTER))
    return long["median_ms"] / short["median_ms"]


DECODE = (
    Bar("decode step, 1M keys, batch 1: × dense", faster("decode", _LONGEST, "step", DENSE), 24, 35),
    Bar("same: × choosing with ours, attending with xFormers", faster("decode", _LONGEST, "step", XFORMERS)),
    Bar("attention alone, 1M keys, batch 1: × xFormers", faster("decode", _LONGEST, "attend", XFORMERS)),
    Bar("decode step, batch 1: 1M keys over 32K", growth, at_most=True),
)


# Whole models


def exponent(records: list[dict], group: str, *, doubling: bool = False) -> float:
    """The slope of log time over log length of a kind's prefill, by least squares, at FITTED_TOKENS and longer; all
    lengths where none is so long. `doubling`: by how much the time grows when the length doubles. NaN below two
    lengths.
    """
    measured = [r for r in records if (r["group"], r["phase"]) == (group, "prefill") and "median_ms" in r]
    points = [(math.log(r["shape"]["T"]), math.log(r["median_ms"])) for r in measured]
    long = [point for point in points if point[0] >= math.log(FITTED_TOKENS) - 1e-9]
    points = long or points
    if len(points) < 2:
        return math.nan
    slope = statistics.linear_regression(*zip(*points)).slope
    return round(2**slope if doubling else slope, 4)


def grows(group: str) -> Value:
    """Its exponent."""

    def value(found: Found, backend: str) -> float:
        slope = exponent(found.records, group)
        if not any(r["case"] == "1M tokens" and "median_ms" in r for r in found.records if r["group"] == group):
            raise LookupError(f"not measured: {group}, 32K … 1M")
        return slope

    return value


def sooner(tokens: str, group: str, kind: str) -> Value:
    """The time to the first token of a kind over YOCO's."""
    case = f"{tokens} tokens"
    return lambda found, backend: (
        found(group, case, "prefill", [kind])["median_ms"]
        / found("yoco", case, "prefill", backend=backend)["median_ms"]
    )


def smaller(found: Found, backend: str) -> float:
    """All memory of the Transformer at 1M tokens over YOCO's."""
    theirs = found("transformer", "1M tokens", "prefill", [TRANSFORMER])
    ours = found("yoco", "1M tokens", "prefill", backend=backend)
    if not ("total_gib" in theirs and "total_gib" in ours):
        raise LookupError("not measured: memory, on a GPU alone")
    return theirs["total_gib"] / ours["total_gib"]


PREFILL = (
    Bar("prefill, YOCO + DIFF V2: growth exponent, 32K → 1M", grows("yoco"), 1.05, at_most=True),
    Bar("prefill, 32K: × Transformer", sooner("32K", "transformer", TRANSFORMER), 2.6, 2.87),
    Bar("prefill, 512K: × Transformer, extrapolated", sooner("512K", "transformer", TRANSFORMER), 22, 30),
    Bar("prefill, 1M: × Transformer, extrapolated", sooner("1M", "transformer", TRANSFORMER), 42, 71.8),
    Bar("prefill, 32K: × DIFF V2, dense", sooner("32K", "diff", "DIFF V2"), 4),
    Bar("prefill, 512K: × DIFF V2, dense, extrapolated", sooner("512K", "diff", "DIFF V2"), 42),
    Bar("prefill, 1M: × DIFF V2, dense, extrapolated", sooner("1M", "diff", "DIFF V2"), 85),
    Bar("prefill, 1M: × DIFF V2, block-sparse", sooner("1M", "diff_sparse", "DIFF V2, block-sparse")),
    Bar("memory at 1M: Transformer's over YOCO's", smaller, 9.4, 11),
    Bar("prompt scoring: growth exponent, 32K → 1M", grows("scoring"), at_most=True),
    Bar("prefill, DIFF V2, block-sparse: growth exponent, 32K → 1M", grows("diff_sparse"), at_most=True),
    Bar("prefill, Transformer: growth exponent, 32K → 1M", grows("transformer"), at_most=True),
    Bar("prefill, DIFF V2, dense: growth exponent, 32K → 1M", grows("diff"), at_most=True),
)


GENERATED_TOKENS = 1024  # of a request, after its prompt


def step_over(case: str) -> Value:
    """A Transformer's step over ours, sparse, both in a graph."""

    def value(found: Found, backend: str) -> float:
        group = case.rpartition(", ")[2]
        theirs = found(group, case, "dense, graph", [TRANSFORMER])
        return theirs["median_ms"] / found(group, case, "sparse, graph", backend=backend)["median_ms"]

    return value


def best_batch(tokens: str) -> Value:
    """Tokens a second of ours, sparse, over those of the Transformer, each with the batch at which it has most. All
    batches of a run fit the same memory.
    """

    def most(found: Found, **of) -> float:
        rates = []
        for group in ("equal memory", *sorted({r["group"] for r in found.records if r["group"].startswith("batch ")})):
            with suppress(LookupError):
                record = found(group, f"{tokens} tokens, {group}", **of)
                rates.append(record["shape"]["B"] / record["median_ms"])
        if not rates:
            raise LookupError(f"not measured: {tokens} tokens in a graph")
        return max(rates)

    return lambda found, backend: (
        most(found, phase="sparse, graph", backend=backend) / most(found, phase="dense, graph", kinds=[TRANSFORMER])
    )


def step_growth(found: Found, backend: str) -> float:
    long, short = (
        found("batch 1", f"{tokens} tokens, batch 1", "sparse, graph", backend=backend) for tokens in ("1M", "32K")
    )
    return long["median_ms"] / short["median_ms"]


def request(found: Found, backend: str) -> float:
    """A prompt of 512K tokens and GENERATED_TOKENS more: the Transformer's time over ours."""
    case = "512K tokens"
    steps = (
        found("batch 1", f"{case}, batch 1", "dense, graph", [TRANSFORMER]),
        found("batch 1", f"{case}, batch 1", "sparse, graph", backend=backend),
    )
    prompts = (found("prompt", case, "prefill", [kind]) for kind in (TRANSFORMER, YOCO))
    theirs, ours = (read["median_ms"] + GENERATED_TOKENS * step["median_ms"] for read, step in zip(prompts, steps))
    return theirs / ours


GENERATION = (
    Bar("a step, batch 1: 1M tokens over 32K", step_growth, 1.3, at_most=True),
    Bar("512K tokens, batch 1: × Transformer", step_over("512K tokens, batch 1"), 6.5),
    Bar("512K tokens, best batch in equal memory, tokens/s: × Transformer", best_batch("512K"), 50),
    Bar(f"512K tokens, prompt and {GENERATED_TOKENS} tokens, batch 1: × Transformer, extrapolated", request, 9.6),
)
