"""What a benchmark is made of: a case is one call to be timed and all that its record says about it; a heat is a list
of cases that are timed in turns; a group is a function that makes heats, one after another, so that each heat's tensors
are gone before the next one's are made.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from records import OURS
from timing import Candidate, Run, compare, reason

CUBLAS = "cuBLAS"
PRODUCTS = 16  # in one call: a card at its power limit slows down within milliseconds, so it lasts as long as attention
SKIPPED = "skipped: the time limit was reached"


@dataclass(frozen=True)
class Case:
    """One call to be timed.

    Attributes:
        case, phase, kind, backend, shape: as in the record.
        build: prepares the call, untimed.
        steps: equal steps in one call; the record is of one.
        tflop: of one step, selected tiles only.
        facts: more for the record.
        alone: whether it computes something else than the others of its case and phase.
        calls, warmed, head_start: as in Candidate, for calls that take seconds.
        compiles: what must be there to compile its kernels ahead: "any length" will do, "this length" alone will, or
            None, nothing to compile.
    """

    case: str
    phase: str
    kind: str
    backend: str | None
    shape: dict
    build: Callable[[], Run]
    tflop: float | None = None
    steps: int = 1
    facts: dict = field(default_factory=dict)
    alone: bool = False
    calls: int | None = None
    warmed: bool = True
    head_start: bool = False
    compiles: Literal["any length", "this length"] | None = "any length"

    @property
    def title(self) -> str:
        """One for each case of a heat."""
        return f"{self.case}, {self.phase}: {self.kind}{f' ({self.backend})' if self.backend else ''}"

    @property
    def variant(self) -> tuple:
        """What its kernels are compiled for, as far as a shape tells; offsets of long sequences take 64 bits."""
        free = {"T", "S", "blocks", "lists", "common", *(["row_queries"] if self.phase == "fwd" else [])}
        fixed = tuple((key, value) for key, value in self.shape.items() if key not in free)
        long = self.shape.get("T", 1) * self.shape.get("HQ", 1) * self.shape.get("D", 1) >= 2**31
        return self.kind, self.backend, self.phase, fixed, long

    def candidate(self) -> Candidate:
        compared = self.phase != "select" and not self.alone
        same_as = (self.case, self.phase) if compared else None
        return Candidate(self.build, same_as, self.steps, self.calls, self.warmed, self.head_start)

    def record(self, benchmark: str, group: str, outcome: dict) -> dict:
        names = {"benchmark": benchmark, "group": group, "case": self.case, "phase": self.phase}
        record = names | {"kind": self.kind, "backend": self.backend, "shape": self.shape} | outcome | self.facts
        if self.tflop is not None and "error" not in outcome:
            record["tflops"] = float(f"{self.tflop / (1e-3 * outcome['median_ms']):.5g}")
        return record


class Sizes(Protocol):
    """What the groups of a benchmark ask for their shapes."""

    device: str
    dtype: torch.dtype
    rounds: tuple[int, int]
    matrix: int

    def rehearsal(self) -> Sizes:
        """The same cases over short sequences, to compile their kernels."""


Group = Callable[[Sizes], Iterator[list[Case]]]


@dataclass(frozen=True)
class Benchmark:
    """A script's groups.

    Attributes:
        name: of the script and its module.
        groups: by name, each with the seconds that one of its heats may take.
        finish: makes more records of a group out of those measured.
        bars: of all records, the rows of `bars.evaluate`.
        tables: of all records, more to print and to keep in the file: rows by title.
    """

    name: str
    groups: dict[str, tuple[Group, float]]
    full: Sizes
    smoke: Sizes
    bars: Callable[[list[dict]], list[dict]]
    finish: Callable[[str, list[dict]], list[dict]] = lambda group, records: []
    tables: Callable[[list[dict]], dict[str, list[dict]]] = lambda records: {}


def measure(
    benchmark: Benchmark,
    name: str,
    sizes: Sizes,
    report: Callable[[str, str | None], None],
    deadline: float = float("inf"),
) -> list[dict]:
    """The records of one group, ratios included. Its first heat times a large matrix product along.

    Heats that would begin after `deadline`, by `time.monotonic`, are skipped; their records say so.
    """
    group, budget_s = benchmark.groups[name]
    records, heats, along = [], group(sizes), [matrix_product(sizes)]
    while cases := next(heats, None):  # an `enumerate` would hold a heat's tensors while the next are made
        _collect(sizes.device)  # what only the heats before had
        timed = {case.title: case for case in cases + along}
        candidates = {title: case.candidate() for title, case in timed.items()}
        if time.monotonic() > deadline:
            outcomes = {title: {"error": SKIPPED} for title in timed}
        else:
            outcomes = compare(candidates, budget_s=budget_s, device=sizes.device, rounds=sizes.rounds, report=report)
        heat_records = [case.record(benchmark.name, name, outcomes[title]) for title, case in timed.items()]
        add_ratios(heat_records)
        records += heat_records
        along = []
        del cases, timed, candidates
        _collect(sizes.device)
    return records + benchmark.finish(name, records)


def _collect(device: str) -> None:
    gc.collect()  # models and their graphs refer to themselves
    if device == "cuda":
        torch.cuda.empty_cache()


def matrix_product(sizes: Sizes) -> Case:
    """What the machine gives at best, at this moment."""
    N = sizes.matrix

    def build() -> Run:
        a, b = (torch.randn(N, N, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
        return lambda: [a @ b for _ in range(PRODUCTS)][-1]

    shape = {"M": N, "N": N, "K": N, "dtype": str(sizes.dtype).removeprefix("torch.")}
    return Case("matrix product", "fwd", CUBLAS, None, shape, build, tflop=2e-12 * N**3, steps=PRODUCTS, compiles=None)


def add_ratios(records: list[dict]) -> None:
    """Gives each of our records the peers' times of the same case and shape over its own."""
    for own in records:
        if own["kind"] != OURS or "error" in own:
            continue
        same = [r for r in records if (r["case"], r["phase"]) == (own["case"], own["phase"]) and "error" not in r]
        peers = {r["kind"]: r["median_ms"] for r in same if r["kind"] != OURS}
        peers |= {r["backend"]: r["median_ms"] for r in same if r["kind"] == OURS and r["backend"] != own["backend"]}
        own["ratios"] = {peer: round(ms / own["median_ms"], 3) for peer, ms in peers.items()}


