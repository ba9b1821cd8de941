"""A ring of query tiles in shared memory: q and dO by the copy engine (TMA), what else is known of them by two warps.

As in `ring.py`, use i takes stage i % STAGES, `filled` completes when the copies and the warps are done, `free` when
every reader is. The engine returns zeros outside the tensor, and outside a packed sequence (see there how), so that
vectors that are missing to a whole tile weigh nothing, whatever stands in their place.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..primitives import load_lse, strides_of
from ..tiles import cdiv
from .ring import BOUND
from .row_walk import ROWS, Form, class_of, tokens_of
from .walk import NOWHERE

STAGES = gl.constexpr(3)
NOTERS = gl.constexpr(2)  # warps


class RowRing(NamedTuple):
    """Few allocations: each takes a register."""

    tiles: gl.shared_memory_descriptor  # of a stage: q, of signal and of noise or of the only class, then dO
    lines: gl.shared_memory_descriptor  # of a stage: lse and δ of each class, then the vectors' tokens
    barriers: gl.shared_memory_descriptor  # filled, then free


class Place(NamedTuple):
    """Where the copies find a group and a sequence."""

    i_b: tl.tensor
    i_h: tl.tensor
    H: tl.tensor
    q0: tl.tensor
    tokens: tl.tensor


def describe_vectors(x: Tensor, H: int, form: Form) -> TensorDescriptor:
    """Boxes of tokens × heads of one of H groups of x `[B, T, heads, D]`, as `fetch` takes them."""
    x = x.unflatten(2, (H, -1))
    aligned = x.data_ptr() % 16 == 0 and x.stride(4) == 1 and all(n % 8 == 0 and n for n in x.stride()[:4])
    if not aligned or (form.PACKED and x.stride(1) != H * x.stride(2)):
        x = x.clone(memory_format=torch.contiguous_format)
    shape, strides, box = list(x.shape), list(x.stride()), [1, form.BOX, 1, form.HEADS, form.D]
    if form.PACKED:  # the step to the sequence's end is a group, so that it may choose the group, too
        _, row, group, head, _ = strides
        shape = [2**31 - 1, 2**31 - 1, BOUND.value, *shape[3:]]
        strides = [2**34 - row, group, row, head, 1]
        box = [1, 1, *box[1:2], *box[3:]]
    return TensorDescriptor(x, shape, strides, box, gl.NVMMASharedLayout(128, 16, 5))


@gluon.jit
def new_row_ring(readers: gl.constexpr, dtype: gl.constexpr, form: gl.constexpr):
    TILES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = gl.allocate_shared_memory(dtype, [STAGES * (form.HALVES + 1), ROWS, form.D], TILES)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES * (form.HALVES * 2 + 1), ROWS], LINES)
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=2)
        mbarrier.init(barriers.index(STAGES + stage), count=readers)
    return RowRing(tiles, lines, barriers)


@gluon.jit
def await_free(ring, i):
    """Returns the stage of use i, once the readers of its last use have left."""
    stage = i % STAGES
    mbarrier.wait(ring.barriers.index(STAGES + stage), (i // STAGES & 1) ^ 1)
    return stage


@gluon.jit
def await_filled(ring, i):
    """Returns the stage of use i, once it is there."""
    stage = i % STAGES
    mbarrier.wait(ring.barriers.index(stage), i // STAGES & 1)
    return stage


@gluon.jit
def leave_stage(ring, stage):
    """This reader is done with it."""
    mbarrier.arrive(ring.barriers.index(STAGES + stage), count=1)


@gluon.jit
def tile_of_stage(ring, stage, part: gl.constexpr, form: gl.constexpr):
    """`[ROWS, D]`: q of the tile's first or second class, or dO as the last part."""
    return ring.tiles.index(stage * (form.HALVES + 1) + part)


@gluon.jit
def line_of_stage(ring, stage, part: gl.constexpr, form: gl.constexpr):
    """`[ROWS]`: lse and δ of the tile's first class, then of its second, or the tokens as the last part."""
    return ring.lines.index(stage * (form.HALVES * 2 + 1) + part)


@gluon.jit
def _copy(source, tile, starts, head, place, filled, form: gl.constexpr):
    """Starts to copy the boxes of one tile."""
    BOXES: gl.constexpr = form.BOXES
    for box in gl.static_range(BOXES):
        if form.PACKED:
            end = (place.q0 + place.tokens) * place.H + place.i_h
            at = [BOUND, end, BOUND - place.tokens + starts[box], head, 0]
            part = tile.reshape([1, 1, form.TOKENS, form.HEADS, form.D]).slice(box * form.BOX, form.BOX, dim=2)
        else:
            at = [place.i_b, starts[box], place.i_h, head, 0]
            part = tile.reshape([1, form.TOKENS, 1, form.HEADS, form.D]).slice(box * form.BOX, form.BOX, dim=1)
        tma.async_copy_global_to_shared(source, at, filled, part)


@gluon.jit
def fetch(ring, signal, noise, do, place, walks, tiles, form: gl.constexpr):
    """One warp: has the engine copy every tile."""
    BOXES: gl.constexpr = form.BOXES
    for i in range(tiles):
        is_noise, number = class_of(walks, i, form)
        starts = ()
        for box in gl.static_range(BOXES):
            start, head = tokens_of(walks, is_noise, number, box * form.BOX, form)
            starts += (start,)
        stage = await_free(ring, i)
        filled = ring.barriers.index(stage)
        mbarrier.expect(filled, (form.HALVES + 1) * ROWS * form.D * 2)
        q_tile = tile_of_stage(ring, stage, 0, form)
        if form.C == 2:
            if is_noise:
                _copy(noise, q_tile, starts, head, place, filled, form)
            else:
                _copy(signal, q_tile, starts, head, place, filled, form)
        else:
            _copy(signal, q_tile, starts, head, place, filled, form)
        if form.PAIRED:
            _copy(noise, tile_of_stage(ring, stage, 1, form), starts, head, place, filled, form)
        _copy(do, tile_of_stage(ring, stage, form.HALVES, form), starts, head, place, filled, form)


@gluon.jit
def annotate(ring, numbers, stride, walks, tiles, form: gl.constexpr):
    """NOTERS warps: note lse, δ and token of every vector. Those that are not there get lse = ∞, thus weights of 0.

    `numbers` stands at the group's first head of the sequence's first token, `stride` is from token to token.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [NOTERS], [0])
    row = gl.arange(0, ROWS, LANES)
    NUMBERS: gl.constexpr = form.HALVES * 2
    for i in range(tiles):
        is_noise, number = class_of(walks, i, form)
        token, first_head = tokens_of(walks, is_noise, number, row // form.HEADS, form)
        head = first_head + row % form.HEADS
        live = (token < NOWHERE) & (head < form.G)
        at = numbers + (token * stride + head * (form.EACH * 2))  # fits an int32: a larger q fits no GPU
        if form.C == 2:
            at += gl.where(is_noise, 2, 0)
        known = ()  # before the stage is free
        for part in gl.static_range(NUMBERS):
            known += (gl.load(at + part, mask=live, other=0.0 if part % 2 else float("inf")),)
        stage = await_free(ring, i)
        for part in gl.static_range(NUMBERS):
            line_of_stage(ring, stage, part, form).store(known[part])
        line_of_stage(ring, stage, NUMBERS, form).store(token.to(gl.float32, bitcast=True))
        mbarrier.arrive(ring.barriers.index(stage), count=1)


@triton.jit(do_not_specialize=["N", "T"])
def _numbers_kernel(
    numbers, lse, delta, lam_logit, lam_strides, N, T, HO: tl.constexpr, DIFF: tl.constexpr, ROWS: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < N
    head = i % HO
    b = i // HO // T
    t = i // HO % T
    if DIFF:
        at = (b * HO + head) * 2 * T + t
        lam_at = lam_logit + b * lam_strides.b + t * lam_strides.t + head * lam_strides.h
        lam = tl.sigmoid(tl.load(lam_at, mask=live, other=0.0).to(tl.float32))
        tl.store(numbers + 4 * i, load_lse(lse + at, live), mask=live)
        tl.store(numbers + 4 * i + 1, tl.load(delta + at, mask=live, other=0.0), mask=live)
        tl.store(numbers + 4 * i + 2, load_lse(lse + at + T, live) - tl.log2(lam), mask=live)
        tl.store(numbers + 4 * i + 3, tl.load(delta + at + T, mask=live, other=0.0), mask=live)
    else:
        at = (b * HO + head) * T + t
        tl.store(numbers + 2 * i, load_lse(lse + at, live), mask=live)
        tl.store(numbers + 2 * i + 1, tl.load(delta + at, mask=live, other=0.0), mask=live)


def numbers_of(lse: Tensor, delta: Tensor, lam_logit: Tensor | None) -> Tensor:
    """What `annotate` notes of each output head of each token, float32 `[B, T, HO, 2 or 4]`: lse in base 2, ∞ where
    nothing was seen, and δ; in differential attention then those of the noise half, with λ in its lse: λ P =
    exp2(logit − (lse − log2 λ)).
    """
    B, HQ, T = lse.shape
    diff = lam_logit is not None
    HO = HQ // 2 if diff else HQ
    numbers = torch.empty(B, T, HO, 4 if diff else 2, dtype=torch.float32, device=lse.device)
    N, rows = B * T * HO, 256
    strides = strides_of(lam_logit)
    _numbers_kernel[(cdiv(N, rows),)](numbers, lse, delta, lam_logit, strides, N, T, HO=HO, DIFF=diff, ROWS=rows)
    return numbers
