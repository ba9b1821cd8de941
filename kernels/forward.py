"""Fused forward of block-sparse differential attention.

    o[p] = softmax(q_2p kᵀ · scale) v − sigmoid(lam_logit[p]) · softmax(q_2p+1 kᵀ · scale) v

A tile is tokens × heads of one GQA group against one key block after another: each tile of K and V is loaded once for
all of them, signal and noise, and the pair is subtracted before anything is written. Where each class has its own list
and its heads alone fill a tile, a tile is of one class after the other: then no product is spent on blocks that a class
did not choose. Online softmax as in FlashAttention (Dao, arXiv 2307.08691); the formula is microsoft/unilm's
Diff-Transformer-V2.
"""

import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain, Form, Lists, takes_descriptors
from .primitives import (
    LN2,
    LOG2E,
    describe,
    keys_of,
    load_keys,
    members_of,
    new_outputs,
    product,
    sequence_of,
    softmax_step,
    strides_of,
    tile_of,
    visible,
    walk_of,
)
from .tiles import arch_of, fills_a_tile, query_tile


@triton.jit
def _attend(
    q_tile,
    k,
    v,
    pos,
    pos_first,
    pos_last,
    i_b,
    i_h,
    i_list,
    bit,
    k0,
    Sk,
    walks,
    NE,
    k_strides,
    v_strides,
    window,
    scale_log2,
    form: tl.constexpr,
):
    """Attention of queries `[ROWS, DP]`: output in float32 and lse in base 2; 0 and −∞ where nothing is seen."""
    ROWS: tl.constexpr = q_tile.shape[0]
    DP: tl.constexpr = q_tile.shape[1]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    steps, clear, low, clear_from, n = walk_of(i_list, pos_first, pos_last, walks.lengths, window, form)
    for e in range(0, steps):
        key, start, block_end = keys_of(e, walks.entries, i_list * NE, n, Sk, clear, low, clear_from, form)
        k_tile = load_keys(k, i_b, i_h, k0, key, start, block_end, k_strides, form)
        logits = product(q_tile, tl.trans(k_tile))
        if e >= clear:
            seen = visible(pos[:, None], key[None, :], block_end, window, form.WINDOWED)
            logits = tl.where(seen, logits, float("-inf"))
        member = pos >= 0
        if form.MEMBERS:
            member = members_of(e, walks.bits, i_list * NE, n, bit, form)
            if form.PER > 1:
                logits = tl.where(member, logits, float("-inf"))
        weights, decay, m, l = softmax_step(logits, m, l, scale_log2, member, form.MEMBERS and form.PER == 1)
        v_tile = load_keys(v, i_b, i_h, k0, key, start, block_end, v_strides, form)
        acc = product(weights.to(v_tile.dtype), v_tile, acc * decay[:, None])
    total = tl.where(l == 0.0, 1.0, l)
    return acc / total[:, None], m + tl.log2(total)


