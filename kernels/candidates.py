"""Rows of queries that choose key blocks: where they stand, which blocks are their candidates, how they fill tiles.

The candidates of a row are the blocks that end before its first token, at key position p: ⌊p / block_n⌋ of them. A tile
holds query vectors, tokens × heads of one group: those of one row, of a *part* of a long row, or of several short rows.
The rows of one batch entry (or packed sequence) that share a tile are a *unit*; units are counted over all batch
entries, and are scored and ranked a chunk at a time.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain
from .primitives import sequence_of
from .tiles import cdiv, next_power_of_2


class Bounds(NamedTuple):
    """Where sequences begin and end, in device memory; all None where every batch entry has T queries and S keys."""

    table: Tensor | None  # int32 [units, 2]: packed, the sequence of each unit and its number there
    lengths: Tensor | None  # int32 [B], keys
    cu_q: Tensor | None  # int32 [N + 1]
    cu_k: Tensor | None  # int32 [N + 1]
    row_starts: Tensor | None  # int32 [N + 1]: packed, rows before each sequence
    summary_starts: Tensor | None  # int32 [N + 1]: packed, summaries before each sequence


class Form(NamedTuple):
    """What kernels are compiled for. Tiles hold `tile_*` heads and tokens per row, powers of two."""

    H: int
    classes: int
    heads: int  # query vectors of one token, class and group that are scored
    step: int  # heads of q from one of them to the next
    averages: bool  # a vector is the mean of a pair
    tokens: int  # the most of a row that score
    block_m: int
    block_n: int
    D: int
    tile_heads: int
    tile_tokens: int
    rows: int  # that share a tile
    parts: int  # tiles that share a row, along its heads and along its tokens

    @property
    def row_vectors(self) -> int:
        return self.tile_tokens * self.tile_heads

    @property
    def vectors(self) -> int:
        return self.rows * self.row_vectors

    @property
    def counted(self) -> int:
        """Vectors of a row that can count, a power of two; those behind fill the tile for the tensor cores alone."""
        return min(next_power_of_2(self.tokens), self.tile_tokens) * self.tile_heads

    @property
    def head_chunks(self) -> int:
        return -(-self.heads // self.tile_heads)

    @property
    def of_rows(self) -> "Form":
        """What matters once there are scores, so that other kernels are not compiled again for the rest."""
        return self._replace(heads=0, step=0, averages=False, tokens=0, D=0, tile_heads=0, tile_tokens=0, parts=0)


class Unit(NamedTuple):
    """Of one unit: batch entry, number inside its sequence, sequence, first query, queries and keys."""

    batch: tl.tensor
    own: tl.tensor
    sequence: tl.tensor
    q0: tl.tensor
    Tq: tl.tensor
    Sk: tl.tensor


@dataclass(frozen=True)
class Choice:
    """One call of `select_blocks`: `S` keys, or `lengths` int32 `[B]` of them; NC summaries per batch entry; `cu_q`,
    `cu_k` int32 `[N + 1]` bound packed sequences.
    """

    B: int
    T: int
    S: int
    H: int
    G: int  # query heads per group
    D: int
    NC: int
    mode: str
    first_only: bool  # a row's first token alone scores
    block_m: int
    block_n: int
    lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None

    @property
    def sequences(self) -> int:
        """Per batch entry: 1 unless packed."""
        return 1 if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def NM(self) -> int:
        """Rows of a batch entry. How many packed sequences have is known to the device alone: at most so many, and
        the last of these may list nothing.
        """
        return most_rows(self.T, self.block_m, self.sequences)

    def form(self, most_vectors: int, most_bytes: int) -> Form:
        """Fills tiles of up to `most_vectors`, with no more rows than have their scores in `most_bytes`."""
        classes = 2 if self.mode == "per_class" else 1
        heads = self.G if self.mode == "per_head" else self.G // 2
        tokens = 1 if self.first_only else min(self.block_m, self.T)
        typical = cdiv(self.T, self.sequences)  # tokens of a sequence
        tile_heads = min(next_power_of_2(heads), most_vectors)
        tile_tokens = min(next_power_of_2(min(tokens, typical)), most_vectors // tile_heads)
        parts = cdiv(heads, tile_heads) * cdiv(tokens, tile_tokens)
        rows = 1
        if parts == 1:
            rows = min(most_vectors // (tile_heads * tile_tokens), next_power_of_2(cdiv(typical, self.block_m)))
            while rows > 1 and 4 * rows * classes * self.H * self.NC > most_bytes:
                rows //= 2
        return Form(
            H=self.H,
            classes=classes,
            heads=heads,
            step=1 if self.mode == "per_head" else 2,
            averages=self.mode == "pair_mean",
            tokens=tokens,
            block_m=self.block_m,
            block_n=self.block_n,
            D=self.D,
            tile_heads=tile_heads,
            tile_tokens=max(tile_tokens, 16 // (tile_heads * rows)),  # tensor cores take no fewer
            rows=rows,
            parts=parts,
        )

    def units(self, rows: int) -> tuple[int, Bounds]:
        """How many units of so many rows a batch entry has, and the bounds of all."""
        domain = self._domain
        units, table = domain.pieces(rows * self.block_m)
        bounds = Bounds(
            table, self.lengths, self.cu_q, self.cu_k, domain.row_starts(self.block_m), self._summary_starts
        )
        return units, bounds

    @cached_property
    def _domain(self) -> Domain:
        sizes = self.B, self.T, self.S, self.H
        return Domain(*sizes, None, None, None, self.block_m, self.block_n, self.cu_q, self.cu_k)

    @cached_property
    def _summary_starts(self) -> Tensor | None:
        if self.cu_k is None:
            return None
        return torch.nn.functional.pad((self.cu_k.diff() // self.block_n).cumsum(0, dtype=torch.int32), (1, 0))


def most_rows(T: int, block_m: int, sequences: int) -> int:
    """The most rows that so many sequences of T tokens in all can have."""
    return (T + sequences * (block_m - 1)) // block_m


@triton.jit
def unit_of(u, bounds, T, S, NL):
    """Unit `u` of NL per batch entry."""
    batch = u // NL
    packed: tl.constexpr = bounds.cu_q is not None
    own, sequence, q0, Tq, _, Sk = sequence_of(u % NL, bounds.table, bounds.cu_q, bounds.cu_k, T, S, packed)
    if bounds.lengths is not None:
        Sk = tl.load(bounds.lengths + batch)
    return Unit(batch, own, sequence, q0, Tq, Sk)


@triton.jit
def candidates_of(row, unit, NC, FORM: tl.constexpr):
    """How many candidates each row has; 0 where it begins before its sequence's first key."""
    return tl.minimum(tl.maximum(unit.Sk - unit.Tq + row * FORM.block_m, 0) // FORM.block_n, NC)


@triton.jit
def reach(unit, NC, FORM: tl.constexpr):
    """Candidates of a unit's first row, and of its last, which has the most; 0 where there is no row."""
    rows = tl.cdiv(unit.Tq, FORM.block_m)
    first = unit.own * FORM.rows
    last = tl.minimum(first + FORM.rows, rows) - 1
    most = candidates_of(last, unit, NC, FORM)
    return candidates_of(first, unit, NC, FORM), tl.where(first < rows, most, 0)


@triton.jit
def free_of(row, unit, NC, sink, local, blocks, FORM: tl.constexpr):
    """Of a row: its candidates n; low and high, the candidates low … high − 1 being free, the others forced; how many
    free ones its budget of `blocks` has room for; the first block that it overlaps, and how many.
    """
    position = unit.Sk - unit.Tq + row * FORM.block_m
    last = tl.minimum(position + FORM.block_m, unit.Sk) - 1
    first_own = tl.maximum(position, 0) // FORM.block_n
    overlapped = tl.where(last < 0, 0, tl.maximum(last, 0) // FORM.block_n - first_own + 1)
    n = candidates_of(row, unit, NC, FORM)
    low = tl.minimum(sink, n)
    high = tl.maximum(tl.minimum(first_own - local + 1, n), low)
    return n, low, high, blocks - overlapped - (n - (high - low)), first_own, overlapped
