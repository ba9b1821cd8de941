"""dq of block-sparse differential attention, by query rows: each tile walks the key blocks that its tokens chose.

    dS_signal = P_signal ∘ (dP − δ_signal),   dS_noise = −λ P_noise ∘ (dP − δ_noise),   dq = scale · dS k

One dP = dO vᵀ serves both heads of a pair. See `backward.py` for δ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain, Form, Lists, takes_descriptors
from .primitives import (
    LOG2E,
    describe,
    keys_of,
    load_keys,
    load_lse,
    members_of,
    product,
    sequence_of,
    strides_of,
    tile_of,
    visible,
    walk_of,
)
from .tiles import arch_of, query_tile


@triton.jit
def _dscores(
    q_tile,
    k_tile,
    lse,
    delta,
    dweights,
    member,
    masked,
    pos,
    key,
    block_end,
    window,
    scale,
    form: tl.constexpr,
):
    """P ∘ (dP − δ) of one class, `[ROWS, KEYS]`, in the operands' dtype; 0 where hidden or not chosen."""
    if form.MEMBERS and form.PER == 1:
        lse = tl.where(member, lse, float("inf"))
    weights = tl.exp2(product(q_tile, tl.trans(k_tile)) * (scale * LOG2E) - lse[:, None])
    if form.MEMBERS and form.PER > 1:
        weights = tl.where(member, weights, 0.0)
    if masked:
        weights = tl.where(visible(pos[:, None], key[None, :], block_end, window, form.WINDOWED), weights, 0.0)
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
    walks,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    lam_strides,
    T,
    S,
    H,
    NL,
    NE,
    window,
    scale,
    form: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
):
    """G and HEADS count output heads: pairs, or the heads of ordinary attention. FROM … TO − 1 are the classes whose dq
    is computed; APART, that one class has lists of its own.
    """
    D: tl.constexpr = form.D
    DP: tl.constexpr = form.DP
    ROWS: tl.constexpr = form.TOKENS * form.HEADS
    EACH: tl.constexpr = 2 if form.DIFF else 1
    i_b, i_h, i_c, i_list, skipped = tile_of(NL, H, form.LIST_TILES, form.CHUNKS, form.TOKENS)
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, walks.table, walks.cu_q, walks.cu_k, T, S, form.PACKED)
    first = own * form.LIST_TOKENS + skipped
    if first >= Tq:
        return
    pos_first = Sk - Tq + first
    pos_last = tl.minimum(pos_first + form.TOKENS, Sk) - 1

    rows = tl.arange(0, ROWS)
    local = skipped + rows // form.HEADS
    head = i_c * form.HEADS + rows % form.HEADS
    t = own * form.LIST_TOKENS + local  # [ROWS]
    live = (local < form.LIST_TOKENS) & (t < Tq) & (head < form.G)
    pos = Sk - Tq + t
    dims = tl.arange(0, DP)
    inside = live[:, None] & (dims < D)[None, :]
    head = i_h * form.G + head
    token = q0 + t

    q_at = q + (i_b * q_strides.b + token * q_strides.t + head * EACH * q_strides.h)[:, None] + dims[None, :]
    do_at = do + (i_b * do_strides.b + token * do_strides.t + head * do_strides.h)[:, None] + dims[None, :]
    row_at = (i_b * (H * form.G * EACH) + head * EACH) * T + token
    do_tile = tl.load(do_at, mask=inside, other=0.0)  # [ROWS, DP]
    if FROM == 0:
        signal_q = tl.load(q_at, mask=inside, other=0.0)
        signal_lse = load_lse(lse + row_at, live)
        signal_delta = tl.load(delta + row_at, mask=live, other=0.0)
        signal_dq = tl.zeros([ROWS, DP], tl.float32)
    if TO == 2:
        noise_q = tl.load(q_at + q_strides.h, mask=inside, other=0.0)
        noise_lse = load_lse(lse + row_at + T, live)
        noise_delta = tl.load(delta + row_at + T, mask=live, other=0.0)
        noise_dq = tl.zeros([ROWS, DP], tl.float32)

    i_list += ((i_b * (2 if form.APART else 1) + (FROM if form.APART else 0)) * H + i_h) * NL
    bit = local // form.BLOCK_M
    steps, clear, low, clear_from, n = walk_of(i_list, pos_first, pos_last, walks.lengths, window, form)
    for e in range(0, steps):
        key, start, block_end = keys_of(e, walks.entries, i_list * NE, n, Sk, clear, low, clear_from, form)
        k_tile = load_keys(k, i_b, i_h, k0, key, start, block_end, k_strides, form)
        v_tile = load_keys(v, i_b, i_h, k0, key, start, block_end, v_strides, form)
        dweights = product(do_tile, tl.trans(v_tile))  # [ROWS, KEYS]
        member = pos >= 0
        if form.MEMBERS:
            member = members_of(e, walks.bits, i_list * NE, n, bit, form)
        if FROM == 0:
            dscores = _dscores(
                signal_q,
                k_tile,
                signal_lse,
                signal_delta,
                dweights,
                member,
                e >= clear,
                pos,
                key,
                block_end,
                window,
                scale,
                form,
            )
            signal_dq = product(dscores, k_tile, signal_dq)
        if TO == 2:
            dscores = _dscores(
                noise_q,
                k_tile,
                noise_lse,
                noise_delta,
                dweights,
                member,
                e >= clear,
                pos,
                key,
                block_end,
                window,
                scale,
                form,
            )
            noise_dq = product(dscores, k_tile, noise_dq)

    dq_at = dq + ((i_b * T + token) * (H * form.G * EACH) + head * EACH)[:, None] * D + dims[None, :]
    if FROM == 0:
        tl.store(dq_at, (signal_dq * scale).to(dq.dtype.element_ty), mask=inside)
    if TO == 2:
        lam_at = lam_logit + i_b * lam_strides.b + token * lam_strides.t + head * lam_strides.h
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
    arch = arch_of(q.device)
    described = takes_descriptors(domain, arch, k, v)
    tile, packing = query_tile("dq" if described else "dq_pointers", G, domain.block_m, D, q.dtype, arch)
    apart = domain.classes == 2
    lists = Lists(domain, packing.tokens, packing.rows, apart)
    walks, NL, NE = lists.built
    form = Form.of(lists, D, G, packing, tile, differential=classes == 2, described=described)
    # two lists would be walked as one, and two accumulators of wide heads do not fit the registers
    at_once = 1 if apart or D > 128 else classes
    for c in range(0, classes, at_once):
        _dq_kernel[(NL * lists.tiles * packing.chunks * B * H,)](
            q,
            describe(k, form.KEYS) if described else k,
            describe(v, form.KEYS) if described else v,
            do,
            lam_logit,
            lse,
            delta,
            dq,
            walks,
            strides_of(q),
            strides_of(k),
            strides_of(v),
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
            FROM=c,
            TO=c + at_once,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dq
