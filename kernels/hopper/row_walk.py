"""Which query rows a block of keys walks, as the Hopper kernel of dk and dv takes them: in tiles of ROWS vectors.

A tile is TOKENS × HEADS: tokens of one or several rows of a selection, and output heads of one GQA group. Rows shorter
than TOKENS are gathered, each into a box of BOX tokens; longer rows are cut into parts. Tiles whose queries may lie
before some of the keys come first, they are masked; where the classes have lists of their own, those of both come
before the others. Every warp counts tiles in the same way, and finds by itself what a tile holds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from ..key_gradients import rows_before
from ..tiles import cdiv, next_power_of_2
from .walk import NOWHERE

ROWS = tl.constexpr(64)  # vectors of a tile: output heads × tokens


@dataclass(frozen=True)
class Form:
    """What the compiler is told of a call. G and HEADS count output heads."""

    D: int
    G: int  # of a group
    DIFF: bool
    C: int  # classes with lists of their own
    LISTS: bool
    PACKED: bool
    WINDOWED: bool
    BLOCK_M: int
    KEYS: int  # of a program, and of a block in the lists
    SHARED: bool = False  # whether programs may share a block's list

    @property
    def EACH(self) -> int:
        """Query heads of an output head."""
        return 2 if self.DIFF else 1

    @property
    def PAIRED(self) -> bool:
        """Signal and noise at once."""
        return self.DIFF and self.C == 1

    @property
    def HALVES(self) -> int:
        """Classes of a tile."""
        return 2 if self.PAIRED else 1

    @property
    def HEADS(self) -> int:
        return min(next_power_of_2(self.G), ROWS.value)

    @property
    def CHUNKS(self) -> int:
        """Tiles that share the heads of a group."""
        return cdiv(self.G, self.HEADS)

    @property
    def TOKENS(self) -> int:
        return ROWS.value // self.HEADS

    @property
    def BOX(self) -> int:
        """Tokens that follow one another in a tile."""
        return min(next_power_of_2(self.BLOCK_M), self.TOKENS) if self.LISTS else self.TOKENS

    @property
    def BOXES(self) -> int:
        return self.TOKENS // self.BOX

    @property
    def PARTS(self) -> int:
        """Tiles of a row."""
        return cdiv(self.BLOCK_M, self.TOKENS) if self.LISTS else 1


class Walk(NamedTuple):
    rows: tl.tensor  # of the list, from the first that is walked; without lists nothing
    first: tl.tensor  # without lists: the first token that is walked
    count: tl.tensor  # rows, or tokens
    row0: tl.tensor  # first row of the sequence
    tokens: tl.tensor  # of the sequence
    tiles: tl.tensor
    masked: tl.tensor  # how many of them, at the beginning, need a mask


@triton.jit
def list_of(offsets, i_block, NN):
    """Where the list of a block begins, and how long it is; of block NN, which does not exist, it is empty."""
    begin = tl.load(offsets + i_block)
    end = tl.load(offsets + tl.minimum(i_block + 1, NN))
    return begin, end - begin


@triton.jit
def row_walk(rows, low, high, span, form: tl.constexpr):
    """The walk of a block's keys over entries low … high − 1 of a list, or over all tokens that see them. The span is
    the sequence's first row and its tokens, the first key and the end of the keys, the key position of the first token,
    and the window.
    """
    row0, tokens, key_first, block_end, ahead, window = span
    if form.LISTS:
        STEP: tl.constexpr = form.BOXES
        low = rows_before(rows, low, high, row0 + tl.maximum(key_first - ahead, 0) // form.BLOCK_M)
        clear = rows_before(rows, low, high, row0 + tl.cdiv(tl.maximum(block_end - 1 - ahead, 0), form.BLOCK_M))
    else:
        STEP: tl.constexpr = form.TOKENS
        low = tl.maximum(key_first - ahead, 0)
        high = tokens
        if form.WINDOWED:
            high = tl.minimum(high, tl.maximum(block_end - 1 + window - ahead, low))
        clear = tl.minimum(tl.maximum(block_end - 1 - ahead, low), high)
    high = tl.where(key_first < block_end, tl.maximum(high, low), low)
    tiles = tl.cdiv(high - low, STEP) * (form.PARTS * form.CHUNKS)
    if form.WINDOWED:
        masked = tiles
    else:
        clear = tl.maximum(tl.minimum(clear, high), low)
        masked = tl.minimum(tl.cdiv(clear - low, STEP) * (form.PARTS * form.CHUNKS), tiles)
    if form.LISTS:
        return Walk(rows + low, 0, high - low, row0, tokens, tiles, masked)
    else:
        return Walk(0, low, high - low, row0, tokens, tiles, masked)


@triton.jit
def tiles_of(walks, form: tl.constexpr):
    """Of all classes: how many tiles, and how many of them need a mask."""
    tiles = walks[0].tiles
    masked = walks[0].masked
    if form.C == 2:
        tiles += walks[1].tiles
        masked += walks[1].masked
    return tiles, masked


@triton.jit
def class_of(walks, i, form: tl.constexpr):
    """Whether tile i is one of the noise class, and its number in the walk of its class."""
    if form.C == 1:
        noise = i < 0
    else:
        masked = walks[0].masked
        both = masked + walks[1].masked
        noise = tl.where(i < both, i >= masked, i - both >= walks[0].tiles - masked)
        own = tl.where(i < both, i - masked, i - walks[0].tiles)
        other = tl.where(i < both, i, i - walks[1].masked)
        i = tl.where(noise, own, other)
    return noise, i


@triton.jit
def tokens_of(walks, noise, i, local, form: tl.constexpr):
    """Tokens, in their sequence, at the places `local` (0 … TOKENS − 1) of tile i of a class; NOWHERE if there is none.

    Also the first of the tile's heads in the group.
    """
    chunk = i % form.CHUNKS
    i = i // form.CHUNKS
    walk = walks[0]
    rows = walk.rows
    count = walk.count
    if form.C == 2:
        rows = tl.where(noise, walks[1].rows, rows)
        count = tl.where(noise, walks[1].count, count)
    if form.LISTS:
        entry = i // form.PARTS * form.BOXES + local // form.BOX
        within = i % form.PARTS * form.TOKENS + local % form.BOX
        row = tl.load(rows + entry, mask=entry < count, other=0)
        t = (row - walk.row0) * form.BLOCK_M + within
        there = (entry < count) & (within < form.BLOCK_M) & (t < walk.tokens)
    else:
        t = i * form.TOKENS + local
        there = t < count
        t += walk.first
    return tl.where(there, t, NOWHERE), chunk * form.HEADS
