"""dk and dv of block-sparse differential attention, by key blocks: each walks the query rows that chose it.

    dk = scale · (dS_signalᵀ q_signal + dS_noiseᵀ q_noise),   dv = (P_signal − λ P_noise)ᵀ dO

Rows that are shorter than a tile are gathered, so that no product is spent on tokens that did not choose the block.
Each gradient is summed in one program in the order of the list: deterministic. See `backward.py` for dS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain
from .primitives import LOG2E, load_lse, padded, product, sequence_of, strides_of, visible
from .tiles import arch_of, cdiv, next_power_of_2, tile_sizes


@triton.jit
def rows_before(rows, begin, end, limit):
    """The first entry of an ascending list, between begin and end, that is `limit` or more."""
    while begin < end:
        middle = (begin + end) // 2
        if tl.load(rows + middle) < limit:
            begin = middle + 1
        else:
            end = middle
    return begin


@triton.jit(do_not_specialize=["T", "S", "NN", "NR", "window"])
def _dkv_kernel(
    q,
    k,
    v,
    do,
    lam_logit,
    lse,
    delta,
    dk,
    dv,
    offsets,
    rows,
    table,
    row_starts,
    cu_q,
    cu_k,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    lam_strides,
    T,
    S,
    BH,
    H,
    NN,
    NR,
    window,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DIFF: tl.constexpr,
    C: tl.constexpr,
    LISTS: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    GATHER: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    """Walks the rows that chose a key block; GATHER of them fill a tile where BLOCK_M < TOKENS, else a row is cut.

    Scores stand transposed, keys × queries: weights then feed the products as they leave the registers. dk or dv None:
    the other is computed alone.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    EACH: tl.constexpr = 2 if DIFF else 1
    STEP: tl.constexpr = GATHER if LISTS else TOKENS
    PARTS: tl.constexpr = (BLOCK_M + TOKENS - 1) // TOKENS if LISTS and GATHER == 1 else 1
    pid = tl.program_id(0).to(tl.int64)
    # the first block may be everyone's: of all heads, it comes first; then one head after another
    if pid < BH * SUB:
        i_bh = pid % BH
        i_block = tl.full((), 0, tl.int64)
        sub = (pid // BH).to(tl.int32)
    else:
        each = (NN - 1) * SUB
        i_bh = (pid - BH * SUB) // each
        left = (pid - BH * SUB) % each
        i_block = 1 + left // SUB
        sub = (left % SUB).to(tl.int32)
    i_b = i_bh // H
    i_h = i_bh % H
    own, sequence, q0, Tq, k0, Sk = sequence_of(i_block, table, cu_q, cu_k, T, S, PACKED)
    key_first = own * BLOCK_N + sub * KEYS
    block_end = tl.minimum(own * BLOCK_N + BLOCK_N, Sk)
    if key_first >= block_end:
        return
    row0 = 0
    if PACKED and LISTS:
        row0 = tl.load(row_starts + sequence)

    key = key_first + tl.arange(0, KEYS)
    dims = tl.arange(0, DP)
    loaded = (key < block_end)[:, None] & (dims < D)[None, :]
    token_k = k0 + key
    k_at = k + (i_b * k_strides.b + token_k * k_strides.t + i_h * k_strides.h)[:, None] + dims[None, :]
    v_at = v + (i_b * v_strides.b + token_k * v_strides.t + i_h * v_strides.h)[:, None] + dims[None, :]
    k_tile = tl.load(k_at, mask=loaded, other=0.0)
    v_tile = tl.load(v_at, mask=loaded, other=0.0)
    DK: tl.constexpr = dk is not None
    DV: tl.constexpr = dv is not None
    if DK:
        dk_tile = tl.zeros([KEYS, DP], tl.float32)
    if DV:
        dv_tile = tl.zeros([KEYS, DP], tl.float32)

    local = tl.arange(0, ROWS) // HEADS
    ahead = Sk - Tq  # query t stands at key position ahead + t
    for part in tl.static_range(C * CHUNKS):  # with C = 1 both classes at once
        in_group = (part % CHUNKS) * HEADS + tl.arange(0, ROWS) % HEADS
        head = i_h * G + in_group
        # the walk, in entries of the list or in tokens: what cannot see the tile, what sees it partly, then the rest
        if LISTS:
            at = (i_b * C + part // CHUNKS) * H + i_h
            rows_at = rows + at * NR
            offsets_at = offsets + at * (NN + 1) + i_block
            high = tl.load(offsets_at + 1)
            low_row = row0 + tl.maximum(key_first - ahead, 0) // BLOCK_M
            low = rows_before(rows_at, tl.load(offsets_at), high, low_row)
            middle = rows_before(rows_at, low, high, row0 + tl.cdiv(tl.maximum(block_end - 1 - ahead, 0), BLOCK_M))
        else:
            low = tl.maximum(key_first - ahead, 0)
            high = Tq
            if WINDOWED:
                high = tl.minimum(high, tl.maximum(block_end - 1 + window - ahead, low))
            middle = tl.minimum(tl.maximum(block_end - 1 - ahead, low), high)
        if WINDOWED:
            middle = high
        for MASKED in tl.static_range(2):
            begin = low if MASKED else middle
            end = middle if MASKED else high
            for e in range(0, tl.cdiv(end - begin, STEP) * PARTS):
                if not LISTS:
                    t = begin + e * TOKENS + local
                    live = t < end
                elif GATHER == 1:
                    within = (e % PARTS) * TOKENS + local
                    t = (tl.load(rows_at + begin + e // PARTS) - row0) * BLOCK_M + within
                    live = (within < BLOCK_M) & (t < Tq)
                else:
                    entry = begin + e * GATHER + local // BLOCK_M
                    live = (entry < end) & (local < GATHER * BLOCK_M)
                    t = (tl.load(rows_at + entry, mask=live, other=0) - row0) * BLOCK_M + local % BLOCK_M
                    live = live & (t < Tq)
                live = live & (in_group < G)
                inside = live[:, None] & (dims < D)[None, :]
                token = q0 + t
                q_at = (
                    q + (i_b * q_strides.b + token * q_strides.t + head * EACH * q_strides.h)[:, None] + dims[None, :]
                )
                do_at = do + (i_b * do_strides.b + token * do_strides.t + head * do_strides.h)[:, None] + dims[None, :]
                row_at = (i_b * (H * G * EACH) + head * EACH) * T + token
                do_tile = tl.load(do_at, mask=inside, other=0.0)
                if DK:
                    dweights = product(v_tile, tl.trans(do_tile))  # [KEYS, ROWS]
                combined = tl.zeros([KEYS, ROWS], tl.float32)
                if MASKED:
                    seen = visible((ahead + t)[None, :], key[:, None], block_end, window, WINDOWED)
                if C == 1 or part < CHUNKS:
                    q_tile = tl.load(q_at, mask=inside, other=0.0)
                    shift = load_lse(lse + row_at, live)
                    signal = tl.exp2(product(k_tile, tl.trans(q_tile)) * (scale * LOG2E) - shift[None, :])
                    if MASKED:
                        signal = tl.where(seen, signal, 0.0)
                    if DK:
                        own_delta = tl.load(delta + row_at, mask=live, other=0.0)
                        dscores = signal * (dweights - own_delta[None, :])
                        dk_tile = product(dscores.to(q_tile.dtype), q_tile, dk_tile)
                    combined = signal
                if DIFF and (C == 1 or part >= CHUNKS):
                    q_tile = tl.load(q_at + q_strides.h, mask=inside, other=0.0)
                    lam_at = lam_logit + i_b * lam_strides.b + token * lam_strides.t + head * lam_strides.h
                    lam = tl.sigmoid(tl.load(lam_at, mask=live, other=0.0).to(tl.float32))
                    shift = load_lse(lse + row_at + T, live)
                    noise = tl.exp2(product(k_tile, tl.trans(q_tile)) * (scale * LOG2E) - shift[None, :])
                    noise = noise * -lam[None, :]
                    if MASKED:
                        noise = tl.where(seen, noise, 0.0)
                    if DK:
                        own_delta = tl.load(delta + row_at + T, mask=live, other=0.0)
                        dscores = noise * (dweights - own_delta[None, :])
                        dk_tile = product(dscores.to(q_tile.dtype), q_tile, dk_tile)
                    combined += noise
                if DV:
                    dv_tile = product(combined.to(do_tile.dtype), do_tile, dv_tile)

    out = ((i_b * S + token_k) * H + i_h)[:, None] * D + dims[None, :]
    if DK:
        tl.store(dk + out, (dk_tile * scale).to(dk.dtype.element_ty), mask=loaded)
    if DV:
        tl.store(dv + out, dv_tile.to(dv.dtype.element_ty), mask=loaded)


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
    """dk and dv, like k and v; `transposed` as `backward` takes it."""
    B, T, HQ, D = q.shape
    H = k.shape[2]
    diff = lam_logit is not None
    G = HQ // (2 if diff else 1) // H
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    tile = tile_sizes(D, q.dtype, arch_of(q.device), "dkv")
    keys = min(tile.keys, max(16, next_power_of_2(domain.block_n)))
    sub = cdiv(domain.block_n, keys)
    block_n = domain.block_n
    if transposed is None:
        block_n, sub = keys, 1
    heads = min(next_power_of_2(G), tile.rows)
    tokens = tile.rows // heads
    NN, table = domain.pieces(block_n, keys=True)
    offsets, rows = transposed or (None, None)
    # two accumulators of wide heads do not fit the registers
    for out in ((dk, dv),) if D <= 128 else ((dk, None), (None, dv)):
        _dkv_kernel[(NN * sub * B * H,)](
            q,
            k,
            v,
            do,
            lam_logit,
            lse,
            delta,
            *out,
            offsets,
            rows,
            table,
            None if rows is None else domain.row_starts(domain.block_m),
            domain.cu_q,
            domain.cu_k,
            strides_of(q),
            strides_of(k),
            strides_of(v),
            strides_of(do),
            strides_of(lam_logit),
            T,
            k.shape[1],
            B * H,
            H,
            NN,
            0 if rows is None else rows.shape[-1],
            domain.window or 0,
            scale,
            G=G,
            D=D,
            DIFF=diff,
            C=domain.classes,
            LISTS=rows is not None,
            PACKED=domain.packed,
            WINDOWED=domain.window is not None,
            BLOCK_M=domain.block_m,
            BLOCK_N=block_n,
            SUB=sub,
            GATHER=max(1, tokens // domain.block_m),
            TOKENS=tokens,
            HEADS=heads,
            CHUNKS=cdiv(G, heads),
            KEYS=keys,
            DP=padded(D),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dk, dv
