"""One decode step of sparse attention on a GPU: choose pages, attend to them, combine; against dense decoding.

    python benchmarks/decode.py              # 8K … 1M keys, batch 1, 8, 16; one GPU, about two minutes
    python benchmarks/decode.py --smoke      # tiny shapes, any machine: does it run?

What a cross-decoder over one shared cache does for a new token is captured in one CUDA graph: LAYERS steps, each with
queries of its own and so with pages of its own, over the same cache. Times are for one step; launches by the host are
not in them, and neither are pages that an earlier step left in the L2 cache, as far as the steps choose apart. All
kinds read the same pages: those of a sequence lie one after another, which is the layout that dense SDPA takes. Results
go to benchmarks/results/decode_MACHINE.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import peers
import torch
from bars import DECODE, evaluate
from cases import Benchmark, Case
from records import OURS, tokens_name
from timing import Run, captured
from torch import Tensor

from diffv2_sparse import BlockSelection, TopK, diff_attention_paged, select_blocks
from diffv2_sparse.cache import PagedKV
from diffv2_sparse.selectors import block_mean

BACKENDS = ("auto",)  # of paged attention, each a column of its own
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    device: str
    dtype: torch.dtype
    rounds: tuple[int, int]  # least and most
    matrix: int
    backends: tuple[str, ...]
    heads: tuple[int, int]  # HQ, H
    D: int
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    page: int  # tokens
    pages: int  # of one list
    layers: int

    def rehearsal(self) -> Sizes:
        return replace(self, lengths=self.lengths[:1])


FULL = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    rounds=(5, 50),
    matrix=8192,
    backends=BACKENDS,
    heads=(64, 8),
    D=128,
    batches=(1, 8, 16),
    lengths=tuple(1 << n for n in range(13, 21)),
    page=64,
    pages=64,
    layers=8,
)
SMOKE = Sizes(
    device="cuda" if ON_GPU else "cpu",
    dtype=torch.bfloat16 if ON_GPU else torch.float32,
    rounds=(1, 1),
    matrix=64,
    backends=BACKENDS,
    heads=(4, 2),
    D=16,
    batches=(1, 2),
    lengths=(128, 256),
    page=16,
    pages=6,
    layers=2,
)


class Problem:
    """Equally long sequences in a paged cache, and the next token's queries of every layer."""

    def __init__(self, sizes: Sizes, B: int, S: int):
        (HQ, H), D, page = sizes.heads, sizes.D, sizes.page
        self.sizes, NP = sizes, S // page
        generator = torch.Generator(sizes.device).manual_seed(1)
        options = {"device": sizes.device, "dtype": sizes.dtype}

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, **options).normal_(generator=generator)

        table = torch.arange(B * H * NP, dtype=torch.int32, device=sizes.device).view(B, H, NP)
        lengths = torch.full((B,), S, dtype=torch.int32, device=sizes.device)
        self.pages = PagedKV(random(B * H * NP, page, D), random(B * H * NP, page, D), table, lengths)
        self.summaries = torch.empty(B, NP, H, D, **options)
        for own, pages in zip(self.summaries, self.pages.k_pages.view(B, H, NP, page, D)):  # less memory than at once
            own.copy_(block_mean(pages, 2).transpose(0, 1))
        self.layers = [(random(B, 1, HQ, D), random(B, 1, HQ // 2)) for _ in range(sizes.layers)]
        self.shape = {"B": B, "T": 1, "S": S, "HQ": HQ, "H": H, "D": D}
        self.shape |= {"dtype": str(sizes.dtype).removeprefix("torch."), "block_n": page}

    def choose(self, q: Tensor) -> BlockSelection:
        cut = {"budget": TopK(self.sizes.pages), "block_m": 1, "block_n": self.sizes.page}
        return select_blocks(q, summaries=self.summaries, key_tokens=self.pages.lengths, mode="pair_mean", **cut)

    def cases(self) -> list[Case]:
        """Choice, attention over what was chosen, and the step, each by all who have it."""
        sparse = {"blocks": self.sizes.pages}
        found = [self._case("select", OURS, "auto", self._select, sparse)]
        for backend in self.sizes.backends:
            found.append(self._case("attend", OURS, backend, lambda b=backend: self._attend(self._ours(b)), sparse))
            found.append(self._case("step", OURS, backend, lambda b=backend: self._step(self._ours(b)), sparse))
        found.append(self._case("attend", peers.XFORMERS, None, lambda: self._attend(self._xformers()), sparse))
        found.append(self._case("step", peers.XFORMERS, None, lambda: self._step(self._xformers()), sparse))
        return [*found, self._case("step", peers.DENSE, None, self._dense, {})]

    def _case(self, phase: str, kind: str, backend: str | None, build: Callable[[], Run], shape: dict) -> Case:
        case = f"{tokens_name(self.shape['S'])} keys, batch {self.shape['B']}"
        dense = kind == peers.DENSE
        return Case(
            case,
            phase,
            kind,
            backend,
            self.shape | shape,
            build,
            steps=self.sizes.layers,
            facts={"read_gib": self._bytes_read(phase, dense) / 2**30},
            alone=dense,
            compiles=None if dense else "any length",
        )

    def _bytes_read(self, phase: str, dense: bool) -> int:
        """Of a step: keys, values and summaries, each once."""
        sizes, (B, H, NP) = self.sizes, self.pages.page_table.shape
        attended = NP if dense else 0 if phase == "select" else min(sizes.pages, NP)
        scored = 0 if dense or phase == "attend" else NP
        return B * H * sizes.D * sizes.dtype.itemsize * (2 * attended * sizes.page + scored)

    # Each returns the call to be timed

    def _select(self) -> Run:
        return self._all_layers(lambda i, q, lam_logit: self.choose(q))

    def _attend(self, attend: Callable) -> Run:
        chosen = [self.choose(q) for q, _ in self.layers]
        return self._all_layers(lambda i, q, lam_logit: attend(q, lam_logit, chosen[i]))

    def _step(self, attend: Callable) -> Run:
        return self._all_layers(lambda i, q, lam_logit: attend(q, lam_logit, self.choose(q)))

    def _dense(self) -> Run:
        calls = [peers.dense_decode(q, lam_logit, self.pages) for q, lam_logit in self.layers]
        return self._all_layers(lambda i, q, lam_logit: calls[i]())

    def _ours(self, backend: str) -> Callable:
        return lambda q, lam_logit, selection: diff_attention_paged(
            q, lam_logit, self.pages, selection, backend=backend
        )

    def _xformers(self) -> Callable:
        return peers.XFormersDecode(self.pages, self.sizes.pages)

    def _all_layers(self, layer: Callable) -> Run:
        def steps():
            return [layer(i, q, lam_logit) for i, (q, lam_logit) in enumerate(self.layers)]

        return captured(steps) if self.sizes.device == "cuda" else steps


def decode(sizes: Sizes) -> Iterator[list[Case]]:
    for B in sizes.batches:
        for S in sizes.lengths:
            yield Problem(sizes, B, S).cases()


BENCHMARK = Benchmark(
    name="decode",
    groups={"decode": (decode, 0.5)},
    full=FULL,
    smoke=SMOKE,
    bars=lambda records: evaluate(DECODE, records),
)


if __name__ == "__main__":
    from runner import main

    sys.exit(main(BENCHMARK, __doc__))
