"""dq of block-sparse differential attention for Hopper, warp-specialised, in Gluon.

    dS_signal = P_signal ∘ (dP − δ_signal),   dS_noise = −λ P_noise ∘ (dP − δ_noise),   dq = scale · dS k

The roles are those of `forward.py`: one warp brings tiles of K and V into rings, two consumers of four warps compute. A
consumer has 64 pairs of heads, signal and noise both, so that one dP = dO vᵀ serves two. A tile of keys costs it five
products, each asked for before its turn comes, so that the tensor cores go on. In time, S logits, Q the sum of dS k,
' of noise, ~ what a consumer does itself; the other consumer's products fill the gaps:

    tensor cores   Q' S  dP       S' Q     Q' S  dP       S' Q     Q' ...
    signal               ~~ dS                   ~~ dS
    noise                            ~~ dS'                  ~~ dS'

Noise's Q' is asked for at the beginning of the next step, so dS' crosses the end of a step, rounded (`operands.py`).

Registers decide this order. Of a thread's 240, the two sums take 128, dP and one class's S 32 each for 64 keys, and a
rounded dS 16: together no more than 208 at any time. The rest must not grow. So lse, δ and λ wait in shared memory; and
where tiles of queries lie is found anew in every step, by a number that the compiler cannot foresee: else it computes
the addresses of all their parts ahead of the loop, and has no room to keep them.

Classes with lists of their own are one launch each, in which a consumer has 64 heads of one class, as it has in
ordinary attention. With one class there is room for tiles of 128 keys, and Q is what Q' is with two.

Rows of a selection that fill no tile are left to the portable kernel, which is faster there: consumers with a class
each, which compute dP twice, were no match for it, nor were tiles of several rows that walk each other's blocks.

Source: the formula above, and FlashAttention-3 (Shah et al., arXiv 2407.08608) for the roles.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..domain import Domain, Lists
from ..primitives import LOG2E, sequence_of, strides_of, tile_of
from ..tiles import fixed_packing, next_power_of_2
from .dq_rows import Form, Rows, load_rows, new_operands, rows_of, store_gradients
from .operands import pack, unpack
from .queries import CONSUMERS, ROWS
from .ring import describe_keys, fill, filled_tile, leave, new_ring
from .walk import begin_walk, starts_of, unseen_hidden

V_STAGES = gl.constexpr(2)


@gluon.jit
def _produce(k_source, v_source, k_ring, v_ring, walk, i_b, i_h, k0, Sk, form: gl.constexpr):
    """Brings V before K, in the order in which the consumers leave them."""
    for i in range(walk.tiles):
        starts = starts_of(walk, i, form)
        fill(v_ring, i, v_source, starts, i_b, i_h, k0, Sk, form)
        fill(k_ring, i, k_source, starts, i_b, i_h, k0, Sk, form)


@gluon.jit
def _consume(consumer: gl.constexpr, rows, operands, k_ring, v_ring, walk, form: gl.constexpr):
    """FIRST and LAST are the two classes of a consumer, or the same one; only with two there is a sum of the first."""
    D: gl.constexpr = form.D
    KEYS: gl.constexpr = form.KEYS
    dtype: gl.constexpr = operands.q.dtype
    FIRST: gl.constexpr = 1 if form.CLASS == "noise" else 0
    LAST: gl.constexpr = 1 if form.BOTH else FIRST
    NEXT: gl.constexpr = (LAST - FIRST) * CONSUMERS  # from the operands of the first to those of the last
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SCORES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    load_rows(consumer, FIRST, LAST, rows, operands, form)

    scale_log2 = rows.scale * LOG2E
    key = gl.arange(0, KEYS, gl.SliceLayout(0, LOGITS))
    token, _output, _live = rows_of(consumer, rows, ROW, form)
    pos = rows.pos + token
    zeros = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    if form.BOTH:
        first_sum = gl.zeros([ROWS, D], gl.float32, SUMS)
    last_sum = gl.zeros([ROWS, D], gl.float32, SUMS)
    pairs = pack(zeros, dtype)  # the last class's dS of the step before
    starts = starts_of(walk, 0, form)
    for MASKED in gl.static_range(2):
        for i in range(walk.clear if MASKED else 0, walk.tiles if MASKED else walk.clear):
            if MASKED:
                starts = starts_of(walk, i, form)
            nothing = i >> 30  # see above
            at = consumer + nothing
            k_tile = filled_tile(k_ring, i)
            v_tile = filled_tile(v_ring, i)
            before = k_ring.tiles.index((gl.maximum(i, 1) - 1) % form.K_STAGES)
            last_sum = warpgroup_mma(unpack(pairs, dtype, SCORES), before, last_sum, is_async=True)
            q_tile = operands.q.index(at)
            logits = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            last_sum = warpgroup_mma_wait(1, deps=(last_sum,))
            if i > 0:
                leave(k_ring, i - 1)
            do_tile = operands.do.index(at)
            dweights = warpgroup_mma(do_tile, v_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(1, deps=(logits,))
            if MASKED:
                logits = unseen_hidden(logits, starts, pos, key, walk, form)
            weights = tl.exp2(logits * scale_log2 - operands.lse.index(at).load(ROW)[:, None])
            dweights = warpgroup_mma_wait(0, deps=(dweights,))
            leave(v_ring, i)
            dscores = weights * (dweights - operands.delta.index(at).load(ROW)[:, None])
            if form.BOTH:
                first_pairs = pack(dscores, dtype)
                q_tile = operands.q.index(at + NEXT)
                logits = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
                first_sum = warpgroup_mma(unpack(first_pairs, dtype, SCORES), k_tile, first_sum, is_async=True)
                logits = warpgroup_mma_wait(1, deps=(logits,))
                if MASKED:
                    logits = unseen_hidden(logits, starts, pos, key, walk, form)
                weights = tl.exp2(logits * scale_log2 - operands.lse.index(at + NEXT).load(ROW)[:, None])
                dscores = weights * (dweights - operands.delta.index(at + NEXT).load(ROW)[:, None])
                first_sum = warpgroup_mma_wait(0, deps=(first_sum,))
            pairs = pack(dscores, dtype)
    before = k_ring.tiles.index((walk.tiles - 1) % form.K_STAGES)
    last_sum = warpgroup_mma(unpack(pairs, dtype, SCORES), before, last_sum, is_async=True)
    last_sum = warpgroup_mma_wait(0, deps=(last_sum,))
    if form.BOTH:
        store_gradients(first_sum, FIRST, consumer, operands.q.index(consumer), rows, operands, form)
    store_gradients(last_sum, LAST, consumer, operands.q.index(consumer + NEXT), rows, operands, form)


@gluon.jit(do_not_specialize=["T", "S", "NL", "NE", "window"])
def _dq_kernel(
    q,
    k_source,
    v_source,
    do,
    lam_logit,
    lse,
    delta,
    dq,
    walks,
    q_strides,
    do_strides,
    lam_strides,
    T,
    S,
    H,
    NL,
    NE,
    window,
    scale,
    form: gl.constexpr,
):
    i_b, i_h, i_c, i_list, skipped = tile_of(NL, H, form.LIST_TILES, form.CHUNKS, form.TOKENS)
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, walks.table, walks.cu_q, walks.cu_k, T, S, form.PACKED)
    first = own * form.LIST_TOKENS + skipped
    tokens = gl.minimum(form.LIST_TOKENS - skipped, Tq - first)
    pos_first = Sk - Tq + first
    pos_last = gl.minimum(pos_first + form.TOKENS, Sk) - 1
    if form.APART:
        i_list += (i_b * 2 * H + (H if form.CLASS == "noise" else 0) + i_h) * NL
    else:
        i_list += (i_b * H + i_h) * NL
    walk = begin_walk(walks, i_list, NE, tokens, pos_first, pos_last, window, form)

    token = q0 + first
    done = i_c * form.HEADS  # output heads of the group in other tiles
    output = i_h * form.OUTPUTS + done
    head = output * form.EACH
    HQ = H * (form.OUTPUTS * form.EACH)
    row_at = (i_b * HQ + head) * T + token
    rows = Rows(
        q + i_b * q_strides.b + token * q_strides.t + head * q_strides.h,
        do + i_b * do_strides.b + token * do_strides.t + output * do_strides.h,
        lam_logit + i_b * lam_strides.b + token * lam_strides.t + output * lam_strides.h if form.DIFF else 0,
        lse + row_at,
        delta + row_at,
        dq + ((i_b * T + token) * HQ + head) * form.D,
        q_strides.t,
        q_strides.h,
        do_strides.t,
        do_strides.h,
        lam_strides.t,
        lam_strides.h,
        T,
        HQ * form.D,
        tokens,
        form.OUTPUTS - done,
        pos_first,
        scale,
    )
    dtype: gl.constexpr = q.dtype.element_ty
    operands = new_operands(dtype, form)
    k_ring = new_ring(CONSUMERS, form.K_STAGES, dtype, form)
    v_ring = new_ring(CONSUMERS, V_STAGES, dtype, form)
    fence_async_shared()
    i_b = i_b.to(gl.int32)
    i_h = i_h.to(gl.int32)
    k0 = k0.to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (0, rows, operands, k_ring, v_ring, walk, form)),
            (_consume, (1, rows, operands, k_ring, v_ring, walk, form)),
            (_produce, (k_source, v_source, k_ring, v_ring, walk, i_b, i_h, k0, Sk, form)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],  # and 240 for the first, which is this program's own
    )


def obstacle(q: Tensor, k: Tensor, lam_logit: Tensor | None, domain: Domain) -> str | None:
    """What makes the portable dq the better one for such a call that the Hopper forward takes, in words; None if
    nothing does.
    """
    outputs = q.shape[2] // (1 if lam_logit is None else 2) // k.shape[2]
    if domain.block_m * next_power_of_2(outputs) < CONSUMERS.value * ROWS.value:
        return "a row of the selection fills no tile"
    return None


def query_gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    domain: Domain,
    scale: float,
) -> Tensor:
    """dq, like q; arguments as the portable `query_gradient` takes them, of a call that the Hopper forward takes, and
    without `obstacle`.
    """
    B, T, HQ, D = q.shape
    H = k.shape[2]
    diff = lam_logit is not None
    outputs = HQ // (2 if diff else 1) // H
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    classes = ("signal",) if not diff else ("both",) if domain.classes == 1 else ("signal", "noise")
    packing = fixed_packing(CONSUMERS.value * ROWS.value, outputs, domain.block_m)
    lists = Lists(domain, packing.tokens, packing.rows, apart=len(classes) == 2)
    walks, NL, NE = lists.built
    for name in classes:
        form = Form(
            D=D,
            OUTPUTS=outputs,
            DIFF=diff,
            CLASS=name,
            TOKENS=packing.tokens,
            HEADS=packing.heads,
            CHUNKS=packing.chunks,
            **lists.constants,
        )
        keys = min(domain.block_n, form.KEYS)
        _dq_kernel[(NL * lists.tiles * packing.chunks * B * H,)](
            q,
            describe_keys(k, keys, domain.packed),
            describe_keys(v, keys, domain.packed),
            do,
            lam_logit,
            lse,
            delta,
            dq,
            walks,
            strides_of(q),
            strides_of(do),
            strides_of(lam_logit),
            T,
            k.shape[1],
            H,
            NL,
            NE,
            domain.window or 0,
            scale,
            form=form,
            num_warps=4,
        )
    return dq
