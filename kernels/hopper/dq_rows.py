"""Rows of a tile of dq: which token and output head each is, what of them waits in shared memory, where dq goes.

A tile is TOKENS × HEADS output heads of one GQA group, as in `queries.py`, but for the classes: what belongs to a pair
of heads, its dO and λ, is there once, and q, lse and δ once for each class. A consumer has ROWS output heads, with both
classes or one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..primitives import load_lse
from .queries import CONSUMERS, ROWS, TileForm


@dataclass(frozen=True)
class Form(TileForm):
    """What the compiler is told of a call. HEADS counts output heads: pairs, or those of ordinary attention, which are
    all signal.
    """

    OUTPUTS: int  # output heads of a group
    CLASS: str  # of a consumer: "both", "signal" or "noise"

    @property
    def BOTH(self) -> bool:
        return self.CLASS == "both"

    @property
    def APART(self) -> bool:
        """Each class has lists of its own."""
        return self.DIFF and self.CLASS in ("signal", "noise")

    @property
    def KEYS(self) -> int:
        return 64 if self.BOTH else 128

    @property
    def K_STAGES(self) -> int:
        """More than of V, whose tiles are left sooner; short tiles take no more room than long ones."""
        return 256 // self.KEYS

    @property
    def OPERANDS(self) -> int:
        """Tiles of queries: of each consumer and class."""
        return CONSUMERS.value * (2 if self.BOTH else 1)


class Rows(NamedTuple):
    """A tile of queries. Pointers stand at its first token and head."""

    q: tl.tensor
    do: tl.tensor
    lam_logit: tl.tensor
    lse: tl.tensor
    delta: tl.tensor
    dq: tl.tensor
    q_t: tl.tensor  # strides
    q_h: tl.tensor
    do_t: tl.tensor
    do_h: tl.tensor
    lam_t: tl.tensor
    lam_h: tl.tensor
    lse_h: tl.tensor
    dq_t: tl.tensor
    tokens: tl.tensor  # from here to the end of the list and of the sequence
    outputs: tl.tensor  # output heads from here to the end of the group
    pos: tl.tensor  # of the first token
    scale: tl.tensor


class Operands(NamedTuple):
    """What waits in shared memory, `[…, ROWS]`: q, lse in base 2 and δ by class and consumer, dO and λ by consumer."""

    q: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    lam: gl.shared_memory_descriptor


@gluon.jit
def new_operands(dtype: gl.constexpr, form: gl.constexpr):
    TILES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Operands(
        gl.allocate_shared_memory(dtype, [form.OPERANDS, ROWS, form.D], TILES),
        gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, form.D], TILES),
        gl.allocate_shared_memory(gl.float32, [form.OPERANDS, ROWS], NUMBERS),
        gl.allocate_shared_memory(gl.float32, [form.OPERANDS, ROWS], NUMBERS),
        gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS], NUMBERS),
    )


@gluon.jit
def rows_of(consumer: gl.constexpr, rows, layout: gl.constexpr, form: gl.constexpr):
    """Token and output head, from the tile's first, of this consumer's rows, and which there are."""
    row = consumer * ROWS + gl.arange(0, ROWS, layout)
    token = row // form.HEADS
    output = row % form.HEADS
    return token, output, (token < rows.tokens) & (output < rows.outputs)


@gluon.jit
def load_rows(consumer: gl.constexpr, first: gl.constexpr, last: gl.constexpr, rows, operands, form: gl.constexpr):
    """Brings the queries of classes first … last to shared memory, and what belongs to them."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // form.D, form.D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    NARROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dims = gl.arange(0, form.D, gl.SliceLayout(0, WIDE))
    token, output, live = rows_of(consumer, rows, gl.SliceLayout(1, WIDE), form)
    do_at = rows.do + (token.to(gl.int64) * rows.do_t + output.to(gl.int64) * rows.do_h)[:, None] + dims[None, :]
    operands.do.index(consumer).store(gl.load(do_at, mask=live[:, None], other=0.0))
    for c in gl.static_range(first, last + 1):
        head = (output * form.EACH + c).to(gl.int64)
        q_at = rows.q + (token.to(gl.int64) * rows.q_t + head * rows.q_h)[:, None] + dims[None, :]
        operands.q.index(consumer + (c - first) * CONSUMERS).store(gl.load(q_at, mask=live[:, None], other=0.0))
    token, output, live = rows_of(consumer, rows, NARROW, form)
    for c in gl.static_range(first, last + 1):
        at = (output * form.EACH + c).to(gl.int64) * rows.lse_h + token
        delta = gl.load(rows.delta + at, mask=live, other=0.0)
        operands.lse.index(consumer + (c - first) * CONSUMERS).store(load_lse(rows.lse + at, live))
        operands.delta.index(consumer + (c - first) * CONSUMERS).store(delta)
    if last == 1:
        lam_at = rows.lam_logit + token.to(gl.int64) * rows.lam_t + output.to(gl.int64) * rows.lam_h
        operands.lam.index(consumer).store(tl.sigmoid(gl.load(lam_at, mask=live, other=0.0).to(gl.float32)))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def store_gradients(sums, c: gl.constexpr, consumer: gl.constexpr, q_tile, rows, operands, form: gl.constexpr):
    """dq of the heads of class c, in wide pieces: by way of the tile of queries, which is no longer needed."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // form.D, form.D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    factor = gl.full([ROWS], rows.scale, gl.float32, ROW)
    if c == 1:
        factor *= -operands.lam.index(consumer).load(ROW)
    q_tile.store((sums * factor[:, None]).to(q_tile.dtype))
    token, output, live = rows_of(consumer, rows, gl.SliceLayout(1, WIDE), form)
    dims = gl.arange(0, form.D, gl.SliceLayout(0, WIDE))
    at = rows.dq + (token.to(gl.int64) * rows.dq_t + (output * form.EACH + c) * form.D)[:, None] + dims[None, :]
    gl.store(at, q_tile.load(WIDE), mask=live[:, None])