@triton.jit(do_not_specialize=["T", "S", "NL", "NE", "window"])
def _forward_kernel(
    q,
    k,
    v,
    lam_logit,
    o,
    o_noise,
    lse,
    walks,
    q_strides,
    k_strides,
    v_strides,
    lam_strides,
    T,
    S,
    H,
    NL,
    NE,
    window,
    scale_log2,
    form: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    SAVE_NOISE: tl.constexpr,
):
    """A tile is TOKENS × HEADS of the group's G heads; APART, it is of one class, noise first and then signal."""
    D: tl.constexpr = form.D
    DP: tl.constexpr = form.DP
    ROWS: tl.constexpr = form.TOKENS * form.HEADS
    EACH: tl.constexpr = 2 if form.APART else 1
    i_b, i_h, i_c, i_list, skipped = tile_of(NL, H, form.LIST_TILES, form.CHUNKS, form.TOKENS)
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, walks.table, walks.cu_q, walks.cu_k, T, S, form.PACKED)
    first = own * form.LIST_TOKENS + skipped
    if first >= Tq:
        return
    pos_first = Sk - Tq + first
    pos_last = tl.minimum(pos_first + form.TOKENS, Sk) - 1

    rows = tl.arange(0, ROWS)
    local = skipped + rows // form.HEADS
    head = (i_c * form.HEADS + rows % form.HEADS) * EACH  # in the group, of the class 0
    t = own * form.LIST_TOKENS + local  # [ROWS]
    live = (local < form.LIST_TOKENS) & (t < Tq) & (head < form.G)
    pos = Sk - Tq + t
    t += q0
    dims = tl.arange(0, DP)
    stored = live[:, None] & (dims < D)[None, :]
    bit = (local // form.BLOCK_M) * form.C + head % form.C
    HQ = H * form.G
    for c in tl.static_range(EACH - 1, -1, -1):
        hq = i_h * form.G + head + c
        q_at = q + i_b * q_strides.b + t[:, None] * q_strides.t + hq[:, None] * q_strides.h + dims[None, :]
        acc, lse_log2 = _attend(
            tl.load(q_at, mask=stored, other=0.0),
            k,
            v,
            pos,
            pos_first,
            pos_last,
            i_b,
            i_h,
            ((i_b * EACH + c) * H + i_h) * NL + i_list,
            bit,
            k0,
            Sk,
            walks,
            NE,
            k_strides,
            v_strides,
            window,
            scale_log2,
            form,
        )
        if SAVE_LSE:
            tl.store(lse + (i_b * HQ + hq) * T + t, lse_log2 * LN2, mask=live)
        if form.APART:
            pair = i_h * (form.G // 2) + head // 2
            o_offs = ((i_b * T + t) * (HQ // 2) + pair)[:, None] * D + dims[None, :]
            if c == 1:
                noise = acc.to(o.dtype.element_ty)
                tl.store(o + o_offs, noise, mask=stored)
                if SAVE_NOISE:
                    tl.store(o_noise + o_offs, noise, mask=stored)
            else:
                tl.debug_barrier()  # the noise half waits in o; other threads may have written what this one reads
                noise = tl.load(o + o_offs, mask=stored, other=0.0).to(tl.float32)
                lam_at = lam_logit + i_b * lam_strides.b + t * lam_strides.t + pair * lam_strides.h
                lam = tl.sigmoid(tl.load(lam_at, mask=live, other=0.0).to(tl.float32))
                tl.store(o + o_offs, (acc - lam[:, None] * noise).to(o.dtype.element_ty), mask=stored)
        elif form.DIFF:
            signal, noise = tl.split(tl.permute(tl.reshape(acc, [ROWS // 2, 2, DP]), (0, 2, 1)))
            PAIRS: tl.constexpr = form.HEADS // 2
            rows = tl.arange(0, ROWS // 2)
            local = skipped + rows // PAIRS
            pair = i_c * PAIRS + rows % PAIRS
            t = own * form.LIST_TOKENS + local
            live = (local < form.LIST_TOKENS) & (t < Tq) & (pair < form.G // 2)
            pair = i_h * (form.G // 2) + pair
            t += q0
            lam_at = lam_logit + i_b * lam_strides.b + t * lam_strides.t + pair * lam_strides.h
            lam = tl.sigmoid(tl.load(lam_at, mask=live, other=0.0).to(tl.float32))
            o_offs = ((i_b * T + t) * (HQ // 2) + pair)[:, None] * D + dims[None, :]
            stored = live[:, None] & (dims < D)[None, :]
            tl.store(o + o_offs, (signal - lam[:, None] * noise).to(o.dtype.element_ty), mask=stored)
            if SAVE_NOISE:
                tl.store(o_noise + o_offs, noise.to(o.dtype.element_ty), mask=stored)
        else:
            o_offs = ((i_b * T + t) * HQ + hq)[:, None] * D + dims[None, :]
            tl.store(o + o_offs, acc.to(o.dtype.element_ty), mask=stored)


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
    """Attention over `domain`, for validated inputs.

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
    arch = arch_of(q.device)
    described = takes_descriptors(domain, arch, k, v)
    phase = "forward" if described else "forward_pointers"
    apart = domain.classes == 2 and fills_a_tile(phase, G // 2, domain.block_m, D, q.dtype, arch)
    tile, packing = query_tile(phase, G // 2 if apart else G, domain.block_m, D, q.dtype, arch)
    lists = Lists(domain, packing.tokens, packing.rows, apart)
    walks, NL, NE = lists.built
    form = Form.of(lists, D, G, packing, tile, differential=diff, described=described)
    _forward_kernel[(NL * lists.tiles * packing.chunks * B * H,)](
        q,
        describe(k, form.KEYS) if described else k,
        describe(v, form.KEYS) if described else v,
        lam_logit,
        o,
        o_noise,
        lse,
        walks,
        strides_of(q),
        strides_of(k),
        strides_of(v),
        strides_of(lam_logit),
        T,
        k.shape[1],
        H,
        NL,
        NE,
        domain.window or 0,
        scale * LOG2E.value,
        form=form,
        SAVE_LSE=save_lse,
        SAVE_NOISE=save_noise,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return o, lse, o_noise
