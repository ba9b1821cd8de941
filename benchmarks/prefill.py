"""Reading a prompt with a whole model on a GPU: time to the first token and memory, 8K … 1M tokens, side by side.

    python benchmarks/prefill.py                       # every kind, one GPU, about three minutes
    python benchmarks/prefill.py --only yoco           # one kind, again
    python benchmarks/prefill.py --time-limit 120      # what does not begin by then is recorded as skipped
    python benchmarks/prefill.py --smoke               # tiny shapes, any machine: does it run?

    transformer  dense attention by SDPA, cuDNN's kernels
    diff         the same with DIFF V2: twice the query heads, dense, and the subtraction
    diff_sparse  the same with block-sparse attention: 32 blocks of 128 for rows of 128 tokens, chosen by the row's
                 first query ("first": strictly causal, and linear but for reading the summaries)
    yoco         YOCO with DIFF V2: the self-decoder reads the prompt, the cross-decoder its last token
    scoring      the same asked for all logits, as log-likelihoods: both halves for every token, sparse as diff_sparse

All have the shape of YOCO's 3B (`models.Shape`) and random weights; the cache is made within the time. Dense kinds
read the prompt in one piece, which is fastest, up to 128K tokens. Beyond, one layer is timed at full length and counted
as often as there are layers, embedding and head left out; records say so, and at 128K both are there. Their memory is
that of reading in chunks: weights, keys and values, and the activations that were measured so. The other kinds read in
chunks, and their memory is measured as it is. Results go to benchmarks/results/prefill_MACHINE.json after each kind.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from bars import PREFILL, evaluate, exponent
from cases import Benchmark, Case
from models import (
    Attention,
    Decoder,
    DiffAttention,
    Shape,
    SparseDiffAttention,
    Sparsity,
    cross_decode,
    fill,
    random_decoder,
    random_yoco,
    score_prompt,
    weight_bytes,
)
from records import OURS, tokens_name
from torch import Tensor

from diffv2_sparse.yoco.layers import rotary_angles

ON_GPU = torch.cuda.is_available()
NAMES = {
    "transformer": "Transformer",
    "diff": "DIFF V2",
    "diff_sparse": "DIFF V2, block-sparse",
    "yoco": OURS,
    "scoring": OURS,
}
DENSE = ("transformer", "diff")


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    device: str
    dtype: torch.dtype
    rounds: tuple[int, int]  # of the matrix product
    matrix: int
    shape: Shape
    lengths: tuple[int, ...]
    repeated: int  # lengths up to this are timed REPEATS times
    whole: int  # dense kinds read up to this many tokens with all layers
    warmed: int  # one layer is run beforehand up to this length; longer ones get a head start
    measured: tuple[int, int]  # prompt and chunk with which the memory of dense kinds is measured
    chunk: int  # of the sparse kind, a multiple of its rows
    yoco_chunk: int  # of ours
    rows: Sparsity  # of the sparse kind, and of ours where all logits are asked for
    token: Sparsity  # of ours

    def rehearsal(self) -> Sizes:
        return self


REPEATS = 3
ALONE = {"alone": True, "compiles": None}  # as no kind computes what another does; they compile in what is not timed
FULL = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    rounds=(3, 5),
    matrix=8192,
    shape=Shape(),
    lengths=tuple(1 << n for n in range(13, 21)),
    repeated=1 << 15,
    whole=1 << 17,
    warmed=1 << 18,
    measured=(1 << 14, 1 << 13),
    chunk=1 << 15,
    yoco_chunk=1 << 13,
    rows=Sparsity(128, 128, 32),
    token=Sparsity(1, 64, 64),
)
CPU_SMOKE = Sizes(
    device="cpu",
    dtype=torch.float32,
    rounds=(1, 1),
    matrix=64,
    shape=Shape(hidden=32, layers=4, heads=4, kv_heads=2, head_dim=16, intermediate=48, vocab=64, window=16),
    lengths=(64, 128, 256),
    repeated=64,
    whole=128,
    warmed=128,
    measured=(64, 32),
    chunk=64,
    yoco_chunk=32,
    rows=Sparsity(16, 16, 5),
    token=Sparsity(1, 16, 5),
)
GPU_SMOKE = Sizes(  # as small as all peers take it
    device="cuda",
    dtype=torch.bfloat16,
    rounds=(1, 1),
    matrix=64,
    shape=Shape(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=256, vocab=512, window=128),
    lengths=(512, 1024, 2048),
    repeated=512,
    whole=1024,
    warmed=1024,
    measured=(512, 256),
    chunk=512,
    yoco_chunk=256,
    rows=Sparsity(64, 64, 8),
    token=Sparsity(1, 64, 8),
)
SMOKE = GPU_SMOKE if ON_GPU else CPU_SMOKE


# What is timed


class Kind:
    """One kind of model and its cases; the model is made when the first of them is timed."""

    def __init__(self, sizes: Sizes, group: str):
        self.sizes, self.group = sizes, group
        self.sparsity = {"diff_sparse": sizes.rows, "scoring": sizes.rows, "yoco": sizes.token}.get(group)

    def make(self, device: str):
        sizes = self.sizes
        if self.group in ("yoco", "scoring"):
            return random_yoco(sizes.shape, self.sparsity, device, sizes.dtype)
        attention = {"transformer": Attention, "diff": DiffAttention, "diff_sparse": SparseDiffAttention}[self.group]
        return random_decoder(sizes.shape, attention, self.sparsity, device, sizes.dtype)

    @functools.cached_property
    def model(self):
        return self.make(self.sizes.device)

    @functools.cached_property
    def weights_gib(self) -> float:
        return weight_bytes(self.make("meta")) / 2**30

    def prompt(self, tokens: int) -> Tensor:
        generator = torch.Generator(self.sizes.device).manual_seed(1)
        return torch.randint(self.sizes.shape.vocab, (1, tokens), device=self.sizes.device, generator=generator)

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values that stay: of every layer, or YOCO's one, its summaries and its windows."""
        shape, size = self.sizes.shape, self.sizes.dtype.itemsize
        of_token = 2 * shape.kv_heads * shape.head_dim * size
        if self.group not in ("yoco", "scoring"):
            return shape.layers * of_token * tokens
        pages = -(-tokens // self.sparsity.block_n)
        summaries = pages * of_token // 2
        return pages * self.sparsity.block_n * of_token + summaries + shape.layers // 2 * shape.window * of_token

    def case(self, tokens: int, phase: str, build: Callable, **more) -> Case:
        shape = {"B": 1, "T": tokens, **self.sizes.shape.record(self.sizes.dtype)}
        shape |= {} if self.sparsity is None else self.sparsity.record()
        facts = {"weights_gib": self.weights_gib, "cache_gib": self.cache_bytes(tokens) / 2**30}
        backend = "auto" if NAMES[self.group] == OURS else None
        title = f"{tokens_name(tokens)} tokens"
        shape |= more.pop("shape", {})
        return Case(title, phase, NAMES[self.group], backend, shape, build, facts=facts, **ALONE, **more)

    def often(self, tokens: int) -> dict:
        """Short prompts several times; kernels are there after the first length."""
        repeated = tokens <= self.sizes.repeated
        return {"calls": REPEATS if repeated else 1, "warmed": tokens == self.sizes.lengths[0]}

    # Each returns the case of one length

    def prefill(self, tokens: int, chunk: int) -> Case:
        """From the prompt to the logits of its last token; or to the log-likelihoods of all."""

        def build():
            model, ids = self.model, self.prompt(tokens)
            if tokens > self.sizes.repeated:  # else the median of some calls does not see the first
                self.rehearse(tokens, chunk)
            if self.group == "scoring":
                return lambda: score_prompt(model, ids, chunk)
            if isinstance(model, Decoder):
                return lambda: model.prefill(ids, chunk)[0]
            return lambda: model.prefill(ids, cache=model.new_cache(1, tokens), chunk_tokens=chunk)[0]

        return self.case(tokens, "prefill", build, shape={"chunk": chunk}, **self.often(tokens))

    @torch.no_grad()
    def rehearse(self, tokens: int, chunk: int) -> None:
        """What is new at this length: the choice of blocks and attention at the prompt's end, in one layer or half."""
        model, sizes, start = self.model, self.sizes, tokens - chunk
        hidden = torch.randn(1, chunk, sizes.shape.hidden, device=sizes.device, dtype=sizes.dtype)
        if isinstance(model, Decoder):
            model.layers[0](hidden, model.rotary(start, chunk), *model.new_cache(1, tokens, layers=1)[0], start)
        elif self.group == "scoring":
            H, D = sizes.shape.kv_heads, sizes.shape.head_dim
            positions = torch.arange(start, tokens, device=sizes.device)[None]
            rotary = rotary_angles(positions, D, sizes.shape.theta, sizes.dtype)
            cross_decode(model.model, hidden, rotary, *hidden.new_zeros(2, 1, tokens, H, D).normal_())
        else:
            model.decode(self.prompt(1), fill(model.new_cache(1, tokens), tokens - 1))

    def one_layer(self, tokens: int) -> Case:
        def build():
            size = (1, tokens, self.sizes.shape.hidden)
            hidden = torch.randn(size, device=self.sizes.device, dtype=self.sizes.dtype)
            return lambda: self.model.one_layer(hidden)

        warmed = tokens <= self.sizes.warmed
        return self.case(tokens, "one layer", build, calls=1, warmed=warmed, head_start=not warmed)

    def chunked(self) -> Case:
        """For its memory: in its time, chunks after the first go by FlashAttention-2."""
        tokens, chunk = self.sizes.measured
        case = self.prefill(tokens, chunk)
        return replace(case, phase="chunked", calls=1, warmed=False)


def dense_kind(group: str, sizes: Sizes) -> Iterator[list[Case]]:
    kind = Kind(sizes, group)
    for tokens in sizes.lengths:
        if tokens >= sizes.whole:
            yield [kind.one_layer(tokens)]
        if tokens <= sizes.whole:
            yield [kind.prefill(tokens, tokens)]
        if tokens == sizes.lengths[0]:
            yield [kind.chunked()]


def chunked_kind(group: str, sizes: Sizes) -> Iterator[list[Case]]:
    kind = Kind(sizes, group)
    chunk = sizes.chunk if group == "diff_sparse" else sizes.yoco_chunk
    for tokens in sizes.lengths:
        yield [kind.prefill(tokens, min(tokens, chunk))]


# What follows from the records


def completed(group: str, records: list[dict]) -> list[dict]:
    """Adds total_gib to the records, and to those of a dense kind the lengths of which one layer was measured."""
    timed = {(record["phase"], record["shape"].get("T")): record for record in records if "median_ms" in record}
    chunked = next((record for (phase, _), record in timed.items() if phase == "chunked"), {})
    more = []
    for (phase, tokens), record in timed.items():
        if phase == "one layer" and ("prefill", tokens) not in timed:
            layers = record["shape"]["layers"]
            facts = ("benchmark", "group", "case", "kind", "backend", "shape", "weights_gib", "cache_gib")
            whole = {key: record[key] for key in facts} | {"phase": "prefill", "extrapolated": f"one layer × {layers}"}
            more.append(whole | {"median_ms": round(layers * record["median_ms"], 1)})
    for record in [*records, *more]:
        if record["phase"] != "prefill" or "median_ms" not in record:
            continue
        if group not in DENSE and "peak_gib" in record:
            record["total_gib"] = round(record["weights_gib"] + record["peak_gib"], 3)
        elif group in DENSE and "peak_gib" in chunked:
            activations = chunked["peak_gib"] - chunked["cache_gib"]
            record["total_gib"] = round(record["weights_gib"] + record["cache_gib"] + activations, 3)
            tokens, chunk = chunked["shape"]["T"], chunked["shape"]["chunk"]
            record["total_is"] = f"weights + cache + activations of chunks of {chunk}, measured at {tokens} tokens"
    return more


def tables(records: list[dict]) -> dict[str, list[dict]]:
    """Milliseconds, growth and memory, a row per length or kind."""
    found = {(r["group"], r["shape"]["T"]): r for r in records if r["phase"] == "prefill" and "median_ms" in r}
    lengths, groups = (
        sorted({tokens for _, tokens in found}),
        [name for name in NAMES if any(name == g for g, _ in found)],
    )
    if not lengths:
        return {}
    times = [{"tokens": tokens_name(tokens)} for tokens in lengths]
    for row, tokens in zip(times, lengths):
        for group in groups:
            if record := found.get((group, tokens)):
                row[group] = record["median_ms"]
        if ours := found.get(("yoco", tokens)):
            others = [group for group in groups if (group, tokens) in found and group != "yoco"]
            row |= {f"{own} / yoco": round(found[own, tokens]["median_ms"] / ours["median_ms"], 2) for own in others}
    growth, memory, longest = [], [], lengths[-1]
    for group in groups:
        row = {"kind": group, "times per doubling": exponent(records, group, doubling=True)}
        growth.append(row | {"exponent": exponent(records, group)})
        if record := found.get((group, longest)):
            of_token = record["cache_gib"] * 2**30 / longest
            row = {"kind": group, "KV bytes a token": round(of_token), "weights GiB": round(record["weights_gib"], 3)}
            row |= {"cache GiB": round(record["cache_gib"], 3), "total GiB": record.get("total_gib")}
            memory.append(row | {"total is": record.get("total_is", "measured" if "total_gib" in record else "")})
    total_of_ours = next((row["total GiB"] for row in memory if row["kind"] == "yoco"), None)
    for row in memory:
        if total_of_ours and row["total GiB"]:
            row["over yoco"] = round(row["total GiB"] / total_of_ours, 2)
    return {
        "time to the first token, ms, and over yoco": times,
        "growth": [row for row in growth if not math.isnan(row["times per doubling"])],
        f"memory at {tokens_name(longest)} tokens": memory,
    }


BENCHMARK = Benchmark(
    name="prefill",
    groups={
        "yoco": (functools.partial(chunked_kind, "yoco"), 0),
        "transformer": (functools.partial(dense_kind, "transformer"), 0),
        "diff": (functools.partial(dense_kind, "diff"), 0),
        "diff_sparse": (functools.partial(chunked_kind, "diff_sparse"), 0),
        "scoring": (functools.partial(chunked_kind, "scoring"), 0),
    },
    full=FULL,
    smoke=SMOKE,
    bars=lambda records: evaluate(PREFILL, records),
    finish=completed,
    tables=tables,
)


if __name__ == "__main__":
    from runner import main

    sys.exit(main(BENCHMARK, __doc__))
