"""What a YOCO model remembers of the tokens it has read: one shared K/V, the summaries of its full pages, and the
self-decoder's state.

Keys and values are **paged and head-major**: a page is one key block of one KV head, so the blocks that a selection
names are pages. The self-decoder's state is bounded, whatever the length: a ring of `window` keys per layer, or the
`[D, D]` memory of gated retention. Pages are written only beyond `lengths`; everything else is replaced, never changed,
so a failed call is undone by taking the old tensors back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .selectors import block_mean


@dataclass(frozen=True)
class PagedKV:
    """The view of paged keys and values that attention sees.

    Key position s of sequence b and KV head h is in page `page_table[b, h, s // block_n]`, slot `s % block_n`.

    Attributes:
        k_pages, v_pages: `[P, block_n, D]`.
        page_table: int32 `[B, H, NP]`.
        lengths: int32 `[B]`, keys of each sequence.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor

    @property
    def block_n(self) -> int:
        return self.k_pages.shape[1]


class WindowState(NamedTuple):
    """The last `window` keys and values of a self-decoder layer, `[B, H, window, D]`; position s is in slot `s %
    window`.
    """

    k: Tensor
    v: Tensor


class RowLists(NamedTuple):
    """Lists of key blocks, one per row: indices int32 `[rows, C, H, NB]`, counts int32 `[rows, C, H]`."""

    indices: Tensor
    counts: Tensor


SelfState = WindowState | Tensor  # a Tensor is the memory of gated retention, float32 [B, heads, D, D]


@dataclass(frozen=True)
class CacheSpec:
    """What a model needs of its cache, and which model that is.

    Attributes:
        self_decoder: "sliding_window" or "gated_retention".
        window: keys in a ring; tokens a query of the self-decoder sees.
        self_layers, cross_layers: layers of each half.
        heads: retention heads.
        kv_heads, head_dim: of the shared K/V and of the rings.
        position: how the keys carry their position, such as "rope 10000.0".
        block_n: tokens per page.
        dtype, device: of keys and values.
        owner: the model that made the cache, by identity: moved it is the same, a copy of it is another. None after
            pickling: then only the sizes can be compared.
    """

    self_decoder: str
    window: int
    self_layers: int
    cross_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    position: str
    block_n: int
    dtype: torch.dtype
    device: torch.device
    owner: weakref.ref | None = None

    def __deepcopy__(self, memo: dict) -> CacheSpec:
        return self  # nothing in it changes, and the copy of a cache belongs to the same model

    def __getstate__(self) -> dict:
        return {**vars(self), "owner": None}  # no identity outlives the process


