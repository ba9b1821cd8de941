"""Decoding: a few query tokens per sequence over pages of a cache, split over keys.

    o[p] = softmax(q_2p kᵀ · scale) v − sigmoid(lam_logit[p]) · softmax(q_2p+1 kᵀ · scale) v

One token gives a GPU too little to do, so several programs, the *splits*, share each walk over the selected pages: they
take its key tiles in turn, each writes its own maximum and sums, and a second kernel merges them in a fixed order and
subtracts the pair (Flash-Decoding, Dao et al., 2023). Tokens of one row × heads of one class fill a tile;
classes with lists of their own walk them apart, at the same time, so that pages on both lists come from the L2 cache
the second time. Grids follow from shapes alone, while lengths, lists and the page table stay on the device: a captured
graph stays valid while they change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import LOG2E, product, softmax_step
from .tiles import arch_of, cdiv, decode_tile, merge_tile, next_power_of_2, processors_of, splits_of


@triton.jit
def _page_of(step, list_at, table_at, NB, NP, P, LISTS: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr):
    """Key block and page of a walk's key tile, 0 and −1 where there is none; per key where a tile spans pages.

    A walk is made of the pages on a list, one after another; without lists, of all pages of the table.
    """
    at = step * KEYS
    if BLOCK_N % KEYS:
        at += tl.arange(0, KEYS)
    block = at // BLOCK_N
    if LISTS:
        block = tl.load(list_at + block, mask=block < NB, other=-1)
    page = tl.load(table_at + block, mask=(block >= 0) & (block < NP), other=-1)
    page = tl.where(page < P, page, -1)
    return tl.where(page >= 0, block, 0), page


@triton.jit(do_not_specialize=["T", "row_tokens", "NM", "NB", "NP", "P"])
def _decode_kernel(
    q,
    k_pages,
    v_pages,
    page_table,
    lengths,
    indices,
    counts,
    part_o,
    part_m,
    part_l,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kn,
    stride_vp,
    stride_vn,
    stride_tb,
    stride_th,
    T,
    row_tokens,
    H,
    NM,
    NB,
    NP,
    P,
    scale_log2,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * HEADS
    CHUNKS: tl.constexpr = (G // C + HEADS - 1) // HEADS  # tiles that share the heads of a class
    i_s = tl.program_id(1)
    splits = tl.num_programs(1)
    i_c = tl.program_id(0) % C
    pid = tl.program_id(0) // C
    i_head = pid % CHUNKS
    pid = pid // CHUNKS
    row_tiles = tl.cdiv(row_tokens, TOKENS)
    i_tile = pid % row_tiles
    i_row = pid // row_tiles % NM
    pid = pid // row_tiles // NM
    i_b = (pid // H).to(tl.int64)
    i_h = pid % H

    length = tl.load(lengths + i_b)
    table_at = page_table + i_b * stride_tb + i_h * stride_th
    i_list = ((i_b * C + i_c) * H + i_h) * NM + i_row
    list_at = indices + i_list * NB if LISTS else table_at
    offs = tl.arange(0, KEYS)
    block, page = _page_of(i_s, list_at, table_at, NB, NP, P, LISTS, BLOCK_N, KEYS)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DP)
    in_dims = (dims < D)[None, :]
    local = i_tile * TOKENS + rows // HEADS
    head = i_head * HEADS + rows % HEADS
    live = (local < row_tokens) & (i_row * row_tokens + local < T) & (head < G // C)
    t = i_row * row_tokens + local  # [ROWS]
    head = i_h * G + head * C + i_c
    pos = length - T + t
    pos_last = length - T + tl.minimum(i_row * row_tokens + tl.minimum(i_tile * TOKENS + TOKENS, row_tokens), T) - 1
    q_at = q + i_b * stride_qb + t.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + dims[None, :]
    q_tile = tl.load(q_at, mask=live[:, None] & in_dims, other=0.0)  # [ROWS, DP]

    walked = tl.minimum(pos_last + 1, NP * BLOCK_N)  # keys of the walk
    if LISTS:
        walked = tl.minimum(tl.load(counts + i_list), NB) * BLOCK_N
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for step in range(i_s, tl.cdiv(walked, KEYS), splits):
        at = step * KEYS + offs
        slot = at % BLOCK_N
        key = block * BLOCK_N + slot
        loaded = (page >= 0) & (at < walked) & (key <= pos_last)  # [KEYS]
        k_rows = page.to(tl.int64) * stride_kp + slot * stride_kn
        v_rows = page.to(tl.int64) * stride_vp + slot * stride_vn
        k_tile = tl.load(k_pages + k_rows[:, None] + dims[None, :], mask=loaded[:, None] & in_dims, other=0.0)
        v_tile = tl.load(v_pages + v_rows[:, None] + dims[None, :], mask=loaded[:, None] & in_dims, other=0.0)
        logits = product(q_tile, tl.trans(k_tile))
        logits = tl.where(loaded[None, :] & (key[None, :] <= pos[:, None]), logits, float("-inf"))
        weights, decay, m, l = softmax_step(logits, m, l, scale_log2, live, False)
        acc = product(weights.to(v_tile.dtype), v_tile, acc * decay[:, None])
        block, page = _page_of(step + splits, list_at, table_at, NB, NP, P, LISTS, BLOCK_N, KEYS)

    at = ((i_b * T + t) * (H * G) + head) * splits + i_s
    tl.store(part_m + at, m, mask=live)  # −∞ and 0 where nothing was seen
    tl.store(part_l + at, l, mask=live)
    tl.store(part_o + at[:, None] * D + dims[None, :], acc, mask=live[:, None] & in_dims)


@triton.jit
def _merged(part_o, part_m, part_l, row, dims, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    """The softmax of one head over all splits, `[BLOCK_D]`.

    Several threads add up the same sums, each beginning with a product of its own: fused with the addition, these would
    differ in their last bit, and which one counts would be a race.
    """
    at = row * splits + tl.arange(0, SPLITS)
    taken = tl.arange(0, SPLITS) < splits
    m = tl.load(part_m + at, mask=taken, other=float("-inf"))
    l = tl.load(part_l + at, mask=taken, other=0.0)
    o = tl.load(part_o + at[:, None] * D + dims[None, :], mask=taken[:, None] & (dims < D)[None, :], other=0.0)
    peak = tl.max(m, 0)
    weights = tl.exp2(m - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights * l, 0)
    return tl.sum(weights[:, None] * o, 0) / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["T", "splits"])
def _merge_kernel(
    part_o,
    part_m,
    part_l,
    lam_logit,
    o,
    stride_lb,
    stride_lt,
    stride_lh,
    T,
    HO,
    splits,
    D: tl.constexpr,
    DIFF: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_o = tl.program_id(0)
    i_b = (i_o // HO // T).to(tl.int64)
    i_t = i_o // HO % T
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_ho = i_o % HO
    i_o = i_o.to(tl.int64)
    if DIFF:
        lam = tl.sigmoid(tl.load(lam_logit + i_b * stride_lb + i_t * stride_lt + i_ho * stride_lh).to(tl.float32))
        signal = _merged(part_o, part_m, part_l, 2 * i_o, dims, splits, D, SPLITS)
        result = signal - lam * _merged(part_o, part_m, part_l, 2 * i_o + 1, dims, splits, D, SPLITS)
    else:
        result = _merged(part_o, part_m, part_l, i_o, dims, splits, D, SPLITS)
    tl.store(o + i_o * D + dims, result.to(o.dtype.element_ty), mask=dims < D)


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    lam_logit: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    block_m: int,
    scale: float,
) -> Tensor:
    """Attention of the last T tokens of each sequence over its pages, for validated inputs.

    Args:
        q: `[B, T, HQ, D]`; k_pages, v_pages: `[P, block_n, D]`, each with D contiguous; lam_logit `[B, T, HQ // 2]` or
            None.
        page_table: int32 `[B, H, NP]`, the last dimension contiguous; lengths: int32 `[B]`.
        indices, counts: contiguous, as in BlockSelection; None attends to every page.
        scale: of the logits, > 0.

    Returns:
        o `[B, T, HO, D]` in q's dtype.
    """
    B, T, HQ, D = q.shape
    H, NP = page_table.shape[1:]
    P, block_n = k_pages.shape[:2]
    _, C, _, NM, NB = (1, 1, 1, 1, NP) if indices is None else indices.shape
    row_tokens = T if indices is None else min(block_m, T)
    G = HQ // H
    diff = lam_logit is not None
    arch = arch_of(q.device)
    tile, heads, tokens = decode_tile(row_tokens, G // C, D, q.dtype, arch)
    programs = C * cdiv(G // C, heads) * cdiv(row_tokens, tokens) * NM * B * H
    splits = splits_of(programs, cdiv(NB * block_n, tile.keys), processors_of(q.device))
    part_o = torch.empty(B, T, HQ, splits, D, dtype=torch.float32, device=q.device)
    part_m, part_l = torch.empty(2, B, T, HQ, splits, dtype=torch.float32, device=q.device)
    _decode_kernel[(programs, splits)](
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        indices,
        counts,
        part_o,
        part_m,
        part_l,
        *q.stride()[:3],
        *k_pages.stride()[:2],
        *v_pages.stride()[:2],
        *page_table.stride()[:2],
        T,
        row_tokens,
        H,
        NM,
        NB,
        NP,
        P,
        scale * LOG2E.value,
        G=G,
        C=C,
        D=D,
        LISTS=indices is not None,
        BLOCK_N=block_n,
        TOKENS=tokens,
        HEADS=heads,
        KEYS=tile.keys,
        DP=max(16, next_power_of_2(D)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    o = torch.empty(B, T, HQ // 2 if diff else HQ, D, dtype=q.dtype, device=q.device)
    padded, dims, warps = merge_tile(splits, D)
    _merge_kernel[(B * T * o.shape[2], cdiv(D, dims))](
        part_o,
        part_m,
        part_l,
        lam_logit,
        o,
        *(lam_logit.stride() if diff else (0, 0, 0)),
        T,
        o.shape[2],
        splits,
        D=D,
        DIFF=diff,
        SPLITS=padded,
        BLOCK_D=dims,
        num_warps=warps,
        enable_fp_fusion=False,  # see `_merged`
    )
    return o
