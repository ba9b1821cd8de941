"""Fused forward of block-sparse differential attention.

    o[p] = softmax(q_2p kᵀ · scale) v − sigmoid(lam_logit[p]) · softmax(q_2p+1 kᵀ · scale) v

A tile is tokens × heads of one GQA group against one key block after another: each tile of K and V is loaded once for
all of them, signal and noise, and the pair is subtracted before anything is written. Online softmax as in
FlashAttention (Dao, arXiv 2307.08691); the formula is microsoft/unilm's Diff-Transformer-V2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain, Lists
from .primitives import LN2, LOG2E, product, sequence_of, softmax_step, visible, walk_bounds
from .tiles import arch_of, key_tile, query_tile


@triton.jit(do_not_specialize=["T", "S", "NL", "NE", "window"])
def _forward_kernel(
    q,
    k,
    v,
    lam_logit,
    o,
    o_noise,
    lse,
    entries,
    bits,
    lengths,
    table,
    cu_q,
    cu_k,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_lb,
    stride_lt,
    stride_lh,
    T,
    S,
    H,
    NL,
    NE,
    window,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    DIFF: tl.constexpr,
    C: tl.constexpr,
    SAVE_NOISE: tl.constexpr,
    LISTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    LIST_TOKENS: tl.constexpr,
    LIST_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * HEADS
    pid = tl.program_id(0).to(tl.int64)
    tiles = NL * LIST_TILES
    i_tile = tiles - 1 - pid % tiles  # of one KV head after another, longest walks first
    i_c = (pid // tiles) % CHUNKS
    i_bh = pid // tiles // CHUNKS
    i_b = i_bh // H
    i_h = i_bh % H
    i_list = i_tile // LIST_TILES
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, table, cu_q, cu_k, T, S, PACKED)
    skipped = (i_tile % LIST_TILES).to(tl.int32) * TOKENS  # tokens of the list that earlier tiles have
    first = own * LIST_TOKENS + skipped
    if first >= Tq:
        return
    pos_first = Sk - Tq + first
    pos_last = tl.minimum(pos_first + TOKENS, Sk) - 1

    rows = tl.arange(0, ROWS)
    local = skipped + rows // HEADS
    head = i_c.to(tl.int32) * HEADS + rows % HEADS
    t = own * LIST_TOKENS + local  # [ROWS]
    live = (local < LIST_TOKENS) & (t < Tq) & (head < G)
    pos = Sk - Tq + t
    dims = tl.arange(0, DP)
    offs = tl.arange(0, KEYS)

    q_at = q + i_b * stride_qb + (q0 + t)[:, None] * stride_qt + (i_h * G + head)[:, None] * stride_qh + dims[None, :]
    q_tile = tl.load(q_at, mask=live[:, None] & (dims < D)[None, :], other=0.0)  # [ROWS, DP]
    k_at = k + i_b * stride_kb + k0 * stride_ks + i_h * stride_kh
    v_at = v + i_b * stride_vb + k0 * stride_vs + i_h * stride_vh
    k_offs = offs[:, None] * stride_ks + dims[None, :]
    v_offs = offs[:, None] * stride_vs + dims[None, :]

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    i_list += i_bh * NL
    bit = (local // BLOCK_M) * C + head % C
    for MASKED in tl.static_range(2):
        begin, end, jump, skip = walk_bounds(
            i_list, pos_first, pos_last, lengths, NE, window, MASKED, LISTS, WINDOWED, SUB, KEYS
        )
        for e in range(begin, end):
            if LISTS:
                block_start = tl.load(entries + i_list * NE + e // SUB) * BLOCK_N
                start = block_start + (e % SUB) * KEYS
                block_end = tl.minimum(block_start + BLOCK_N, Sk)
            else:
                start = tl.where(e < jump, e, e + skip) * KEYS
                block_end = Sk
            member = live
            if MEMBERS:
                member = ((tl.load(bits + i_list * NE + e // SUB) >> bit) & 1) != 0
            key = start + offs
            loaded = (dims < D)[None, :]
            if MASKED:
                loaded = loaded & (key < block_end)[:, None]
            if DP == D and not MASKED:
                k_tile = tl.load(k_at + start.to(tl.int64) * stride_ks + k_offs)  # [KEYS, DP]
            else:
                k_tile = tl.load(k_at + start.to(tl.int64) * stride_ks + k_offs, mask=loaded, other=0.0)
            logits = product(q_tile, tl.trans(k_tile))
            if MASKED:
                seen = visible(pos[:, None], key[None, :], block_end, window, WINDOWED)
                logits = tl.where(seen, logits, float("-inf"))
            weights, decay, m, l = softmax_step(logits, m, l, scale_log2, member, MEMBERS)
            if DP == D and not MASKED:
                v_tile = tl.load(v_at + start.to(tl.int64) * stride_vs + v_offs)
            else:
                v_tile = tl.load(v_at + start.to(tl.int64) * stride_vs + v_offs, mask=loaded, other=0.0)
            acc = product(weights.to(v_tile.dtype), v_tile, acc * decay[:, None])

    total = tl.where(l == 0.0, 1.0, l)  # a token that saw nothing: 0, and lse −inf
    acc = acc / total[:, None]
    HQ = H * G
    tl.store(lse + (i_b * HQ + i_h * G + head) * T + q0 + t, (m + tl.log2(total)) * LN2, mask=live)
    if DIFF:
        signal, noise = tl.split(tl.permute(tl.reshape(acc, [ROWS // 2, 2, DP]), (0, 2, 1)))
        PAIRS: tl.constexpr = HEADS // 2
        rows = tl.arange(0, ROWS // 2)
        local = skipped + rows // PAIRS
        pair = i_c.to(tl.int32) * PAIRS + rows % PAIRS
        t = own * LIST_TOKENS + local
        live = (local < LIST_TOKENS) & (t < Tq) & (pair < G // 2)
        pair = i_h * (G // 2) + pair
        t = q0 + t
        lam = tl.load(lam_logit + i_b * stride_lb + t * stride_lt + pair * stride_lh, mask=live, other=0.0)
        o_offs = ((i_b * T + t) * (HQ // 2) + pair)[:, None] * D + dims[None, :]
        stored = live[:, None] & (dims < D)[None, :]
        combined = signal - tl.sigmoid(lam.to(tl.float32))[:, None] * noise
        tl.store(o + o_offs, combined.to(o.dtype.element_ty), mask=stored)
        if SAVE_NOISE:
            tl.store(o_noise + o_offs, noise.to(o.dtype.element_ty), mask=stored)
    else:
        o_offs = ((i_b * T + q0 + t) * HQ + i_h * G + head)[:, None] * D + dims[None, :]
        tl.store(o + o_offs, acc.to(o.dtype.element_ty), mask=live[:, None] & (dims < D)[None, :])


def forward(
    q: Tensor, k: Tensor, v: Tensor, lam_logit: Tensor | None, domain: Domain, scale: float, *, save_noise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over `domain`, for validated inputs.

    Args:
        q: `[B, T, HQ, D]`; k, v: `[B, S, H, D]`, each with D contiguous; lam_logit `[B, T, HQ // 2]` or None.
        scale: of the logits, > 0.
        save_noise: also return what the backward needs.

    Returns:
        o `[B, T, HO, D]`, lse float32 `[B, HQ, T]`, and the noise half before λ, like o (empty unless save_noise).
    """
    B, T, HQ, D = q.shape
    H = k.shape[2]
    G = HQ // H
    diff = lam_logit is not None
    o = torch.empty(B, T, HQ // 2 if diff else HQ, D, dtype=q.dtype, device=q.device)
    save_noise = save_noise and diff
    o_noise = torch.empty_like(o) if save_noise else o.new_empty(0)
    lse = torch.empty(B, HQ, T, dtype=torch.float32, device=q.device)
    tile, packing = query_tile("forward", G, domain.block_m, D, q.dtype, arch_of(q.device))
    lists = Lists(domain, packing.tokens, packing.rows)
    NL, table = lists.cut
    entries, bits, lengths, NE = lists.built
    keys, sub = key_tile(tile.keys, domain.block_n)
    _forward_kernel[(NL * lists.tiles * packing.chunks * B * H,)](
        q,
        k,
        v,
        lam_logit,
        o,
        o_noise,
        lse,
        entries,
        bits,
        lengths,
        table,
        domain.cu_q,
        domain.cu_k,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(lam_logit.stride() if diff else (0, 0, 0)),
        T,
        k.shape[1],
        H,
        NL,
        NE,
        domain.window or 0,
        scale * LOG2E.value,
        G=G,
        D=D,
        DIFF=diff,
        C=domain.classes,
        SAVE_NOISE=save_noise,
        LISTS=entries is not None,
        MEMBERS=lists.members,
        PACKED=domain.packed,
        WINDOWED=domain.window is not None,
        LIST_TOKENS=lists.span,
        LIST_TILES=lists.tiles,
        BLOCK_M=domain.block_m,
        BLOCK_N=domain.block_n,
        SUB=sub,
        TOKENS=packing.tokens,
        HEADS=packing.heads,
        CHUNKS=packing.chunks,
        KEYS=keys,
        DP=max(16, triton.next_power_of_2(D)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return o, lse, o_noise
