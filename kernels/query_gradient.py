"""dq of block-sparse differential attention, by query rows: each tile walks the key blocks that its tokens chose.

    dS_signal = P_signal ∘ (dP − δ_signal),   dS_noise = −λ P_noise ∘ (dP − δ_noise),   dq = scale · dS k

One dP = dO vᵀ serves both heads of a pair. See `backward.py` for δ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain, Lists
from .primitives import LOG2E, load_lse, product, sequence_of, visible, walk_bounds
from .tiles import arch_of, key_tile, query_tile


@triton.jit
def _dscores(q_tile, k_tile, lse, dweights, delta, seen, scale, MASKED: tl.constexpr):
    """P ∘ (dP − δ) of one class, queries × keys, in the operands' dtype."""
    weights = tl.exp2(product(q_tile, tl.trans(k_tile)) * (scale * LOG2E) - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    return (weights * (dweights - delta[:, None])).to(k_tile.dtype)


@triton.jit(do_not_specialize=["T", "S", "NL", "NE", "window"])
def _dq_kernel(
    q,
    k,
    v,
    do,
    lam_logit,
    lse,
    delta,
    dq,
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
    stride_db,
    stride_dt,
    stride_dh,
    stride_lb,
    stride_lt,
    stride_lh,
    T,
    S,
    H,
    NL,
    NE,
    window,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DIFF: tl.constexpr,
    C: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
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
    """G and HEADS count output heads: pairs, or the heads of ordinary attention. FROM … TO − 1 are the classes whose dq
    is computed.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    EACH: tl.constexpr = 2 if DIFF else 1
    pid = tl.program_id(0).to(tl.int64)
    tiles = NL * LIST_TILES
    i_tile = tiles - 1 - pid % tiles
    i_c = (pid // tiles) % CHUNKS
    i_bh = pid // tiles // CHUNKS
    i_b = i_bh // H
    i_h = i_bh % H
    i_list = i_tile // LIST_TILES
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, table, cu_q, cu_k, T, S, PACKED)
    skipped = (i_tile % LIST_TILES).to(tl.int32) * TOKENS
    first = own * LIST_TOKENS + skipped
    if first >= Tq:
        return
    pos_first = Sk - Tq + first
    pos_last = tl.minimum(pos_first + TOKENS, Sk) - 1

    rows = tl.arange(0, ROWS)
    local = skipped + rows // HEADS
    head = i_c.to(tl.int32) * HEADS + rows % HEADS
    t = own * LIST_TOKENS + local
    live = (local < LIST_TOKENS) & (t < Tq) & (head < G)
    pos = Sk - Tq + t
    dims = tl.arange(0, DP)
    offs = tl.arange(0, KEYS)
    inside = live[:, None] & (dims < D)[None, :]
    head = i_h * G + head
    token = q0 + t

    q_at = q + (i_b * stride_qb + token * stride_qt + head * EACH * stride_qh)[:, None] + dims[None, :]
    do_at = do + (i_b * stride_db + token * stride_dt + head * stride_dh)[:, None] + dims[None, :]
    row_at = (i_b * (H * G * EACH) + head * EACH) * T + token
    do_tile = tl.load(do_at, mask=inside, other=0.0)
    if FROM == 0:
        signal_q = tl.load(q_at, mask=inside, other=0.0)
        signal_lse = load_lse(lse + row_at, live)
        signal_delta = tl.load(delta + row_at, mask=live, other=0.0)
        signal_dq = tl.zeros([ROWS, DP], tl.float32)
    if TO == 2:
        noise_q = tl.load(q_at + stride_qh, mask=inside, other=0.0)
        noise_lse = load_lse(lse + row_at + T, live)
        noise_delta = tl.load(delta + row_at + T, mask=live, other=0.0)
        noise_dq = tl.zeros([ROWS, DP], tl.float32)
    k_at = k + i_b * stride_kb + k0 * stride_ks + i_h * stride_kh
    v_at = v + i_b * stride_vb + k0 * stride_vs + i_h * stride_vh
    k_offs = offs[:, None] * stride_ks + dims[None, :]
    v_offs = offs[:, None] * stride_vs + dims[None, :]
    i_list += i_bh * NL
    bit = (local // BLOCK_M) * C
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
            key = start + offs
            loaded = (dims < D)[None, :]
            if MASKED:
                loaded = loaded & (key < block_end)[:, None]
            if DP == D and not MASKED:
                k_tile = tl.load(k_at + start.to(tl.int64) * stride_ks + k_offs)
                v_tile = tl.load(v_at + start.to(tl.int64) * stride_vs + v_offs)
            else:
                k_tile = tl.load(k_at + start.to(tl.int64) * stride_ks + k_offs, mask=loaded, other=0.0)
                v_tile = tl.load(v_at + start.to(tl.int64) * stride_vs + v_offs, mask=loaded, other=0.0)
            chosen = 0
            if MEMBERS:
                chosen = tl.load(bits + i_list * NE + e // SUB) >> bit
            seen = key >= 0
            if MASKED:
                seen = visible(pos[:, None], key[None, :], block_end, window, WINDOWED)
            dweights = product(do_tile, tl.trans(v_tile))
            if FROM == 0:
                shift = signal_lse
                if MEMBERS:
                    shift = tl.where((chosen & 1) != 0, signal_lse, float("inf"))
                dscores = _dscores(signal_q, k_tile, shift, dweights, signal_delta, seen, scale, MASKED)
                signal_dq = product(dscores, k_tile, signal_dq)
            if TO == 2:
                shift = noise_lse
                if MEMBERS:
                    shift = tl.where(((chosen >> (C - 1)) & 1) != 0, noise_lse, float("inf"))
                dscores = _dscores(noise_q, k_tile, shift, dweights, noise_delta, seen, scale, MASKED)
                noise_dq = product(dscores, k_tile, noise_dq)

    dq_at = dq + ((i_b * T + token) * (H * G * EACH) + head * EACH)[:, None] * D + dims[None, :]
    if FROM == 0:
        tl.store(dq_at, (signal_dq * scale).to(dq.dtype.element_ty), mask=inside)
    if TO == 2:
        lam_at = lam_logit + i_b * stride_lb + token * stride_lt + head * stride_lh
        lam = tl.sigmoid(tl.load(lam_at, mask=live, other=0.0).to(tl.float32))
        tl.store(dq_at + D, (noise_dq * (-lam * scale)[:, None]).to(dq.dtype.element_ty), mask=inside)


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
    """dq, like q; lse and δ `[B, HQ, T]`."""
    B, T, HQ, D = q.shape
    H = k.shape[2]
    classes = 1 if lam_logit is None else 2
    G = HQ // classes // H
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, packing = query_tile("dq", G, domain.block_m, D, q.dtype, arch_of(q.device))
    lists = Lists(domain, packing.tokens, packing.rows)
    NL, table = lists.cut
    entries, bits, lengths, NE = lists.built
    keys, sub = key_tile(tile.keys, domain.block_n)
    at_once = classes if D <= 128 else 1  # two accumulators of wide heads do not fit the registers
    for c in range(0, classes, at_once):
        _dq_kernel[(NL * lists.tiles * packing.chunks * B * H,)](
            q,
            k,
            v,
            do,
            lam_logit,
            lse,
            delta,
            dq,
            entries,
            bits,
            lengths,
            table,
            domain.cu_q,
            domain.cu_k,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *do.stride()[:3],
            *(lam_logit.stride() if classes == 2 else (0, 0, 0)),
            T,
            k.shape[1],
            H,
            NL,
            NE,
            domain.window or 0,
            scale,
            G=G,
            D=D,
            DIFF=classes == 2,
            C=domain.classes,
            FROM=c,
            TO=c + at_once,
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
    return dq
