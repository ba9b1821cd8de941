"""Prefill and training attention on a GPU: ours against what a user would run instead, and what choosing blocks costs.

    python benchmarks/attention.py                       # everything, one GPU, about five minutes
    python benchmarks/attention.py --only forward        # one group, again
    python benchmarks/attention.py --smoke               # tiny shapes, any machine: does it run?

Inputs and lists are the same for all kinds of a case, and kinds are timed in turns, so that a card whose clock drifts
drifts for all. Peers compute over all HQ heads and subtract in a compiled kernel; their masks are made beforehand, and
are not timed. TFLOP/s count selected tiles. Results go to benchmarks/results/attention_MACHINE.json after each group; a
run that was cut short continues with the groups it lacks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import peers
import torch
from bars import ATTENTION, LARGE, evaluate
from cases import Benchmark, Case
from lists import Lists
from peers import Inputs
from records import OURS, tokens_name

from diffv2_sparse import BlockSelection, TopK, diff_attention, select_blocks

BACKENDS = ("hopper", "triton")  # ours on a GPU, each a column of its own
ON_GPU = torch.cuda.is_available()
# Products over the forward's: a backward is 5 to its 2; in two passes over pairs of heads it executes 11 to its 4.
PASSES = {"fwd": 1, "fwd+bwd": 3.5, "bwd": 2.75}


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    device: str
    dtype: torch.dtype
    rounds: tuple[int, int]  # least and most
    matrix: int  # rows and columns of the matrix product that goes along
    backends: tuple[str, ...]
    heads: tuple[int, int]  # HQ, H
    D: int
    tokens: int  # forward and selection
    trained_tokens: int
    dense_tokens: int
    long_tokens: int
    few_tokens: int
    half_D: int
    large_groups: tuple[int, int]  # HQ, H
    small_groups: tuple[int, int]
    fitted_tokens: tuple[int, ...]  # dense lengths that the longest is extrapolated from
    large: Lists
    medium: Lists
    short: Lists  # rows
    token: Lists
    swept_D: tuple[int, ...]
    swept_heads: tuple[tuple[int, int], ...]
    swept_tokens: tuple[int, ...]
    swept_budgets: tuple[int, ...]  # keys
    swept_dense_tokens: int  # no longer than this
    at_most: int | None = None  # sequences are cut to this many tokens, and laid out as if they were not

    def rehearsal(self) -> Sizes:
        ends = (self.swept_tokens[0], self.swept_tokens[-1])
        return replace(self, at_most=4096, swept_tokens=ends, swept_budgets=self.swept_budgets[:1])


FULL = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    rounds=(3, 20),
    matrix=8192,
    backends=BACKENDS,
    heads=(64, 8),
    D=128,
    tokens=1 << 17,
    trained_tokens=1 << 16,
    dense_tokens=1 << 15,
    long_tokens=1 << 20,
    few_tokens=1 << 14,
    half_D=64,
    large_groups=(64, 4),
    small_groups=(32, 8),
    fitted_tokens=(1 << 15, 1 << 16, 1 << 17),
    large=Lists(128, 128, 32),
    medium=Lists(64, 64, 64),
    short=Lists(16, 64, 64),
    token=Lists(1, 64, 64),
    swept_D=(64, 128),
    swept_heads=((64, 8), (32, 4), (16, 8)),
    swept_tokens=tuple(1 << n for n in range(13, 21)),
    swept_budgets=(1 << 10, 1 << 12, 1 << 14),
    swept_dense_tokens=1 << 17,
)
SMOKE = Sizes(
    device="cuda" if ON_GPU else "cpu",
    dtype=torch.bfloat16 if ON_GPU else torch.float32,
    rounds=(1, 1),
    matrix=64,
    backends=("triton",) if ON_GPU else ("torch",),  # the heads are too small for others; interpreted, it takes seconds
    heads=(4, 2),
    D=16,
    tokens=128,
    trained_tokens=64,
    dense_tokens=64,
    long_tokens=256,
    few_tokens=64,
    half_D=8,
    large_groups=(8, 2),
    small_groups=(4, 4),
    fitted_tokens=(64, 128),
    large=Lists(32, 32, 5),
    medium=Lists(16, 16, 7),
    short=Lists(8, 16, 7),
    token=Lists(1, 16, 7),
    swept_D=(16,),
    swept_heads=((4, 2), (2, 1)),
    swept_tokens=(64, 128),
    swept_budgets=(160,),
    swept_dense_tokens=64,
)


class Problem:
    """One sequence, and the cases over it."""

    def __init__(
        self, sizes: Sizes, tokens: int, *, heads: tuple[int, int] | None = None, D: int | None = None, phase="fwd"
    ):
        HQ, H = heads or sizes.heads
        D = D or sizes.D
        self.sizes, self.phase = sizes, phase
        learns = phase != "fwd"
        self.shape = {"B": 1, "T": tokens, "S": tokens, "HQ": HQ, "H": H, "D": D}
        self.shape["dtype"] = str(sizes.dtype).removeprefix("torch.")
        self.tflop_per_key = 4e-12 * D * HQ * PASSES[phase]  # of one query token and one key, all heads
        present = min(tokens, sizes.at_most or tokens)
        generator = torch.Generator(sizes.device).manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            x = torch.randn(1, present, *shape, device=sizes.device, dtype=sizes.dtype, generator=generator)
            if present < tokens:  # the stride of the one batch entry decides how wide kernels count
                x = x.as_strided(x.shape, (tokens * x.stride(1), *x.stride()[1:]))
            return x.requires_grad_(learns)

        self.x = Inputs(random(HQ, D), random(H, D), random(H, D), random(HQ // 2))
        if learns:
            self.x.do = torch.randn_like(self.x.q[:, :, ::2].detach(), memory_format=torch.contiguous_format)

    def over(self, case: str, lists: Lists, rivals: dict | None = None) -> list[Case]:
        """Attention over drawn lists: ours with every backend, and `rivals`, functions of the inputs and the lists."""
        selection = lists.draw(self.x.tokens, self.shape["H"], device=self.sizes.device)
        shape = self.shape | lists.shape()
        tiles = int(selection.counts.sum()) / (selection.num_classes * self.shape["H"])  # per row of all heads
        tflop = self.tflop_per_key * tiles * lists.block_m * lists.block_n
        cases = [
            Case(case, self.phase, OURS, backend, shape, self._ours(selection, backend), tflop)
            for backend in self.sizes.backends
        ]
        for kind, rival in (rivals or {}).items():
            build = self._peer(lambda rival=rival: rival(self.x, selection))
            own_length = "this length" if kind == peers.FLEX else "any length"
            cases.append(Case(case, self.phase, kind, None, shape, build, tflop, compiles=own_length))
        return cases

    def dense(self, rivals: dict, *, case: str = "dense", ours: bool = False) -> list[Case]:
        """Dense causal attention by `rivals`, functions of the inputs, and with `ours` by every backend."""
        tflop = self.tflop_per_key * self.shape["T"] ** 2 / 2
        backends = self.sizes.backends if ours else ()
        cases = [
            Case(case, self.phase, OURS, backend, self.shape, self._ours(None, backend), tflop) for backend in backends
        ]
        for kind, rival in rivals.items():
            build = self._peer(lambda rival=rival: rival(self.x))
            compiles = "any length" if kind == peers.FA4_DENSE else None
            cases.append(Case(case, self.phase, kind, None, self.shape, build, tflop, compiles=compiles))
        return cases

    def chosen(self, case: str, lists: Lists, row_queries: str = "all", phases=("select", "fwd")) -> list[Case]:
        """Choosing blocks, attention over what was chosen, or one after the other: the phases that are asked for."""
        x, shape = self.x, self.shape | lists.shape() | {"lists": "chosen", "row_queries": row_queries}

        def choose() -> BlockSelection:
            budget, cut = TopK(lists.blocks), {"block_m": lists.block_m, "block_n": lists.block_n}
            return select_blocks(x.q, x.k, mode="pair_mean", budget=budget, **cut, row_queries=row_queries)

        tflop = self.tflop_per_key * selected_tiles(self.shape["T"], lists) * lists.block_m * lists.block_n
        sizes_gib = {
            "inputs_gib": sum(tensor.numel() * tensor.element_size() for tensor in x.all) / 2**30,
            "output_gib": x.q.numel() // 2 * x.q.element_size() / 2**30,
        }
        cases = []
        if "select" in phases:
            cases.append(Case(case, "select", OURS, "auto", shape, lambda: choose))
        for backend in self.sizes.backends:
            if "fwd" in phases:
                build = lambda backend=backend: self._ours(choose(), backend)()  # noqa: E731
                cases.append(Case(case, "fwd", OURS, backend, shape, build, tflop, facts=sizes_gib))
            if "select+fwd" in phases:
                build = lambda backend=backend: lambda: diff_attention(*x.all, choose(), backend=backend)  # noqa: E731
                cases.append(Case(case, "select+fwd", OURS, backend, shape, build, tflop, compiles=None))
        return cases

    def _ours(self, selection: BlockSelection | None, backend: str):
        return self._peer(lambda: lambda: diff_attention(*self.x.all, selection, backend=backend))

    def _peer(self, build):
        if self.phase == "fwd":
            return build
        differentiated = peers.with_gradients if self.phase == "fwd+bwd" else peers.gradients_alone
        return lambda: differentiated(build(), self.x)


def selected_tiles(tokens: int, lists: Lists) -> int:
    """Entries of the lists of one KV head, where the budget is used up as far as there are blocks."""
    row = torch.arange(-(-tokens // lists.block_m))
    visible = ((row + 1) * lists.block_m).clamp(max=tokens).sub(1) // lists.block_n + 1
    return int(visible.clamp(max=lists.blocks).sum())


# Groups


def forward(sizes: Sizes) -> Iterator[list[Case]]:
    """Attention over drawn lists, all shapes of lists in one heat; then dense attention, which heats the card."""
    problem = Problem(sizes, sizes.tokens)
    cases = problem.over(LARGE, sizes.large, {peers.FLEX: peers.flex, peers.FA4: peers.fa4})
    cases += problem.over("medium blocks", sizes.medium)
    cases += problem.over("short rows", sizes.short)
    cases += problem.over("one token a row, random lists", sizes.token)
    cases += problem.over("one token a row, model-like lists", sizes.token.like_a_model())
    cases += problem.over("per class, half common", replace(sizes.large, common=0.5))
    cases += problem.over("per class, disjoint", replace(sizes.large, common=0.0))
    yield cases
    every = {peers.DENSE: peers.dense, peers.FA4_DENSE: peers.fa4_dense, peers.FLASH_DENSE: peers.flash_dense}
    yield problem.dense(every)


def training(sizes: Sizes) -> Iterator[list[Case]]:
    """Forward and backward over drawn lists."""
    problem = Problem(sizes, sizes.trained_tokens, phase="fwd+bwd")
    cases = problem.over(LARGE, sizes.large, {peers.FLEX: peers.flex, peers.FA4: peers.fa4})
    yield cases + problem.over("one token a row, model-like lists", sizes.token.like_a_model())


def backward(sizes: Sizes) -> Iterator[list[Case]]:
    """The backward alone, over drawn lists."""
    problem = Problem(sizes, sizes.tokens, phase="bwd")
    yield problem.over(LARGE, sizes.large) + problem.over("medium blocks", sizes.medium)


def shapes(sizes: Sizes) -> Iterator[list[Case]]:
    """Other heads, rows that fill no tile, and a sequence that is soon over."""
    yield Problem(sizes, sizes.tokens, D=sizes.half_D).over("heads of half the size", sizes.large)
    yield Problem(sizes, sizes.tokens, heads=sizes.large_groups).over("twice the heads in a group", sizes.large)
    yield Problem(sizes, sizes.tokens, heads=sizes.small_groups).over("rows of half a tile", sizes.short)
    yield Problem(sizes, sizes.few_tokens).over("few tokens", sizes.large)


def dense(sizes: Sizes) -> Iterator[list[Case]]:
    """Dense causal attention, forward, then with its backward."""
    every = {peers.DENSE: peers.dense, peers.FA4_DENSE: peers.fa4_dense, peers.FLASH_DENSE: peers.flash_dense}
    for phase in ("fwd", "fwd+bwd"):
        yield Problem(sizes, sizes.dense_tokens, phase=phase).dense(every, ours=True)


def selection(sizes: Sizes) -> Iterator[list[Case]]:
    """Choosing blocks, and the attention over what was chosen."""
    problem, all_phases = Problem(sizes, sizes.tokens), ("select", "fwd", "select+fwd")
    cases = problem.chosen(LARGE, sizes.large, phases=all_phases)
    cases += problem.chosen("large blocks, first", sizes.large, "first", phases=all_phases)
    cases += problem.chosen("medium blocks", sizes.medium)
    cases += problem.chosen("medium blocks, first", sizes.medium, "first")
    cases += problem.chosen("one token a row", sizes.token)
    yield cases + problem.dense({peers.DENSE: peers.dense})


def million(sizes: Sizes) -> Iterator[list[Case]]:
    """The longest sequence, and the dense ones that tell what it would cost."""
    problem, all_phases = Problem(sizes, sizes.long_tokens), ("select", "fwd", "select+fwd")
    cases = problem.chosen(LARGE, sizes.large, phases=all_phases)
    cases += problem.chosen("large blocks, first", sizes.large, "first", phases=("select", "select+fwd"))
    for tokens in sizes.fitted_tokens:
        rival = {peers.DENSE: peers.dense}
        cases += Problem(sizes, tokens).dense(rival, case=f"dense, {tokens_name(tokens)}")
    yield cases


def sweep(sizes: Sizes) -> Iterator[list[Case]]:
    """Large blocks over head sizes, heads, lengths and budgets, beside dense attention as far as it is bearable."""
    for D in sizes.swept_D:
        for heads in sizes.swept_heads:
            for tokens in sizes.swept_tokens:
                yield all_budgets(Problem(sizes, tokens, heads=heads, D=D))


def all_budgets(problem: Problem) -> list[Case]:
    sizes, cases = problem.sizes, []
    for budget in sizes.swept_budgets:
        lists = replace(sizes.large, blocks=budget // sizes.large.block_n)
        cases += problem.over(f"budget {tokens_name(budget)}", lists)
    if problem.shape["T"] <= sizes.swept_dense_tokens:
        cases += problem.dense({peers.DENSE: peers.dense})
    return cases


def extrapolated(group: str, records: list[dict]) -> list[dict]:
    """Dense attention at the longest length, from a fit of ms = a · T² + b · T to the measured lengths."""
    measured = [r for r in records if r["kind"] == peers.DENSE and "median_ms" in r]
    if group != "million" or len(measured) < 2:
        return []
    T = torch.tensor([float(record["shape"]["T"]) for record in measured], dtype=torch.float64)
    ms = torch.tensor([record["median_ms"] for record in measured], dtype=torch.float64)
    a, b = fitted(T, ms)
    longest = max(record["shape"]["T"] for record in records if record["kind"] == OURS)
    fit = {"ms_per_token_squared": a, "ms_per_token": b, "measured_tokens": [int(tokens) for tokens in T]}
    dense = {**measured[-1], "case": "dense, extrapolated", "extrapolated": True, "fit": fit}
    dense["shape"] = measured[-1]["shape"] | {"T": longest, "S": longest}
    dense["median_ms"] = round(a * longest**2 + b * longest, 1)
    for measured_only in ("p20_ms", "p80_ms", "rounds", "tflops", "peak_gib"):
        dense.pop(measured_only, None)
    for own in records:
        if own["kind"] == OURS and own["phase"] == "select+fwd" and "median_ms" in own:
            own["ratios"][f"{peers.DENSE}, extrapolated"] = round(dense["median_ms"] / own["median_ms"], 2)
    return [dense]


def fitted(T: torch.Tensor, ms: torch.Tensor) -> tuple[float, float]:
    """a, b ≥ 0 of ms ≈ a · T² + b · T with the least relative errors."""
    terms = torch.stack([T**2, T], 1) / ms[:, None]
    a, b = torch.linalg.lstsq(terms, torch.ones_like(ms)[:, None]).solution.flatten().tolist()
    if min(a, b) < 0:  # a card that slows down under long loads, or lengths too short to show a square
        a, b = float(terms[:, 0].sum() / terms[:, 0].square().sum()), 0.0
    return a, b


BENCHMARK = Benchmark(
    name="attention",
    groups={
        "forward": (forward, 12),
        "training": (training, 8),
        "backward": (backward, 6),
        "shapes": (shapes, 1),
        "dense": (dense, 4),
        "selection": (selection, 8),
        "million": (million, 14),
        "sweep": (sweep, 0.4),
    },
    full=FULL,
    smoke=SMOKE,
    bars=lambda records: evaluate(ATTENTION, records),
    finish=extrapolated,
)


if __name__ == "__main__":
    from runner import main

    sys.exit(main(BENCHMARK, __doc__))
