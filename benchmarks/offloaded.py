"""Decoding over a cache in the host's memory, beside the same cache on the device: 1M, 4M and 10M tokens, batch 1.

Every step has a token of its own, and weights are random, so that layers and steps choose nearly unrelated blocks: of
what the last step left on the device little is chosen again, and some of that has left its slot by then. That is a bad
case for a cache that fetches; `pages_fetched` says how many pages a step brought (keys and values of `block_n` tokens
of one KV head each). "own
choice": each cross-decoder layer chooses for itself; "shared choice": the first one chooses for all. Both caches hold
the same numbers and both kinds see the same tokens, so their logits are compared before they are timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from cases import Case
from models import fill, random_yoco
from records import OURS, tokens_name
from timing import Run
from torch import Tensor

from diffv2_sparse.cache import SharedKVCache
from diffv2_sparse.yoco import DiffV2YocoForCausalLM

ROOM = 512  # tokens that are appended while steps are timed
WARMED = 3  # steps: one compiles, one captures
COUNTED = 5  # steps whose pages are counted
RESIDENT = "ours, resident"
PLACES = {OURS: "cpu", RESIDENT: None}  # kinds, and what `new_cache` calls the places of their pages


def offloaded(sizes) -> Iterator[list[Case]]:
    """Of the `Sizes` in generation.py. Caches of one length are gone before those of the next are made."""
    model = random_yoco(sizes.shape, sizes.sparsity, sizes.device, sizes.dtype)
    for S in sizes.offloaded:
        yield from Steps(model, S, sizes).heats()


class Steps:
    """Steps over two caches of S tokens, which are made when the first of them is."""

    def __init__(self, model: DiffV2YocoForCausalLM, S: int, sizes):
        self.model, self.S, self.sizes = model, S, sizes

    @functools.cached_property
    def ids(self) -> Tensor:
        generator = torch.Generator(self.sizes.device).manual_seed(1)
        size = (ROOM, 1, 1)
        return torch.randint(self.sizes.shape.vocab, size, device=self.sizes.device, generator=generator)

    @functools.cached_property
    def caches(self) -> dict[str, SharedKVCache]:
        """Both, with the same numbers."""
        found = {}
        for kind, where in PLACES.items():
            torch.manual_seed(2)
            found[kind] = fill(self.model.new_cache(1, self.S + ROOM, offload=where), self.S)
        return found

    @functools.cached_property
    def filled_s(self) -> float:
        """Seconds until both caches are there."""
        start = time.perf_counter()
        _ = self.caches
        if self.sizes.device == "cuda":
            torch.cuda.synchronize()
        return round(time.perf_counter() - start, 2)

    def heats(self) -> Iterator[list[Case]]:
        """A graph is of one way to choose, so that these come one after another."""
        for choice, share_layers in (("own", 1), ("shared", self.sizes.shape.layers)):
            for how in ("graph", "eager"):
                yield [self._case(kind, choice, share_layers, how) for kind in PLACES]

    def _case(self, kind: str, choice: str, share_layers: int, how: str) -> Case:
        shape = {"B": 1, "T": 1, "S": self.S, **self.sizes.shape.record(self.sizes.dtype)}
        shape |= self.sizes.sparsity.record() | {"share_layers": share_layers}
        facts = {}

        def build() -> Run:
            facts["filled_s"] = self.filled_s  # by whoever comes first
            cache = self.caches[kind]
            facts["cache_gib"] = round(sum(x.numel() * x.itemsize for x in (cache.k_pages, cache.v_pages)) / 2**30, 3)
            step = self._step(cache, share_layers, how == "graph")
            for _ in range(WARMED):
                step()
            before = cache.pool.fetched if cache.offload else 0
            for _ in range(COUNTED):
                step()
            if cache.offload:
                facts["pages_fetched"] = (cache.pool.fetched - before) / COUNTED
            return step

        case, backend = f"{tokens_name(self.S)} tokens, offloaded, {choice} choice", self.model.config.paged_backend
        return Case(
            case, f"sparse, {how}", kind, backend if kind == OURS else None, shape, build, facts=facts, compiles=None
        )

    def _step(self, cache: SharedKVCache, share_layers: int, use_graphs: bool) -> Run:
        model, ids, S = self.model, self.ids, self.S

        def step() -> Tensor:
            model.config.sparse_share_layers = share_layers
            return model.decode(ids[cache.tokens[0] - S], cache, use_graphs=use_graphs)

        return step
