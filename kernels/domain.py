"""Which key blocks each tile of queries walks: a block selection, a sliding window or the whole causal past.

Queries are cut into *lists*: one row of a selection, or several short rows that one tile of the tensor cores takes
together. A list holds the union of its rows' blocks (over both classes, too), each block once, with one bit per row
and class that says who chose it; blocks that every token sees whole come first, then those that need a mask. Entries
out of range or seen by no token are dropped here, so that the kernels that walk lists never meet them. That a row's own
list repeats no block is the contract of a selection: bits of repeated ones are not all collected. Without a selection
nothing is stored: the walk follows from the positions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import describable, padded, sequence_of
from .tiles import Packing, Tile, cdiv, key_tile, next_power_of_2

NOTHING = tl.constexpr(2**31 - 1)  # sorts after every block


@dataclass(frozen=True)
class Domain:
    """What may attend to what. `indices` int32 `[B, C, H, NM, NB]` and `counts` are None for dense and windowed calls,
    which have blocks as large as a tile may be; `cu_q`, `cu_k` int32 `[N + 1]` bound packed sequences.
    """

    B: int
    T: int
    S: int
    H: int
    window: int | None
    indices: Tensor | None
    counts: Tensor | None
    block_m: int
    block_n: int
    cu_q: Tensor | None
    cu_k: Tensor | None

    @property
    def classes(self) -> int:
        return 1 if self.indices is None else self.indices.shape[1]

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    def row_starts(self, block_m: int) -> Tensor | None:
        """int32 `[N + 1]`: number of rows of `block_m` before each packed sequence."""
        return _starts(self.cu_q, block_m) if self.packed else None

    def pieces(self, tokens: int, *, keys: bool = False) -> tuple[int, Tensor | None]:
        """Runs of `tokens` queries (or keys), cut per sequence: how many at most, and the (sequence, number) of each"""
        total = self.S if keys else self.T
        if not self.packed:
            return cdiv(total, tokens), None
        bounds = self.cu_k if keys else self.cu_q
        most = total // tokens + bounds.shape[0] - 1
        starts = _starts(bounds, tokens)
        piece = torch.arange(most, device=bounds.device, dtype=torch.int32)
        sequence = torch.searchsorted(starts[1:], piece, right=True).int()
        own = piece - starts[sequence.clamp(max=bounds.shape[0] - 2)]
        padding = sequence >= bounds.shape[0] - 1
        return most, torch.stack([sequence.masked_fill(padding, 0), own.masked_fill(padding, cdiv(total, tokens))], 1)


def takes_descriptors(domain: Domain, arch: int, k: Tensor, v: Tensor) -> bool:
    """Whether K and V tiles come by Hopper's copy engine. Where tiles span several small blocks, or keys of another
    sequence could come along, pointers must do.
    """
    whole = domain.indices is None or domain.block_n >= 64
    return whole and not domain.packed and describable(arch, k, v)


class Walks(NamedTuple):
    """What a kernel reads of its lists; None where it has no need of it. All int32. For classes apart, C · H for H."""

    entries: Tensor | None  # [B, H, NL, NE] key blocks
    bits: Tensor | None  # like entries: who chose them
    lengths: Tensor | None  # [B, H, NL, 2]: clear entries, all entries
    table: Tensor | None  # [NL, 2]: the sequence of a list, and its number there
    cu_q: Tensor | None
    cu_k: Tensor | None


class Form(NamedTuple):
    """What the compiler is told of a kernel that goes by query rows: its heads, walks and tile."""

    D: int
    DP: int  # the same as a tile has it
    G: int  # heads of a group, of queries or, in the backward, of outputs
    DIFF: bool
    APART: bool  # each class has lists of its own
    C: int  # classes in one list
    LISTS: bool
    MEMBERS: bool  # blocks differ in who chose them
    PACKED: bool
    WINDOWED: bool
    DESCRIBED: bool  # K and V come by the copy engine
    LIST_TOKENS: int
    LIST_TILES: int
    BLOCK_M: int
    BLOCK_N: int
    TOKENS: int  # of a tile, as HEADS; CHUNKS tiles share a group's heads
    HEADS: int
    CHUNKS: int
    KEYS: int  # of a step; SUB steps walk one key block, or PER blocks are one step
    SUB: int
    PER: int

    @classmethod
    def of(
        cls, lists: "Lists", D: int, G: int, packing: Packing, tile: Tile, *, differential: bool, described: bool
    ) -> "Form":
        keys, sub, per = key_tile(tile.keys, lists.domain.block_n)
        return cls(
            D=D,
            DP=padded(D),
            G=G,
            DIFF=differential,
            APART=lists.apart,
            C=lists.classes,
            DESCRIBED=described,
            TOKENS=packing.tokens,
            HEADS=packing.heads,
            CHUNKS=packing.chunks,
            KEYS=keys,
            SUB=sub,
            PER=per,
            **lists.constants,
        )


@dataclass(frozen=True)
class Lists:
    """The walks of all tiles of TOKENS tokens; a list is walked by `tiles` tiles. Without a selection only the cut."""

    domain: Domain
    tokens: int  # of a tile
    rows: int  # of the selection in one list
    apart: bool = False  # each class has lists of its own, else a list unites both

    @cached_property
    def span(self) -> int:
        """Tokens of a list."""
        return self.tokens if self.domain.indices is None else self.rows * self.domain.block_m

    @property
    def tiles(self) -> int:
        return cdiv(self.span, self.tokens)

    @cached_property
    def cut(self) -> tuple[int, Tensor | None]:
        return self.domain.pieces(self.span)

    @property
    def members(self) -> bool:
        """Whether blocks differ in who chose them."""
        return self.rows * self.classes > 1

    @property
    def classes(self) -> int:
        """Of one list."""
        return 1 if self.apart else self.domain.classes

    @property
    def constants(self) -> dict[str, int | bool]:
        """Of the kernels that walk these lists."""
        domain = self.domain
        return {
            "LISTS": domain.indices is not None,
            "MEMBERS": self.members,
            "PACKED": domain.packed,
            "WINDOWED": domain.window is not None,
            "LIST_TOKENS": self.span,
            "LIST_TILES": self.tiles,
            "BLOCK_M": domain.block_m,
            "BLOCK_N": domain.block_n,
        }

    @cached_property
    def built(self) -> tuple[Walks, int, int]:
        """The walks, NL and NE."""
        domain = self.domain
        NL, table = self.cut
        if domain.indices is None:
            return Walks(None, None, None, table, domain.cu_q, domain.cu_k), NL, 0
        B, _, H, NM, NB = domain.indices.shape
        C = self.classes
        H *= domain.classes // C
        NE = max(1, min(self.rows * C * NB, cdiv(domain.S, domain.block_n)))
        wide = next_power_of_2(self.rows * C * NB)
        entries = domain.indices.new_empty(B, H, NL, NE)
        bits = torch.empty_like(entries) if self.members else None
        lengths = domain.indices.new_empty(B, H, NL, 2)
        _lists_kernel[(B * H * NL,)](
            domain.indices.contiguous(),
            domain.counts.contiguous(),
            entries,
            bits,
            lengths,
            table,
            domain.row_starts(domain.block_m),
            domain.cu_q,
            domain.cu_k,
            domain.T,
            domain.S,
            H,
            NM,
            NB,
            NL,
            NE,
            domain.window or 0,
            C=C,
            ROWS=self.rows,
            BLOCK_M=domain.block_m,
            BLOCK_N=domain.block_n,
            WHOLE=next_power_of_2(domain.block_n) == domain.block_n,
            PACKED=domain.packed,
            WINDOWED=domain.window is not None,
            MEMBERS=self.members,
            WIDE=wide,
            DOUBLINGS=(self.rows * C - 1).bit_length(),
            num_warps=min(max(wide // 128, 1), 16),
        )
        return Walks(entries, bits, lengths, table, domain.cu_q, domain.cu_k), NL, NE


def _starts(bounds: Tensor, size: int) -> Tensor:
    pieces = (bounds.diff() + size - 1) // size
    return torch.nn.functional.pad(pieces.cumsum(0, dtype=torch.int32), (1, 0))


@triton.jit(do_not_specialize=["T", "S", "NM", "NB", "NL", "NE", "window"])
def _lists_kernel(
    indices,
    counts,
    entries,
    bits,
    lengths,
    table,
    row_starts,
    cu_q,
    cu_k,
    T,
    S,
    H,
    NM,
    NB,
    NL,
    NE,
    window,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MEMBERS: tl.constexpr,
    WIDE: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    """One program builds one list of at most WIDE entries: sorted, so that equal blocks meet and merge."""
    pid = tl.program_id(0).to(tl.int64)
    i_list = pid % NL
    i_bh = pid // NL
    own, sequence, _, Tq, _, Sk = sequence_of(i_list, table, cu_q, cu_k, T, S, PACKED)
    row = own * ROWS
    first = row * BLOCK_M
    rows = tl.maximum(tl.cdiv(tl.minimum(Tq - first, ROWS * BLOCK_M), BLOCK_M), 0)
    pos_first = Sk - Tq + first
    pos_last = tl.minimum(pos_first + ROWS * BLOCK_M, Sk) - 1
    if PACKED:
        row += tl.load(row_starts + sequence)
    n_entries = tl.maximum(tl.minimum(rows, NM - row), 0) * C * NB
    row = ((i_bh // H) * C * H + i_bh % H) * NM + row  # of class 0, over all batches and heads

    f = tl.arange(0, WIDE)
    who = tl.minimum(f // NB, ROWS * C - 1)  # both classes of a row after one another
    at = row + (who % C) * (H * NM.to(tl.int64)) + who // C
    listed = f < n_entries
    listed = listed & (f % NB < tl.load(counts + at, mask=listed, other=0))
    block = tl.load(indices + at * NB + f % NB, mask=listed, other=-1)
    keep = (block >= 0) & (block < tl.cdiv(Sk, BLOCK_N))
    start = tl.where(keep, block, 0) * BLOCK_N
    keep = keep & (start <= pos_last)
    if WINDOWED:
        keep = keep & (start + BLOCK_N > pos_first - window + 1)
    block = tl.where(keep, block, NOTHING)
    order = tl.sort(block.to(tl.int64) * (ROWS * C) + who)
    block = (order // (ROWS * C)).to(tl.int32)
    if MEMBERS:
        chosen = 1 << (order % (ROWS * C)).to(tl.int32)
        for i in tl.static_range(DOUBLINGS):  # the first of equal blocks collects the bits of those behind it
            behind = tl.minimum(f + (1 << i), WIDE - 1)
            chosen |= tl.where(tl.gather(block, behind, 0) == block, tl.gather(chosen, behind, 0), 0)
    before = tl.gather(block, tl.maximum(f - 1, 0), 0)
    keep = (block != NOTHING) & ((block != before) | (f == 0))
    start = tl.where(keep, block, 0) * BLOCK_N
    clear = keep & WHOLE & (start + BLOCK_N - 1 <= pos_first)
    if WINDOWED:
        clear = clear & (start > pos_last - window)
    masked = keep & (clear == 0)
    n_clear = tl.sum(clear.to(tl.int32), 0)
    at = tl.where(clear, tl.cumsum(clear.to(tl.int32), 0), n_clear + tl.cumsum(masked.to(tl.int32), 0)) - 1
    tl.store(entries + pid * NE + at, block, mask=keep)
    if MEMBERS:
        tl.store(bits + pid * NE + at, chosen, mask=keep)
    tl.store(lengths + 2 * pid, n_clear)
    tl.store(lengths + 2 * pid + 1, n_clear + tl.sum(masked.to(tl.int32), 0))
