"""Fused forward of block-sparse differential attention for Hopper, warp-specialised, in Gluon.

The same tiles, walks and formulas as `kernels/forward.py`, but each of a program's warps has one job:

    producer   1 warp        follows the walk and has the copy engine (TMA) bring tiles of K and V into rings
    consumers  4 warps each  take 64 of the tile's 128 query vectors: logits, softmax, weighted sum, output

Products run on their own (wgmma) while a consumer goes on: it asks for the logits of the next tile before it asks for
the weighted sum of this one, and waits for the logits alone. Two consumers keep the tensor cores busy: while one is at
its softmax, the other's products run. In time, for heads of 128, S logits, O weighted sum, ~ softmax:

    producer      K0 K1 V0    K2 V1    K3 V2    ...              each as soon as its stage of the ring is free
    consumer A       S0 ~~~~~ S1 O0 ~~~~~ S2 O1 ~~~~~ S3 O2 ...
    consumer B          S0 ~~~~~ S1 O0 ~~~~~ S2 O1 ~~~~~ S3 O2 ...
    tensor cores     A  B     A  A  B  B  A  A  B  B  A  A  ...

Heads of 64 leave registers for two tiles of logits. There logits run AHEAD: those of the next tile are computed during
the softmax of this one, which waits for nothing, and the producer brings one more K at the end, that nobody looks at.

Weights are relative to the greatest logit of a row's first tile. To follow the greatest so far, as online softmax does,
takes a third of a step's instructions and messages between threads, and bfloat16, which has the exponents of float32,
loses nothing while sums stay within 2^±ROOM (and values within 2^±60). Should the sum of a row leave that, as logits
are far above all of its first tile, or far below 0 with none seen there, or as it sees nothing at all, the consumers
agree (`ballot.py`) to walk the tile again with online softmax: right, at more than twice the time, and in other last
bits for the row's neighbours. float16 has no such room and takes online softmax from the start.

Registers decide the order of a step. Of a thread's 240, heads of 128 give the sum 64, the logits 64, the rounded
weights 32, and in a walk without online softmax the queries 32; the weights before they are rounded would take another
64. So weights cross the end of a step rounded (see `operands.py`). And they are rounded after the wait for the sum that
reads the pairs before: else the compiler waits for every single product, and says so (ptxas C7513).

Signal and noise of a pair stand eight rows apart: the tensor cores give rows r and r + 8 to one thread, which subtracts
without a message. Where each class has its own list and fills tiles alone, one launch computes the noise heads, and a
second the signal heads, from which it subtracts what the first has written.

Source: FlashAttention-3 (Shah et al., arXiv 2407.08608) for the roles and the order; FlashDecoding++ (Hong et al.,
arXiv 2311.01282) for softmax without a maximum that moves; microsoft/unilm's Diff-Transformer-V2 for the formula.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..domain import Domain, Lists
from ..primitives import LN2, LOG2E, new_outputs, sequence_of, softmax_step, strides_of, tile_of
from ..tiles import fixed_packing, next_power_of_2
from .ballot import new_ballot, outcome, vote
from .operands import pack, unpack
from .queries import CONSUMERS, ROWS, Form, Queries, outputs_of, rows_of, signal_and_noise
from .ring import describe_keys, fill, filled_tile, leave, new_ring
from .walk import begin_walk, bits_of, starts_of, unchosen_hidden, unseen_hidden

ROOM = {torch.bfloat16: 64, torch.float16: 0}  # see Form


@gluon.jit
def _first_uses(turn: gl.constexpr, walk, form: gl.constexpr):
    """The numbers of a turn's first uses of the rings of K and V; turn 0 is the first walk, 1 the second."""
    return turn * (walk.tiles + form.AHEAD), turn * walk.tiles


@gluon.jit
def _bring(k_source, v_source, k_ring, v_ring, turn: gl.constexpr, walk, i_b, i_h, k0, Sk, form: gl.constexpr):
    """K a tile ahead of V, in the order in which the consumers leave them."""
    k_use, v_use = _first_uses(turn, walk, form)
    starts = starts_of(walk, 0, form)
    fill(k_ring, k_use, k_source, starts, i_b, i_h, k0, Sk, form)
    for i in range(walk.tiles):
        following = starts_of(walk, i + 1, form)
        if form.AHEAD or i + 1 < walk.tiles:
            fill(k_ring, k_use + i + 1, k_source, following, i_b, i_h, k0, Sk, form)
        fill(v_ring, v_use + i, v_source, starts, i_b, i_h, k0, Sk, form)
        starts = following


