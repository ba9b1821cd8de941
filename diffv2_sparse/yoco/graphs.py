"""Decoding as one launch: a model's forward for the next few tokens of every sequence, captured as a CUDA graph.

`step` is that forward as a plain function of tensors that stay where they are: it places the tokens by the device's
lengths, writes them to the rings and pages, and reads nothing back, so that what it launches is the same every time.
The host only takes blocks from the pool, a new one every `block_n` tokens. Sampling stays outside.

A graph holds the addresses of the model's weights and of a cache, and how many tokens there are. When one of these has
changed, or the options that are read at every call, it is captured again: the first call of a kind runs `step` as it
is, which also compiles kernels, the second captures it, and from then on it is replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cache import CacheSpec, PagedKV, SelfState, SharedKVCache
from ..ops import obstacle
from ..pages import PageTable
from ..selection import BlockSelection
from .layout import Following
from .reading import Group, Reading

if TYPE_CHECKING:
    from .modeling import DiffV2YocoModel

GRAPH_BACKENDS = ("auto", "triton")  # those of `paged_backend` that never wait for the device


@dataclass(frozen=True)
class StepTensors:
    """What a step reads and writes, at fixed addresses.

    Attributes:
        ids: int64 `[B, T]`, the tokens.
        lengths: int32 `[B]`, of the cache: tokens before these.
        table: the pages, which have room for them.
        states: the self-decoder's, contiguous; changed in place.
    """

    spec: CacheSpec
    ids: Tensor
    lengths: Tensor
    table: PageTable
    states: tuple[SelfState, ...]

    @classmethod
    def of(cls, cache: SharedKVCache, tokens: int, states: tuple[SelfState, ...]) -> StepTensors:
        ids = torch.zeros(cache.batch_size, tokens, dtype=torch.long, device=cache.spec.device)
        return cls(cache.spec, ids, cache.lengths, cache.table, states)

    def write(self, k: Tensor, v: Tensor, following: Following) -> None:
        """Writes k and v `[B, T, H, D]` to their pages, and the summaries of these; an open page's means nothing."""
        pool, block = self.table.pool, self.table.locate(following.sequence, following.positions).flatten()
        pool.write(k.flatten(0, 1), v.flatten(0, 1), block, (following.positions % pool.block_n).flatten())
        pool.summarise(block)


@dataclass(frozen=True)
class SharedTensors:
    """The shared keys and values of all sequences, as cross-decoder layers ask a cache for them."""

    spec: CacheSpec
    table: PageTable
    summaries: Tensor | None

    def pages(self, sequence: slice, lengths: Tensor, selection: BlockSelection | None) -> PagedKV:
        return self.table.pool.paged(self.table.pages[sequence], lengths, selection)

    def full_summaries(self, sequence: slice) -> Tensor:
        return self.summaries[sequence]


def copied(states: tuple[SelfState, ...]) -> tuple[SelfState, ...]:
    """The same in memory of their own, contiguous."""
    return tuple(type(state)(*(x.clone(memory_format=torch.contiguous_format) for x in state)) for state in states)


def overwrite(states: tuple[SelfState, ...], others: tuple[SelfState, ...]) -> None:
    """Copies `others` into the memory of `states`."""
    for state, other in zip(states, others):
        if state is not other:
            for x, y in zip(state, other):
                x.copy_(y)


def step(model: DiffV2YocoModel, at: StepTensors) -> Tensor:
    """Hidden states `[B, T, hidden_size]` of the tokens in `at.ids`, T ≤ max_rollback + 1, which are appended to the
    cache that `at` is of; `SharedKVCache.advance` has made room for them.
    """
    B, T = at.ids.shape
    following = Following(at.lengths[:, None].long() + torch.arange(T, device=at.ids.device))
    hidden, rotary = model.embed_tokens(at.ids), model.rotary(following.positions)
    for layer, state in zip(model.self_layers, at.states):
        hidden = layer.step(hidden, rotary, following, state)
    at.write(*model.shared_kv(hidden, rotary), following)
    lengths, summaries = at.lengths + T, None
    if model.config.sparse_mode != "dense":
        summaries = at.table.summaries(slice(None), at.table.width)
    shared = SharedTensors(at.spec, at.table, summaries)
    everything = Reading(
        tokens=torch.arange(B * T, device=at.ids.device),
        positions=following.positions.view(1, -1),
        asked=None,
        groups=(Group(slice(None), T, slice(None), lengths),),
        rows=None,
    )
    rotary = tuple(angles.view(1, B * T, -1) for angles in rotary)
    hidden, _ = model.read(hidden.view(1, B * T, -1), rotary, shared, everything, (None,) * len(model.cross_layers))
    at.lengths.copy_(lengths)
    return hidden.view(B, T, -1)


