"""How queries lie in a tile of the Hopper kernels: which token and head each row is, and what each output row is.

A tile is TOKENS × HEADS query vectors of one GQA group, in as many parts as there are consumers, ROWS each. Heads of
both classes lie in slabs of sixteen rows, eight of signal over eight of noise of the same pairs: rows r and r + 8 of
the tensor cores' results are held by one thread, so that a pair meets without a message. Heads of one class, or of
ordinary attention, simply follow one another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .walk import Steps

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of a consumer


@dataclass(frozen=True)
class TileForm(Steps):
    """What the compiler is told of tiles of queries, whatever is computed for them; see `Lists.constants` and
    `Packing`.
    """

    D: int
    DIFF: bool
    LISTS: bool
    MEMBERS: bool
    PACKED: bool
    WINDOWED: bool
    LIST_TOKENS: int
    LIST_TILES: int
    BLOCK_M: int
    BLOCK_N: int
    TOKENS: int
    HEADS: int
    CHUNKS: int

    @property
    def EACH(self) -> int:
        """Query heads of an output head."""
        return 2 if self.DIFF else 1


@dataclass(frozen=True)
class Form(TileForm):
    """What the compiler is told of a call of the forward."""

    G: int  # query heads of a group
    HEADS_OF: str  # "both" classes, "signal" or "noise"
    C: int  # classes in one list
    ROOM: int  # powers of 2 by which sums of weights may leave 1; 0: maxima are followed from the start
    SAVE_LSE: bool
    SAVE_NOISE: bool

    @property
    def AHEAD(self) -> int:
        """Tiles by which logits run ahead of their softmax: 1 where there are registers for both."""
        return 1 if self.D == 64 else 0

    @property
    def STAGES(self) -> int:
        """Of each ring; as many bytes for heads of any size."""
        return 256 // self.D

    @property
    def PAIRED(self) -> bool:
        """Signal and noise in one tile."""
        return self.DIFF and self.HEADS_OF == "both"

    @property
    def OUTPUTS(self) -> int:
        """Output heads of a tile."""
        return self.HEADS // 2 if self.PAIRED else self.HEADS


class Queries(NamedTuple):
    """A tile of queries. Pointers stand at its first token and head."""

    q: tl.tensor
    lam_logit: tl.tensor
    o: tl.tensor
    o_noise: tl.tensor
    lse: tl.tensor
    q_t: tl.tensor  # strides
    q_h: tl.tensor
    lam_t: tl.tensor
    lam_h: tl.tensor
    o_t: tl.tensor
    lse_h: tl.tensor
    tokens: tl.tensor  # from here to the end of the list and of the sequence
    heads: tl.tensor  # query heads from here to the end of the group
    skipped: tl.tensor  # tokens of the list before this tile
    pos: tl.tensor  # of the first token
    scale_log2: tl.tensor


@gluon.jit
def rows_of(consumer: gl.constexpr, layout: gl.constexpr, form: gl.constexpr):
    """Token and query head, from the tile's first, of this consumer's rows."""
    row = gl.arange(0, ROWS, layout)
    if form.PAIRED:
        noise = row // 8 % 2
        row = consumer * (ROWS // 2) + row // 16 * 8 + row % 8
        return row // form.OUTPUTS, row % form.OUTPUTS * 2 + noise
    else:
        row += consumer * ROWS
        return row // form.OUTPUTS, row % form.OUTPUTS * form.EACH


@gluon.jit
def outputs_of(consumer: gl.constexpr, queries, layout: gl.constexpr, form: gl.constexpr):
    """Token and output head of this consumer's outputs, and which there are."""
    NUMBER: gl.constexpr = ROWS // 2 if form.PAIRED else ROWS
    row = consumer * NUMBER + gl.arange(0, NUMBER, layout)
    token = row // form.OUTPUTS
    head = row % form.OUTPUTS
    return token, head, (token < queries.tokens) & (head * form.EACH < queries.heads)


@gluon.jit
def signal_and_noise(x):
    """Signal and noise rows `[ROWS / 2, …]` of x `[ROWS, …]`."""
    if len(x.shape) == 1:
        signal, noise = x.reshape([ROWS // 16, 2, 8]).permute((0, 2, 1)).split()
        return signal.reshape([ROWS // 2]), noise.reshape([ROWS // 2])
    else:
        signal, noise = x.reshape([ROWS // 16, 2, 8, x.shape[1]]).permute((0, 2, 3, 1)).split()
        return signal.reshape([ROWS // 2, x.shape[1]]), noise.reshape([ROWS // 2, x.shape[1]])