class SharedKVCache:
    """A cache for `batch_size` sequences of up to `capacity` tokens each; also the `past_key_values` of Transformers'
    `generate`.

    Attributes:
        lengths: int32 `[B]` on the device, tokens of each sequence (padding does not count).
        tokens: the same numbers on the host.
        columns: columns of the padded batches read so far, padding included.
        k_pages, v_pages: `[P, block_n, D]`.
        page_table: int32 `[B, H, NP]`.
        summaries: `[B, NP, H, D]`, the mean key of every full page; what stands beyond those has no meaning.
        states: the self-decoder's state, one per layer.
        held: per cross-decoder layer, the list of each sequence's open row, which later tokens will finish; None while
            rows have one token.
        held_choice: the options under which those were chosen.

    Raises:
        ValueError: batch_size or capacity is not positive.
    """

    is_compileable = False  # read by `generate`

    def __init__(self, spec: CacheSpec, batch_size: int, capacity: int):
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        self.spec, self.batch_size, self.capacity = spec, batch_size, capacity
        B, H, D, dtype, device = batch_size, spec.kv_heads, spec.head_dim, spec.dtype, spec.device
        NP = -(-capacity // spec.block_n)
        self.k_pages = torch.zeros(B * H * NP, spec.block_n, D, dtype=dtype, device=device)
        self.v_pages = torch.zeros_like(self.k_pages)
        self.page_table = torch.arange(B * H * NP, dtype=torch.int32, device=device).view(B, H, NP)
        self.summaries = torch.zeros(B, NP, H, D, dtype=dtype, device=device)
        self.lengths = torch.zeros(B, dtype=torch.int32, device=device)
        self.tokens: tuple[int, ...] = (0,) * B
        self.columns = 0
        self.states: tuple[SelfState, ...] = tuple(self._empty_state() for _ in range(spec.self_layers))
        self.held: tuple[RowLists | None, ...] = (None,) * spec.cross_layers
        self.held_choice: dict = {}

    def _empty_state(self) -> SelfState:
        spec, B = self.spec, self.batch_size
        if self.spec.self_decoder == "gated_retention":
            wide = torch.promote_types(spec.dtype, torch.float32)
            return torch.zeros(B, spec.heads, spec.head_dim, spec.head_dim, dtype=wide, device=spec.device)
        shape = (B, spec.kv_heads, spec.window, spec.head_dim)
        return WindowState(*(torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(2)))

    def check(self, spec: CacheSpec, batch_size: int) -> None:
        """Raises ValueError unless the cache was made by the model of this `spec` and for `batch_size` sequences."""
        for name in (field.name for field in fields(CacheSpec) if field.name != "owner"):
            own, asked = getattr(self.spec, name), getattr(spec, name)
            if own != asked:
                raise ValueError(f"cache: expected {name} = {asked} for this model, got a cache made for {own}")
        if self.spec.owner is not None and self.spec.owner != spec.owner:
            raise ValueError("cache: expected one that this model made, got that of another model of the same sizes")
        if batch_size != self.batch_size:
            raise ValueError(
                f"cache: expected the {self.batch_size} sequences that the cache holds, got a batch of {batch_size}"
            )

    def check_room(self, counts: tuple[int, ...]) -> None:
        """Raises ValueError unless `counts[b]` more tokens of each sequence fit."""
        longest = max(own + count for own, count in zip(self.tokens, counts))
        if longest > self.capacity:
            raise ValueError(
                f"cache: expected at most {self.capacity} tokens per sequence, its capacity, got {longest}"
            )

    def check_held(self, choice: dict, block_m: int, starts: tuple[int, ...]) -> None:
        """Raises ValueError if a row is open after `starts` whose blocks were chosen under other options."""
        if any(start % block_m for start in starts) and self.held_choice != choice:
            raise ValueError(
                f"cache: expected {self.held_choice or 'dense attention'} until the open row of {block_m} tokens is "
                f"full, got {choice}"
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Takes everything back when the block raises. Pages written meanwhile lie beyond `lengths` again."""
        names = ("lengths", "tokens", "columns", "states", "held", "held_choice")
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def append(
        self, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor, counts: tuple[int, ...], columns: int
    ) -> None:
        """Appends the keys and values of new tokens and summarises the pages that become full.

        Args:
            k, v: `[N, H, D]`.
            sequence, position: int64 `[N]`, where each token stands; each sequence's tokens follow its last one.
            counts: new tokens of each sequence.
            columns: columns of the padded batch that they came from.
        """
        block_n = self.spec.block_n
        page = self.page_table[sequence, :, position // block_n].long()  # [N, H]
        slot = (position % block_n)[:, None].expand_as(page)
        self.k_pages[page, slot] = k.to(self.k_pages.dtype)
        self.v_pages[page, slot] = v.to(self.v_pages.dtype)
        total = tuple(own + count for own, count in zip(self.tokens, counts))
        filled = [
            (b, block) for b, end in enumerate(total) for block in range(self.tokens[b] // block_n, end // block_n)
        ]
        if filled:
            b, block = torch.tensor(filled, device=k.device).unbind(1)
            self.summaries[b, block] = block_mean(self.k_pages[self.page_table[b, :, block].long()], 2)
        self.lengths = self.lengths + torch.tensor(counts, dtype=torch.int32, device=k.device)
        self.tokens, self.columns = total, self.columns + columns

    def pages(self, sequence: Tensor | slice = slice(None), lengths: Tensor | None = None) -> PagedKV:
        """The pages of some sequences, as many as the longest uses; `lengths` int32 stands in for their own."""
        used = -(-max(self.tokens) // self.spec.block_n)
        lengths = self.lengths[sequence] if lengths is None else lengths
        return PagedKV(self.k_pages, self.v_pages, self.page_table[sequence, :, :used], lengths)

    def full_summaries(self, sequence: Tensor | slice = slice(None)) -> Tensor:
        """The summaries of some sequences, `[b, NC, H, D]`, as many as the longest sequence has."""
        return self.summaries[sequence, : max(self.tokens) // self.spec.block_n]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch read so far: `generate` cuts its input ids after them."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence `beam_idx[b]` was; copies the pages in use."""
        order = beam_idx.to(self.spec.device)
        B, H, NP = self.page_table.shape
        used = -(-max(self.tokens) // self.spec.block_n)
        for pages in (self.k_pages, self.v_pages):
            own = pages.view(B, H, NP, *pages.shape[1:])[:, :, :used]
            own.copy_(own[order])
        self.summaries = self.summaries[order]
        self.lengths = self.lengths[order]
        self.tokens = tuple(self.tokens[b] for b in order.tolist())
        self.states = tuple(
            WindowState(*(x[order] for x in state)) if isinstance(state, WindowState) else state[order]
            for state in self.states
        )
        self.held = tuple(None if rows is None else RowLists(*(x[order] for x in rows)) for rows in self.held)