class Captured:
    """What a function of no arguments launches on a device, to be launched again. Calling it returns what the function
    had returned, which the next call overwrites.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, beside: Captured | None):
        self.graph, self.device = torch.cuda.CUDAGraph(), device
        pool = None if beside is None else beside.graph.pool()  # memory is shared, as one runs at a time
        # other threads may go on using the device meanwhile
        with torch.cuda.device(device), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function()

    def __call__(self) -> Tensor:
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.output


class StepGraph:
    """A step of one kind over one cache."""

    def __init__(self, model: DiffV2YocoModel, at: StepTensors, options: dict):
        self.at, self.options = at, options
        self.weights = [(own._parameters, name) for own in model.modules() for name in own._parameters]
        self.addresses = self._addresses()
        self.is_warm = False
        self.captured: Captured | None = None

    def is_valid(self, options: dict) -> bool:
        return self.options == options and self.addresses == self._addresses()

    def warm_up(self, model: DiffV2YocoModel) -> Tensor:
        """Runs the step without a graph. Whatever is raised, the states stay as they were."""
        before = copied(self.at.states)
        try:
            hidden = step(model, self.at)
        except BaseException:
            overwrite(self.at.states, before)
            raise
        self.is_warm = True
        return hidden

    def _addresses(self) -> list[int | None]:
        return [None if own[name] is None else own[name].data_ptr() for own, name in self.weights]


class CacheGraphs:
    """The graphs over one cache, by tokens. They hold the cache's tensors and share its states, but not the cache."""

    def __init__(self, cache: SharedKVCache):
        self.addresses = cache.addresses
        self.states = copied(cache.states)
        self.steps: dict[int, StepGraph] = {}

    def adopt(self, cache: SharedKVCache) -> None:
        """Goes on from the cache's states, whatever has replaced them meanwhile."""
        overwrite(self.states, cache.states)
        cache.states = self.states

    def step(self, model: DiffV2YocoModel, cache: SharedKVCache, tokens: int) -> StepGraph:
        config = model.config
        options = {"at_home": cache.table.at_home, "backend": config.paged_backend, **config.choice_options()}
        own = self.steps.get(tokens)
        if own is None or not own.is_valid(options):
            own = self.steps[tokens] = StepGraph(model, StepTensors.of(cache, tokens, self.states), options)
        return own

    def capture(self, model: DiffV2YocoModel, own: StepGraph) -> None:
        beside = next((one.captured for one in self.steps.values() if one.captured is not None), None)
        own.captured = Captured(lambda: step(model, own.at), own.at.ids.device, beside)


class ModelGraphs:
    """The graphs of one model, for as long as their caches live. A copy of the model begins with none."""

    def __init__(self):
        self._caches: weakref.WeakKeyDictionary[SharedKVCache, CacheGraphs] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return ModelGraphs, ()

    def decode(self, model: DiffV2YocoModel, input_ids: Tensor, cache: SharedKVCache) -> Tensor:
        """Hidden states `[B, T, hidden_size]` of more tokens of every sequence, input_ids `[B, T]`, that `can_capture`
        allows. Errors as `prefill`.
        """
        with cache.transaction():
            cache.advance(input_ids.shape[1])
            graphs = self._caches.get(cache)
            if graphs is None or graphs.addresses != cache.addresses:
                graphs = self._caches[cache] = CacheGraphs(cache)
            graphs.adopt(cache)
            own = graphs.step(model, cache, input_ids.shape[1])
            own.at.ids.copy_(input_ids)
            if not own.is_warm:
                return own.warm_up(model)
            if own.captured is None:
                graphs.capture(model, own)
        return own.captured().clone()  # outside, as it cannot be taken back


def can_capture(model: DiffV2YocoModel, cache: SharedKVCache, tokens: int) -> bool:
    """Whether a call with so many tokens of every sequence can be a graph: on CUDA, with kernels that never wait for
    the device, where each token chooses its own blocks, no more tokens than the states can take at once, and all pages
    that they choose on the device at once.
    """
    config, spec = model.config, cache.spec
    if cache.offload is not None:
        listed = tokens * cache.batch_size * config.listed_blocks()
        if config.sparse_mode == "dense" or not cache.pool.holds(listed):
            return False
    return (
        spec.device.type == "cuda"
        and tokens <= cache.max_rollback + 1
        and (config.sparse_mode == "dense" or config.sparse_block_m == 1)
        and not cache.held_choice  # longer rows are still open
        and config.paged_backend in GRAPH_BACKENDS
        and obstacle(cache.pool.summaries) is None
        and model.embed_tokens.weight.device == model.norm.weight.device == spec.device
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )
