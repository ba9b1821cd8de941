"""dk and dv of block-sparse differential attention for Hopper, warp-specialised, in Gluon.

The formulas are those of `kernels/key_gradients.py`, a program again one block of keys. K and V stay in shared memory,
tiles of 64 pairs of query vectors come by (see `row_walk.py`), and each of a program's warps has one job:

    fetch      1 warp        has the copy engine (TMA) bring q of both classes and dO into a ring of tiles
    annotate   2 warps       note lse, δ and token of the tile's vectors beside it
    consumers  4 warps each  take 64 keys: logits and dP, weights, dv and dk, which stay in registers

Scores stand transposed, keys × queries, so that weights are operands of dv and dk as they leave the registers. Six
products make a tile of pairs: S of both classes, dP once, dv once, dk of both classes. In time, S and N logits of
signal and noise, P = dP, V and K what is added to dv and dk, ~ weights:

    consumer A     S P ~~~~~ N K ~~~~~ K V   S P ~~~~~ N K ~~~~~ K V
    consumer B           S P ~~~~~ N K ~~~~~ K V   S P ~~~~~ N K ~~~~~ K V
    tensor cores   A A   B B A A   B B A A   B B ...

Of a thread's 240 registers dk and dv take 128, dP and one class's logits 32 each, the rounded weights and dS of signal
16 each. So little else may live through the loop: signal and noise take turns, weights wait rounded for their
difference, and where the results go is found again at the end.

Blocks of 64 keys have one list for both consumers: each then takes every other tile, and their sums are added at the
end. A list longer than a multiprocessor's share of the work is cut, see `shares.py`. No order depends on time:
deterministic.

Source: FlashAttention-3 (Shah et al., arXiv 2407.08608) for the roles; `kernels/backward.py` for the formulas.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..domain import Domain
from ..primitives import LN2, LOG2E, sequence_of, strides_of, visible
from .operands import pack, unpack
from .row_ring import (
    NOTERS,
    Place,
    annotate,
    await_filled,
    describe_vectors,
    fetch,
    leave_stage,
    line_of_stage,
    new_row_ring,
    numbers_of,
    tile_of_stage,
)
from .row_walk import ROWS, Form, class_of, list_of, row_walk, tiles_of
from .shares import Shares, share_of, shares_of, sum_shares
from .walk import NOWHERE

CONSUMERS = gl.constexpr(2)
MINE = gl.constexpr(64)  # keys of a consumer


class Keys(NamedTuple):
    """The keys of a program. Pointers stand at the first of them."""

    k: tl.tensor
    v: tl.tensor
    k_t: tl.tensor  # strides
    v_t: tl.tensor
    first: tl.tensor  # counted as tokens are: the first query's own key is 0
    number: tl.tensor
    window: tl.tensor
    scale_log2: tl.tensor


class Blocks(NamedTuple):
    """What tells a program its block of keys."""

    shares: Shares | None
    table: tl.tensor | None
    cu_q: tl.tensor | None
    cu_k: tl.tensor | None
    T: tl.tensor
    S: tl.tensor
    BH: tl.tensor
    H: tl.tensor
    NN: tl.tensor
    X: tl.tensor


@triton.jit
def _block_of(pid, blocks, form: tl.constexpr):
    """Batch and head, block, its share of the list as entries and as slot, its sequence, and the end of its keys."""
    i_bh, i_block, begin, end, slot = share_of(pid, blocks.shares, blocks.X, blocks.BH, blocks.NN, form.SHARED)
    at = tl.minimum(i_block, blocks.NN - 1)
    own, sequence, q0, Tq, k0, Sk = sequence_of(
        at, blocks.table, blocks.cu_q, blocks.cu_k, blocks.T, blocks.S, form.PACKED
    )
    first = own * form.KEYS
    block_end = tl.where(i_block < blocks.NN, tl.minimum(first + form.KEYS, Sk), 0)
    return i_bh, i_block, begin, end, slot, sequence, q0, Tq, k0, Sk, first, block_end


@gluon.jit
def _store(dk, dv, begin: gl.constexpr, outputs, blocks, scale_log2, form: gl.constexpr):
    """Writes what one consumer has summed, from key `begin` of the program's on.

    The program's place is found anew: what is known since before the loop takes registers from it.
    """
    pid = gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    i_bh, _b, _e, _n, slot, _s, _q, _T, k0, _S, first, block_end = _block_of(pid, blocks, form)
    key = begin + gl.arange(0, MINE, gl.SliceLayout(1, dk.type.layout))
    dims = gl.arange(0, form.D, gl.SliceLayout(0, dk.type.layout))
    there = (first + key < block_end)[:, None]
    dk *= scale_log2 * LN2
    if form.SHARED and slot >= 0:
        part = blocks.shares.partial + slot.to(gl.int64) * (2 * form.KEYS * form.D) + (key * form.D)[:, None]
        part += dims[None, :]
        gl.store(part, dk, mask=there)
        gl.store(part + form.KEYS * form.D, dv, mask=there)
    else:
        row = (i_bh // blocks.H).to(gl.int64) * blocks.S + k0 + first + key
        row = row * blocks.H + i_bh % blocks.H
        at = (row * form.D)[:, None] + dims[None, :]
        gl.store(outputs[0] + at, dk.to(outputs[0].dtype.element_ty), mask=there)
        gl.store(outputs[1] + at, dv.to(outputs[1].dtype.element_ty), mask=there)


@gluon.jit
def _weights(logits, ring, stage, part: gl.constexpr, key, keys, CLEAR: gl.constexpr, form: gl.constexpr):
    """exp2(logits − lse), 0 where a query does not see a key."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, logits.type.layout)
    shift = line_of_stage(ring, stage, part, form).load(COLUMNS)
    weights = gl.exp2(logits * keys.scale_log2 - shift[None, :])
    if not CLEAR:
        token = line_of_stage(ring, stage, form.HALVES * 2, form).load(COLUMNS).to(gl.int32, bitcast=True)
        seen = visible(token[None, :], key[:, None], NOWHERE, keys.window, form.WINDOWED)
        weights = gl.where(seen, weights, 0.0)
    return weights


@gluon.jit
def _consume(consumer: gl.constexpr, keys, tiles, ring, hand, walks, outputs, blocks, form: gl.constexpr):
    D: gl.constexpr = form.D
    dtype: gl.constexpr = tiles.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    ALONE: gl.constexpr = form.KEYS == MINE  # each consumer takes every other tile, of the same keys
    STEP: gl.constexpr = CONSUMERS if ALONE else 1
    FIRST: gl.constexpr = 0 if ALONE else consumer * MINE
    TURN: gl.constexpr = consumer if ALONE else 0

    key = FIRST + gl.arange(0, MINE, gl.SliceLayout(1, WIDE))
    dims = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    there = (key < keys.number)[:, None]
    k_tile = tiles.index(consumer)
    v_tile = tiles.index(CONSUMERS + consumer)
    k_tile.store(gl.load(keys.k + (key.to(gl.int64) * keys.k_t)[:, None] + dims[None, :], mask=there, other=0.0))
    v_tile.store(gl.load(keys.v + (key.to(gl.int64) * keys.v_t)[:, None] + dims[None, :], mask=there, other=0.0))
    fence_async_shared()

    key = keys.first + FIRST + gl.arange(0, MINE, gl.SliceLayout(1, LOGITS))
    dk = gl.zeros([MINE, D], gl.float32, SUMS)
    dv = gl.zeros([MINE, D], gl.float32, SUMS)
    zeros = gl.zeros([MINE, ROWS], gl.float32, LOGITS)
    number, masked = tiles_of(walks, form)
    for CLEAR in gl.static_range(2):
        for i in range(masked + (masked + TURN) % STEP if CLEAR else TURN, number if CLEAR else masked, STEP):
            stage = await_filled(ring, i)
            q_tile = tile_of_stage(ring, stage, 0, form)
            do_tile = tile_of_stage(ring, stage, form.HALVES, form)
            logits = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dweights = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            logits, dweights = warpgroup_mma_wait(0, deps=(logits, dweights))
            weights = _weights(logits, ring, stage, 0, key, keys, CLEAR, form)
            if form.C == 2:
                is_noise, _number = class_of(walks, i, form)
                weights = weights * gl.where(is_noise, -1.0, 1.0)
            delta = line_of_stage(ring, stage, 1, form).load(COLUMNS)
            dlogits = pack(weights * (dweights - delta[None, :]), dtype)
            if form.PAIRED:
                signal = pack(weights, dtype)
                noise_tile = tile_of_stage(ring, stage, 1, form)
                noise_logits = warpgroup_mma(k_tile, noise_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
                dk = warpgroup_mma(unpack(dlogits, dtype, OPERAND), q_tile, dk, is_async=True)
                noise_logits, dk = warpgroup_mma_wait(0, deps=(noise_logits, dk))
                noise = _weights(noise_logits, ring, stage, 2, key, keys, CLEAR, form)
                noise_delta = line_of_stage(ring, stage, 3, form).load(COLUMNS)
                noise_dlogits = pack(noise * (noise_delta[None, :] - dweights), dtype)
                both = pack(unpack(signal, dtype, LOGITS).to(gl.float32) - noise, dtype)
                dk = warpgroup_mma(unpack(noise_dlogits, dtype, OPERAND), noise_tile, dk, is_async=True)
            else:
                both = pack(weights, dtype)
                dk = warpgroup_mma(unpack(dlogits, dtype, OPERAND), q_tile, dk, is_async=True)
            dv = warpgroup_mma(unpack(both, dtype, OPERAND), do_tile, dv, is_async=True)
            dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
            leave_stage(ring, stage)

    # the second consumer's sums go to the first, in place of the tiles
    handed = ring.tiles._reinterpret(gl.float32, [2, MINE, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if consumer == 1:
        mbarrier.wait(hand.index(0), 0)
        handed.index(0).store(dk)
        handed.index(1).store(dv)
        mbarrier.arrive(hand.index(1), count=1)
    else:
        mbarrier.arrive(hand.index(0), count=1)
        if not ALONE:
            _store(dk, dv, 0, outputs, blocks, keys.scale_log2, form)
        mbarrier.wait(hand.index(1), 0)
        other_dk = handed.index(0).load(SUMS)
        other_dv = handed.index(1).load(SUMS)
        if ALONE:
            _store(dk + other_dk, dv + other_dv, 0, outputs, blocks, keys.scale_log2, form)
        else:
            _store(other_dk, other_dv, MINE, outputs, blocks, keys.scale_log2, form)


@gluon.jit(do_not_specialize=["T", "S", "NN", "NR", "X", "window"])
def _key_gradients_kernel(
    signal,
    noise,
    do,
    k,
    v,
    numbers,
    dk,
    dv,
    offsets,
    rows,
    row_starts,
    shares,
    table,
    cu_q,
    cu_k,
    k_strides,
    v_strides,
    T,
    S,
    BH,
    H,
    NN,
    NR,
    X,
    window,
    scale_log2,
    form: gl.constexpr,
):
    blocks = Blocks(shares, table, cu_q, cu_k, T, S, BH, H, NN, X)
    pid = gl.program_id(0)
    i_bh, i_block, begin, end, _slot, sequence, q0, Tq, k0, Sk, first, block_end = _block_of(pid, blocks, form)
    i_b = (i_bh // H).to(gl.int64)
    i_h = (i_bh % H).to(gl.int64)
    ahead = Sk - Tq
    row0 = 0
    if form.PACKED and form.LISTS:
        row0 = gl.load(row_starts + sequence)
    span = row0, Tq, first, block_end, ahead, window
    if form.LISTS:
        at = i_b * form.C * H + i_h
        offset, length = list_of(offsets + at * (NN + 1), i_block, NN)
        walk = row_walk(rows + at * NR + offset, gl.minimum(begin, length), gl.minimum(end, length), span, form)
        if form.C == 2:
            begin, end = gl.maximum(begin - length, 0), gl.maximum(end - length, 0)
            at += H
            offset, length = list_of(offsets + at * (NN + 1), i_block, NN)
            other = row_walk(rows + at * NR + offset, gl.minimum(begin, length), gl.minimum(end, length), span, form)
            walks = (walk, other)
        else:
            walks = (walk,)
    else:
        walks = (row_walk(0, 0, 0, span, form),)

    token = k0 + first
    keys = Keys(
        k + i_b * k_strides.b + token * k_strides.t + i_h * k_strides.h,
        v + i_b * v_strides.b + token * v_strides.t + i_h * v_strides.h,
        k_strides.t,
        v_strides.t,
        first - ahead,
        block_end - first,
        window,
        scale_log2,
    )
    EACH: gl.constexpr = 2 * form.EACH
    numbers_at = numbers + ((i_b * T + q0) * H + i_h) * (form.G * EACH)
    place = Place(i_b.to(gl.int32), i_h.to(gl.int32), H, q0.to(gl.int32), Tq)
    dtype: gl.constexpr = k.dtype.element_ty
    tiles = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, MINE, form.D], gl.NVMMASharedLayout(128, 16, 2))
    ring = new_row_ring(CONSUMERS if form.KEYS > MINE else 1, dtype, form)
    hand = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(hand.index(0), count=1)
    mbarrier.init(hand.index(1), count=1)
    fence_async_shared()
    number, _masked = tiles_of(walks, form)
    gl.warp_specialize(
        [
            (_consume, (0, keys, tiles, ring, hand, walks, (dk, dv), blocks, form)),
            (_consume, (1, keys, tiles, ring, hand, walks, (dk, dv), blocks, form)),
            (fetch, (ring, signal, noise, do, place, walks, number, form)),
            (annotate, (ring, numbers_at, H * (form.G * EACH), walks, number, form)),
        ],
        worker_num_warps=[4, 1, NOTERS],
        worker_num_regs=[240, 24, 24],  # and 240 for the first, which is this program's own
    )


def obstacle(q: Tensor, k: Tensor, lam_logit: Tensor | None, domain: Domain) -> str | None:
    """What keeps this kernel from such a call that the Hopper forward takes, in words; None if nothing does."""
    form = _form_of(q, k, lam_logit, domain)
    if form.BOX * form.HEADS < 8:
        return f"its copies take at least 8 vectors, not {form.BOX} tokens of {form.HEADS} heads"
    return None


def _form_of(q: Tensor, k: Tensor, lam_logit: Tensor | None, domain: Domain) -> Form:
    listed, diff = domain.indices is not None, lam_logit is not None
    return Form(
        D=q.shape[3],
        G=q.shape[2] // (2 if diff else 1) // k.shape[2],
        DIFF=diff,
        C=domain.classes,
        LISTS=listed,
        PACKED=domain.packed,
        WINDOWED=domain.window is not None,
        BLOCK_M=domain.block_m,
        KEYS=domain.block_n if listed else CONSUMERS.value * MINE.value,
    )


def key_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    domain: Domain,
    transposed: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dk and dv, like k and v; arguments as the portable `key_gradients` takes them, without `obstacle`."""
    B, T, _, D = q.shape
    S, H = k.shape[1:3]
    form = _form_of(q, k, lam_logit, domain)
    KEYS = form.KEYS
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    NN, table = domain.pieces(KEYS, keys=True)
    offsets, rows = transposed or (None, None)
    shares = None if rows is None else shares_of(offsets, rows.numel(), max(1, form.BOXES // form.PARTS), KEYS, D)
    X = 0 if shares is None else len(shares.blocks)
    form = replace(form, SHARED=X > 0)
    sources = [describe_vectors(x, H, form) for x in ((q[:, :, 0::2], q[:, :, 1::2]) if form.DIFF else (q, q))]
    _key_gradients_kernel[(X + NN * B * H,)](
        *sources,
        describe_vectors(do, H, form),
        k,
        v,
        numbers_of(lse, delta, lam_logit),
        dk,
        dv,
        offsets,
        rows,
        domain.row_starts(domain.block_m) if form.LISTS else None,
        shares,
        table,
        domain.cu_q,
        domain.cu_k,
        strides_of(k),
        strides_of(v),
        T,
        S,
        B * H,
        H,
        NN,
        0 if rows is None else rows.shape[-1],
        X,
        domain.window or 0,
        scale * LOG2E.value,
        form=form,
        num_warps=4,
    )
    if shares is not None:
        sum_shares(shares, dk, dv, NN, table, domain.cu_k)
    return dk, dv
