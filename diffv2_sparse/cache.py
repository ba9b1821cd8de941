"""What a YOCO model remembers of the tokens it has read: one shared K/V, the summaries of its full pages, and the
self-decoder's state.

Keys and values are **paged and head-major**: a page is one key block of one KV head, so the blocks that a selection
names are pages. The self-decoder's state is bounded, whatever the length: per layer a ring of keys, or the memory of
gated retention; both reach back `max_rollback` tokens further than the next token needs, so that cutting a sequence
short changes its length alone. Pages are written only beyond `lengths` and states are replaced, never changed, so a
failed call is undone by taking the old numbers back. With `offload` the pages live on the host (offload.py).

`lengths` and `page_table` are changed in place, so that a CUDA graph that has captured them reads what is true when it
is replayed. They and the pages move to other memory only in `grow` and where the batch size changes; `addresses` counts
how often they did, and a graph captured at another count must be captured again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor

from .cache_spec import CacheSpec, RetentionState, RowLists, SelfState, WindowState
from .offload import RESIDENT_BLOCKS, OffloadedPool
from .pages import PagedKV, PagePool, PageTable, sent
from .selection import BlockSelection

__all__ = ["CacheSpec", "PagedKV", "RetentionState", "RowLists", "SelfState", "SharedKVCache", "WindowState"]


class SharedKVCache:
    """A cache for `batch_size` sequences of up to `capacity` tokens each; also the `past_key_values` of Transformers'
    `generate`.

    Args:
        spec: of the model.
        batch_size, capacity: sequences, and tokens of each.
        blocks: key blocks in the pool, each a page of every KV head; by default enough for all sequences at capacity.
            Fewer will do where sequences share their prompts or are not all long.
        max_rollback: tokens that `truncate` can take back.
        offload: "cpu" keeps the pages in the host's memory and fetches those that sparse attention chooses (see
            offload.py); None keeps all on the device.
        resident_blocks: with `offload`, key blocks that the device has room for, to be read in one call and kept for
            the next; by default RESIDENT_BLOCKS per sequence and cross-decoder layer.

    Attributes:
        lengths: int32 `[B]` on the device, tokens of each sequence (padding does not count).
        tokens: the same numbers on the host.
        columns: columns of the padded batches read so far, padding included.
        k_pages, v_pages: `[P, block_n, D]`; on the host with `offload`.
        page_table: int32 `[B, H, NP]`.
        states: the self-decoder's state, one per layer.
        held: per cross-decoder layer, the list of each sequence's open row, which later tokens will finish; None while
            rows have one token.
        held_choice: the options under which those were chosen.
        floors: per sequence, the fewest tokens that it can be cut back to.
        addresses: how often tensors have moved.

    Raises:
        ValueError: batch_size, capacity, blocks or resident_blocks is not positive, max_rollback negative, an offload
            to anything but "cpu", or resident_blocks without it.
    """

    is_compileable = False  # read by `generate`

    def __init__(
        self,
        spec: CacheSpec,
        batch_size: int,
        capacity: int,
        *,
        blocks: int | None = None,
        max_rollback: int = 0,
        offload: str | None = None,
        resident_blocks: int | None = None,
    ):
        _check_positive(batch_size=batch_size, capacity=capacity)
        NP = -(-capacity // spec.block_n)
        blocks = batch_size * NP if blocks is None else blocks
        _check_positive(blocks=blocks)
        if type(max_rollback) is not int or max_rollback < 0:
            raise ValueError(f"max_rollback: expected an int ≥ 0, got {max_rollback!r}")
        if offload not in (None, "cpu"):
            raise ValueError(f"offload: expected 'cpu' or None, got {offload!r}")
        if offload is None and resident_blocks is not None:
            raise ValueError(f"resident_blocks: expected None without offload, got {resident_blocks!r}")
        self.spec, self.capacity, self.max_rollback, self.offload = spec, capacity, max_rollback, offload
        pages = blocks, spec.kv_heads, spec.block_n, spec.head_dim, spec.dtype, spec.device
        if offload is None:
            self.pool = PagePool(*pages)
        else:
            if resident_blocks is None:
                resident_blocks = RESIDENT_BLOCKS * batch_size * spec.cross_layers
            _check_positive(resident_blocks=resident_blocks)
            self.pool = OffloadedPool(*pages, resident_blocks)
        self.table = PageTable(self.pool, batch_size, NP)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=spec.device)
        self.tokens = self.floors = (0,) * batch_size
        self.columns = 0
        self.whole_columns = 0  # the last so many columns read had a token of every sequence
        self.states = tuple(spec.empty_state(batch_size, max_rollback) for _ in range(spec.self_layers))
        self.held: tuple[RowLists | None, ...] = (None,) * spec.cross_layers
        self.held_choice: dict = {}
        self._moves = 0

    def __del__(self):
        if "table" in vars(self):  # else the constructor has raised
            self.table.cut((0,) * len(self.table.blocks))

    @property
    def batch_size(self) -> int:
        return len(self.tokens)

    @property
    def addresses(self) -> int:
        return self._moves + self.pool.moves

    @property
    def k_pages(self) -> Tensor:
        return self.pool.k_pages

    @property
    def v_pages(self) -> Tensor:
        return self.pool.v_pages

    @property
    def page_table(self) -> Tensor:
        return self.table.pages

    # What a call asks

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
        """Raises ValueError unless `counts[b]` more tokens of each sequence fit, by its capacity and in the pool."""
        longest = max(own + count for own, count in zip(self.tokens, counts))
        if longest > self.capacity:
            raise ValueError(
                f"cache: expected at most {self.capacity} tokens per sequence, its capacity, got {longest}"
            )
        self.pool.require(self.table.blocks_needed(self.tokens, counts))

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
        names = ("tokens", "floors", "columns", "whole_columns", "states", "held", "held_choice")
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            self.table.cut(self.tokens)
            self.lengths.copy_(self._sent(self.tokens))
            raise

    def append(
        self, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor, counts: tuple[int, ...], columns: int
    ) -> None:
        """Appends the keys and values of new tokens and summarises the pages that become full.

        Args:
            k, v: `[N, H, D]`.
            sequence, position: int64 `[N]`, where each token stands; each sequence's tokens follow its last one.
            counts: new tokens of each sequence; 0 is none.
            columns: columns of the padded batch that they came from.

        Raises:
            ValueError: shapes disagree, a sequence outgrows the capacity, or the pool is exhausted; nothing changes.
        """
        shape = (sum(counts), self.spec.kv_heads, self.spec.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
        if len(counts) != self.batch_size or min(counts) < 0:
            raise ValueError(f"counts: expected {self.batch_size} numbers ≥ 0, got {counts}")
        self.check_room(counts)
        if sum(counts):
            self.table.extend(self.tokens, counts)
            block, slot = self.table.locate(sequence, position), position % self.spec.block_n
            self.pool.append(k, v, block, slot, *self.table.written(self.tokens, counts))
            self.lengths += self._sent(counts)
        self._count(counts, columns)

    def advance(self, tokens: int) -> None:
        """Takes blocks for as many more tokens of every sequence and counts them. Their keys and values, and `lengths`,
        are the caller's to write: by the device's `lengths`, so that one CUDA graph serves all positions.

        Raises:
            ValueError: a sequence outgrows the capacity, or the pool is exhausted; nothing changes.
        """
        counts = (tokens,) * self.batch_size
        self.check_room(counts)
        self.table.extend(self.tokens, counts)
        self._count(counts, tokens)

    def _count(self, counts: tuple[int, ...], columns: int) -> None:
        self.tokens = tuple(map(int.__add__, self.tokens, counts))
        self.floors = tuple(max(floor, end - self.max_rollback) for floor, end in zip(self.floors, self.tokens))
        self.columns += columns
        self.whole_columns = self.whole_columns + columns if min(counts) == columns else 0

    # What attention reads

    def pages(
        self,
        sequence: Tensor | slice = slice(None),
        lengths: Tensor | None = None,
        selection: BlockSelection | None = None,
    ) -> PagedKV:
        """The pages of some sequences, as many as the longest uses; `lengths` int32 stands in for their own.

        Args:
            selection: what will be read; with `offload` only that is there, until the next call.

        Raises:
            ValueError: with `offload`, no selection, or one of more pages than there is room for.
        """
        used = -(-max(self.tokens) // self.spec.block_n)
        lengths = self.lengths[sequence] if lengths is None else lengths
        table = self.page_table[sequence, :, :used]
        self.check_sparse(selection is not None)
        return self.pool.paged(table, lengths, selection)

    def check_sparse(self, sparse: bool) -> None:
        """Raises ValueError where dense attention would need pages that are not on the device."""
        if self.offload is not None and not sparse:
            raise ValueError(
                "cache: expected sparse attention over a cache with offload, got dense, which needs every page on the "
                "device; set sparse_mode, or make the cache without offload"
            )

    def full_summaries(self, sequence: Tensor | slice = slice(None)) -> Tensor:
        """The summaries of some sequences, `[b, NC, H, D]`, as many as the longest sequence has. A view while no
        sequence has shared blocks, else gathered.
        """
        return self.table.summaries(sequence, max(self.tokens) // self.spec.block_n)

    # What becomes of the sequences

    def reset(self, sequences: Collection[int] | None = None) -> None:
        """Forgets some sequences, or all; their pages go back to the pool."""
        chosen = range(self.batch_size) if sequences is None else sequences
        self._check_sequences(chosen)
        left = tuple(0 if b in chosen else n for b, n in enumerate(self.tokens))
        gone = self._sent([b in chosen for b in range(self.batch_size)], torch.bool)
        states = tuple(
            type(state)(*(x.masked_fill(gone.view(-1, *[1] * (x.ndim - 1)), 0) for x in state)) for state in self.states
        )
        self.lengths.copy_(self._sent(left))  # what can fail comes first
        self.tokens, self.states = left, states
        self.floors = tuple(0 if b in chosen else n for b, n in enumerate(self.floors))
        self.table.cut(left)
        if not any(self.tokens):
            self.columns = self.whole_columns = 0
            self.held, self.held_choice = (None,) * self.spec.cross_layers, {}

    def truncate(self, counts: int | Sequence[int]) -> None:
        """Takes back the last tokens of every sequence, or `counts[b]` of each; the next ones go on from there.

        Raises:
            ValueError: more than `max_rollback` tokens below the most that a sequence has had since its `reset`, more
                than it has, or back into a row of queries whose blocks are no longer known. Nothing changes.
        """
        each = tuple(counts) if isinstance(counts, Sequence) else (counts,) * self.batch_size
        if len(each) != self.batch_size or any(type(n) is not int or n < 0 for n in each):
            raise ValueError(f"counts: expected {self.batch_size} numbers ≥ 0, or one, got {counts}")
        left = tuple(map(int.__sub__, self.tokens, each))
        block_m = self.held_choice.get("block_m", 1)
        for b, (n, own, floor) in enumerate(zip(left, self.tokens, self.floors)):
            if n < floor:
                raise ValueError(
                    f"counts: expected at most {own - floor} tokens of sequence {b}, which has {own} and is kept back "
                    f"to {floor} (max_rollback {self.max_rollback}), got {each[b]}"
                )
            if n < own and n % block_m and n // block_m != own // block_m:
                raise ValueError(
                    f"counts: expected sequence {b} to end in its open row, or where a row of {block_m} tokens ends, "
                    f"got {n} of {own} tokens: an earlier row's blocks are not kept"
                )
        self.lengths.copy_(self._sent(left))  # what can fail comes first
        self.tokens = left
        self.table.cut(left)
        self.columns -= min(each)
        self.whole_columns = max(0, self.whole_columns - max(each))

    def fork(self, sequences: Sequence[int] | Tensor | None = None) -> SharedKVCache:
        """A cache over the same pool whose sequence i goes on from what sequence `sequences[i]` of this one has read;
        all by default.

        Pages and their summaries are shared until one of the holders writes to them; the self-decoder's state is
        copied. A fork that is dropped gives its pages back. With `offload` the device's `resident_blocks` are shared,
        too, and have to hold what all sequences of a call read.
        """
        fork = SharedKVCache.__new__(SharedKVCache)
        order = self._order(sequences)
        table = PageTable(self.pool, len(order), self.table.width)
        vars(fork).update(vars(self) | {"table": table, "lengths": self.lengths[:0], "_moves": 0})
        fork._follow(self, order)
        return fork

    def __copy__(self) -> SharedKVCache:
        return self.fork()

    def grow(self, capacity: int, blocks: int | None = None) -> None:
        """Makes room for `capacity` tokens per sequence, in a pool of `blocks`; by default as many as a new cache has.

        Tensors move, for forks over the same pool as well: captured graphs must be captured again. Where there is no
        memory for it, what the cache holds and has room for stays.
        """
        _check_positive(capacity=capacity)
        if capacity < self.capacity:
            raise ValueError(f"capacity: expected at least the {self.capacity} tokens there are, got {capacity}")
        width = -(-capacity // self.spec.block_n)
        self.pool.grow(self.batch_size * width if blocks is None else blocks)
        self.table.widen(width)
        self.capacity = capacity
        self._moves += 1

    # The names by which Transformers calls them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch read so far: `generate` cuts its input ids after them."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.capacity

    @property
    def is_croppable(self) -> bool:
        return self.max_rollback > 0

    def activate_past_recording(self) -> None:
        """Raises ValueError unless tokens can be taken back."""
        if not self.is_croppable:
            raise ValueError("cache: expected max_rollback > 0 where tokens are to be taken back, got 0")

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last −`tokens_to_remove` columns.

        Raises:
            ValueError: a positive number, or columns with padding; and as `truncate`.
        """
        tokens_to_remove = int(tokens_to_remove)  # older versions of Transformers pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a number ≤ 0, minus the columns, got {tokens_to_remove}")
        if -tokens_to_remove > self.whole_columns:
            raise ValueError(
                f"tokens_to_remove: expected columns without padding, the last {self.whole_columns}, "
                f"got {-tokens_to_remove}"
            )
        self.truncate(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence `beam_idx[b]` was."""
        self._follow(self, self._order(beam_idx))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes `repeats` sequences, one after another."""
        self._follow(self, [b for b in range(self.batch_size) for _ in range(repeats)])

    def _order(self, sequences: Sequence[int] | Tensor | None) -> list[int]:
        if sequences is None:
            return list(range(self.batch_size))
        order = sequences.tolist() if isinstance(sequences, Tensor) else list(sequences)
        if order and isinstance(order[0], bool):
            order = [b for b, chosen in enumerate(order) if chosen]
        self._check_sequences(order)
        return order

    def _check_sequences(self, sequences: Collection[int]) -> None:
        known = range(self.batch_size)
        if not isinstance(sequences, Collection) or not len(sequences) or any(b not in known for b in sequences):
            raise ValueError(f"sequences: expected some of 0 … {self.batch_size - 1}, got {sequences}")

    def _follow(self, origin: SharedKVCache, order: list[int]) -> None:
        """Goes on from sequences of `origin`, in place where the batch size stays."""
        at = self._sent(order, torch.long)
        lengths = origin.lengths[at]
        states = tuple(type(state)(*(x[at] for x in state)) for state in origin.states)
        held = tuple(None if rows is None else RowLists(*(x[at] for x in rows)) for rows in origin.held)
        if len(order) == len(self.lengths):
            self.table.follow(origin.table, order)
            self.lengths.copy_(lengths)
        else:
            table = PageTable(self.pool, len(order), self.table.width)
            table.follow(origin.table, order)
            self.table.cut((0,) * len(self.table.blocks))
            self.table, self.lengths = table, lengths
            self._moves += 1
        self.tokens, self.floors = (tuple(x[b] for b in order) for x in (origin.tokens, origin.floors))
        self.states, self.held = states, held

    def _sent(self, values: Sequence, dtype: torch.dtype = torch.int32) -> Tensor:
        return sent(values, dtype, self.spec.device)


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value!r}")