@gluon.jit
def _produce(k_source, v_source, k_ring, v_ring, astray, walk, i_b, i_h, k0, Sk, form: gl.constexpr):
    _bring(k_source, v_source, k_ring, v_ring, 0, walk, i_b, i_h, k0, Sk, form)
    if form.ROOM and outcome(astray, 1):
        _bring(k_source, v_source, k_ring, v_ring, 1, walk, i_b, i_h, k0, Sk, form)


@gluon.jit
def _sums_of_threads(x):
    """`[ROWS, 8]`: sums of the columns of x `[ROWS, N]` that are equal mod 8, which one thread holds: no messages."""
    return gl.sum(x.reshape([ROWS, x.shape[1] // 8, 8]), 1)


@gluon.jit
def _attend(
    q_tile, k_ring, v_ring, turn: gl.constexpr, pos, bit, walk, scale_log2, ONLINE: gl.constexpr, form: gl.constexpr
):
    """The walk, for the first time or the second.

    Returns:
        m, l `[ROWS]`, acc `[ROWS, D]`: to what the weights are relative, in base 2, their sum, and that of weighted V.
    """
    D: gl.constexpr = form.D
    KEYS: gl.constexpr = form.KEYS
    dtype: gl.constexpr = q_tile.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    key = gl.arange(0, KEYS, gl.SliceLayout(0, LOGITS))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([ROWS, D], gl.float32, SUMS)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    if not ONLINE:
        q_tile = q_tile.load(gl.DotOperandLayout(0, LOGITS, 2))

    k_use, v_use = _first_uses(turn, walk, form)
    starts = starts_of(walk, 0, form)
    if form.MEMBERS:
        bits = bits_of(walk, 0, form)
    k_tile = filled_tile(k_ring, k_use)
    logits = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=(logits,))
    leave(k_ring, k_use)
    if form.AHEAD:
        k_tile = filled_tile(k_ring, k_use + 1)
        ahead = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    logits = unseen_hidden(logits, starts, pos, key, walk, form)
    if form.MEMBERS:
        logits = unchosen_hidden(logits, bits, bit, key, form)
    weights, _decay, m, l = softmax_step(logits, m, l, scale_log2, m, False)
    if not ONLINE:
        m = gl.where(m == float("-inf"), 0.0, m)  # nothing seen so far
        sums = _sums_of_threads(weights)
    if form.AHEAD:
        ahead = warpgroup_mma_wait(0, deps=(ahead,))
        leave(k_ring, k_use + 1)
    pairs = pack(weights, dtype)
    for MASKED in gl.static_range(2):
        for i in range(gl.maximum(walk.clear, 1) if MASKED else 1, walk.tiles if MASKED else walk.clear):
            if MASKED:
                starts = starts_of(walk, i, form)
            if form.MEMBERS:
                bits = bits_of(walk, i, form)
            k_tile = filled_tile(k_ring, k_use + i + form.AHEAD)
            next_logits = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            v_tile = filled_tile(v_ring, v_use + i - 1)
            acc = warpgroup_mma(unpack(pairs, dtype, WEIGHTS), v_tile, acc, is_async=True)
            if form.AHEAD:
                logits = ahead
            else:
                logits = warpgroup_mma_wait(1, deps=(next_logits,))
                leave(k_ring, k_use + i)
            if MASKED:
                logits = unseen_hidden(logits, starts, pos, key, walk, form)
            if form.MEMBERS:
                logits = unchosen_hidden(logits, bits, bit, key, form)
            if ONLINE:
                step_weights, decay, m, l = softmax_step(logits, m, l, scale_log2, m, False)
            else:
                step_weights = gl.exp2(logits * scale_log2 - m[:, None])
                sums += _sums_of_threads(step_weights)
            if form.AHEAD:
                ahead, acc = warpgroup_mma_wait(0, deps=(next_logits, acc))
                leave(k_ring, k_use + i + 1)
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            leave(v_ring, v_use + i - 1)
            pairs = pack(step_weights, dtype)
            if ONLINE:
                acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
    v_tile = filled_tile(v_ring, v_use + walk.tiles - 1)
    acc = warpgroup_mma(unpack(pairs, dtype, WEIGHTS), v_tile, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    leave(v_ring, v_use + walk.tiles - 1)
    if not ONLINE:
        l = gl.convert_layout(gl.sum(sums, 1), l.type.layout)
    return m, l, acc


@gluon.jit
def _consume(consumer: gl.constexpr, queries, q_tiles, k_ring, v_ring, astray, walk, form: gl.constexpr):
    D: gl.constexpr = form.D
    dtype: gl.constexpr = q_tiles.dtype
    KEYS: gl.constexpr = form.KEYS
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    dims = gl.arange(0, D, gl.SliceLayout(0, WIDE))

    token, head = rows_of(consumer, gl.SliceLayout(1, WIDE), form)
    live = (token < queries.tokens) & (head < queries.heads)
    q_at = queries.q + (token.to(gl.int64) * queries.q_t + head.to(gl.int64) * queries.q_h)[:, None] + dims[None, :]
    q_tile = q_tiles.index(consumer)
    q_tile.store(gl.load(q_at, mask=live[:, None], other=0.0))
    fence_async_shared()

    token, head = rows_of(consumer, ROW, form)
    live = (token < queries.tokens) & (head < queries.heads)
    pos = queries.pos + token
    bit = (queries.skipped + token) // form.BLOCK_M * form.C + head % form.C
    if form.DIFF and form.HEADS_OF != "noise":
        lam_at = token.to(gl.int64) * queries.lam_t + (head // 2).to(gl.int64) * queries.lam_h
        lam = tl.sigmoid(gl.load(queries.lam_logit + lam_at, mask=live, other=0.0).to(gl.float32))
    m, l, acc = _attend(q_tile, k_ring, v_ring, 0, pos, bit, walk, queries.scale_log2, form.ROOM == 0, form)
    if form.ROOM:
        # A sum of 0 is astray, too: the second walk tells whether a row saw nothing, and then leaves its m at −inf.
        vote(astray, consumer, live & ((l < 2.0**-form.ROOM) | (l > 2.0**form.ROOM)))
        if outcome(astray, 4):
            m, l, acc = _attend(q_tile, k_ring, v_ring, 1, pos, bit, walk, queries.scale_log2, True, form)

    total = gl.where(l == 0.0, 1.0, l)  # a token that saw nothing: 0, and lse −inf
    if form.SAVE_LSE:
        lse_at = queries.lse + head.to(gl.int64) * queries.lse_h + token
        gl.store(lse_at, (m + gl.log2(total)) * LN2, mask=live)
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))[:, None]
    token, head, live = outputs_of(consumer, queries, gl.SliceLayout(1, WIDE), form)
    o_at = (token * queries.o_t + head * D)[:, None] + dims[None, :]
    live = live[:, None]
    if form.PAIRED:
        signal, noise = signal_and_noise(acc)
        lam, _same = signal_and_noise(lam)
        out = signal - gl.convert_layout(lam, gl.SliceLayout(1, signal.type.layout))[:, None] * noise
        out = gl.convert_layout(out.to(dtype), WIDE)
        if form.SAVE_NOISE:
            gl.store(queries.o_noise + o_at, gl.convert_layout(noise.to(dtype), WIDE), mask=live)
    elif form.HEADS_OF == "signal":
        signal = gl.convert_layout(acc, WIDE)
        noise = gl.load(queries.o + o_at, mask=live, other=0.0).to(gl.float32)
        out = (signal - gl.convert_layout(lam, gl.SliceLayout(1, WIDE))[:, None] * noise).to(dtype)
    else:
        out = gl.convert_layout(acc.to(dtype), WIDE)
        if form.SAVE_NOISE:
            gl.store(queries.o_noise + o_at, out, mask=live)
    gl.store(queries.o + o_at, out, mask=live)


@gluon.jit(do_not_specialize=["T", "S", "NL", "NE", "window"])
def _forward_kernel(
    q,
    k_source,
    v_source,
    lam_logit,
    o,
    o_noise,
    lse,
    walks,
    q_strides,
    lam_strides,
    T,
    S,
    H,
    NL,
    NE,
    window,
    scale_log2,
    form: gl.constexpr,
):
    FIRST: gl.constexpr = 1 if form.HEADS_OF == "noise" else 0
    i_b, i_h, i_c, i_list, skipped = tile_of(NL, H, form.LIST_TILES, form.CHUNKS, form.TOKENS)
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, walks.table, walks.cu_q, walks.cu_k, T, S, form.PACKED)
    first = own * form.LIST_TOKENS + skipped
    tokens = gl.minimum(form.LIST_TOKENS - skipped, Tq - first)
    pos_first = Sk - Tq + first
    pos_last = gl.minimum(pos_first + form.TOKENS, Sk) - 1
    if form.HEADS_OF != "both":
        i_list += (i_b * 2 * H + FIRST * H + i_h) * NL
    else:
        i_list += (i_b * H + i_h) * NL
    walk = begin_walk(walks, i_list, NE, tokens, pos_first, pos_last, window, form)

    token = q0 + first
    done = i_c * form.OUTPUTS * form.EACH  # query heads of the group in other tiles
    head = i_h * form.G + done + FIRST
    HO = H * (form.G // form.EACH)
    o_at = ((i_b * T + token) * HO + head // form.EACH) * form.D
    queries = Queries(
        q + i_b * q_strides.b + token * q_strides.t + head * q_strides.h,
        lam_logit + i_b * lam_strides.b + token * lam_strides.t + head // 2 * lam_strides.h if form.DIFF else 0,
        o + o_at,
        o_noise + o_at if form.SAVE_NOISE else 0,
        lse + (i_b * (H * form.G) + head) * T + token if form.SAVE_LSE else 0,
        q_strides.t,
        q_strides.h,
        lam_strides.t,
        lam_strides.h,
        HO * form.D,
        T,
        tokens,
        form.G - done,
        skipped,
        pos_first,
        scale_log2,
    )
    dtype: gl.constexpr = q.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, form.D], gl.NVMMASharedLayout(128, 16, 2))
    k_ring = new_ring(CONSUMERS, form.STAGES, dtype, form)
    v_ring = new_ring(CONSUMERS, form.STAGES, dtype, form)
    astray = new_ballot()
    fence_async_shared()
    i_b = i_b.to(gl.int32)
    i_h = i_h.to(gl.int32)
    k0 = k0.to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (0, queries, q_tiles, k_ring, v_ring, astray, walk, form)),
            (_consume, (1, queries, q_tiles, k_ring, v_ring, astray, walk, form)),
            (_produce, (k_source, v_source, k_ring, v_ring, astray, walk, i_b, i_h, k0, Sk, form)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],  # and 240 for the first, which is this program's own
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    domain: Domain,
    scale: float,
    *,
    save_noise: bool,
    save_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over `domain`, for validated inputs: 16-bit, heads of 64 or 128, lists of blocks of 64 or 128 keys.

    Args:
        q: `[B, T, HQ, D]`; k, v: `[B, S, H, D]`, each with D contiguous; lam_logit `[B, T, HQ // 2]` or None.
        scale: of the logits, > 0.
        save_noise, save_lse: also return what the backward needs.

    Returns:
        o `[B, T, HO, D]`, lse float32 `[B, HQ, T]`, and the noise half before λ, like o; each empty unless saved.
    """
    B, T, HQ, D = q.shape
    H = k.shape[2]
    G = HQ // H
    diff = lam_logit is not None
    save_noise = save_noise and diff
    o, lse, o_noise = new_outputs(q, differential=diff, save_noise=save_noise, save_lse=save_lse)
    apart = domain.classes == 2 and domain.block_m * next_power_of_2(G // 2) >= CONSUMERS.value * ROWS.value
    packing = fixed_packing(CONSUMERS.value * ROWS.value, G // 2 if apart else G, domain.block_m)
    lists = Lists(domain, packing.tokens, packing.rows, apart)
    walks, NL, NE = lists.built
    sources = [describe_keys(x, min(domain.block_n, Form.KEYS), domain.packed) for x in (k, v)]
    for heads_of in ("noise", "signal") if apart else ("both",):
        form = Form(
            D=D,
            G=G,
            DIFF=diff,
            HEADS_OF=heads_of,
            C=lists.classes,
            ROOM=ROOM[q.dtype],
            SAVE_LSE=save_lse,
            SAVE_NOISE=save_noise and heads_of != "signal",
            TOKENS=packing.tokens,
            HEADS=packing.heads,
            CHUNKS=packing.chunks,
            **lists.constants,
        )
        _forward_kernel[(NL * lists.tiles * packing.chunks * B * H,)](
            q,
            *sources,
            lam_logit,
            o,
            o_noise,
            lse,
            walks,
            strides_of(q),
            strides_of(lam_logit),
            T,
            k.shape[1],
            H,
            NL,
            NE,
            domain.window or 0,
            scale * LOG2E.value,
            form=form,
            num_warps=4,
        )
    return o, lse, o_noise