# Compiling ahead


class Job(NamedTuple):
    """Which case a worker process runs once."""

    benchmark: str
    group: str
    heat: int
    index: int
    whole: bool  # at its true length


def compile_ahead(
    benchmark: Benchmark, groups: Iterable[str], sizes: Sizes, report: Callable[[int, int], None]
) -> dict[str, str]:
    """Runs every variant of every case once, in parallel processes, so that compiled kernels lie in the caches on disk
    when the measuring begins. What fails here fails again there, with its record.

    Returns:
        The errors, by case.
    """
    jobs, errors = {}, {}
    for name in groups:
        try:
            for heat, cases in enumerate(benchmark.groups[name][0](sizes.rehearsal())):
                for index, case in enumerate(cases):
                    if case.compiles:
                        job = Job(benchmark.name, name, heat, index, case.compiles == "this length")
                        jobs.setdefault(case.variant, (job, case.title))
        except Exception as error:
            errors[name] = reason(error)
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(rehearse, job): title for job, title in jobs.values()}
        for done, future in enumerate(as_completed(pending), 1):
            report(done, len(jobs))
            try:
                error = future.result()
            except BrokenProcessPool as broken:  # one process died, and takes the others' work along
                error = reason(broken)
            if error:
                errors[pending[future]] = error
    return errors


def rehearse(job: Job) -> str | None:
    """One case, once. Returns the reason if it fails."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are as many processes already
    try:
        benchmark: Benchmark = importlib.import_module(job.benchmark).BENCHMARK
        sizes = benchmark.full if job.whole else benchmark.full.rehearsal()
        cases = next(itertools.islice(benchmark.groups[job.group][0](sizes), job.heat, None))
        cases[job.index].build()()
        if sizes.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None
