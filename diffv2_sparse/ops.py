"""Backends "triton" and "hopper": the fused kernels as operators that autograd and torch.compile understand.

`torch.library` operators, each a direct launch of `kernels/` (imported when first called): attention, forward and
backward, decoding, the choice of blocks, their summaries, and moving an offloaded cache's pages. Lists pass no
gradient, and neither does lse. "hopper" has kernels of its own for attention, for fewer shapes. The linear layers of a
step (`…_few`) are plain functions, which torch.compile is not to see. Source of the formulas: the kernels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .selection import BlockSelection


def obstacle(q: Tensor) -> str | None:
    """What keeps the kernels from taking such queries, in words; None if nothing does."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, not in {q.dtype}"
    if q.shape[-1] > 256:
        return f"it takes heads of at most 256 dimensions, not {q.shape[-1]}"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs tensors on a GPU, not on {q.device}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "it needs triton, which is not installed"
    return None


def hopper_obstacle(q: Tensor, selection: BlockSelection | None) -> str | None:
    """What keeps the Hopper kernels from such a call, in words; None if nothing does."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not in {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"it takes heads of 64 or 128 dimensions, not {q.shape[-1]}"
    if selection is not None and selection.block_n not in (64, 128):
        return f"it takes blocks of 64 or 128 keys, not {selection.block_n}"
    if not q.is_cuda:
        return f"it needs tensors on a GPU, not on {q.device}"
    try:
        from .kernels.hopper.probe import obstacle
    except ImportError:
        return "it needs triton, which is not installed"
    return obstacle(q.device.index)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None,
    *,
    scale: float,
    window: int | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool = True,
    hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments as `diff_attention`, already validated. Returns o `[B, T, HO, D]` and lse `[B, HQ, T]`, which is only
    sure to be there if asked for; differentiable but for lse.
    """
    q, scale = _scaled_up(q, scale)
    lists = None, None, cu_seqlens_q, cu_seqlens_k, 0, 0
    if selection is not None:
        block_m, block_n = selection.block_m, selection.block_n
        lists = selection.indices, selection.counts, cu_seqlens_q, cu_seqlens_k, block_m, block_n
    backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, lam_logit))
    o, lse, _ = _attention(q, k, v, lam_logit, *lists, scale, window, backward, return_lse or backward, hopper)
    return o, lse.detach()


hopper_attention = partial(triton_attention, hopper=True)  # for calls without `hopper_obstacle`


def triton_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None,
    *,
    scale: float,
) -> Tensor:
    """Arguments as `diff_attention_paged`, already validated. Returns o `[B, T, HO, D]`; no gradient."""
    q, scale = _scaled_up(q, scale)
    indices, counts, block_m = None, None, 0
    if selection is not None:
        indices, counts, block_m = selection.indices, selection.counts, selection.block_m
    return _decode(q, k_pages, v_pages, page_table, lengths, lam_logit, indices, counts, block_m, scale)


def _scaled_up(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same logits from a positive scale: the kernels take maxima before they scale."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


@torch.library.custom_op("diffv2_sparse::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
    window: int | None,
    save_noise: bool,
    save_lse: bool = True,
    hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, and what the backward needs: lse, and the noise half before λ; each empty unless it is to be saved."""
    if hopper:
        from .kernels.hopper.forward import forward
    else:
        from .kernels.forward import forward

    domain = _domain(q, k, indices, counts, cu_q, cu_k, block_m, block_n, window)
    with _on(q):
        inputs = *map(_rows, (q, k, v)), lam_logit, domain, scale
        return forward(*inputs, save_noise=save_noise, save_lse=save_lse)


@_attention.register_fake
def _(
    q,
    k,
    v,
    lam_logit,
    indices,
    counts,
    cu_q,
    cu_k,
    block_m,
    block_n,
    scale,
    window,
    save_noise,
    save_lse=True,
    hopper=False,
):
    B, T, HQ, D = q.shape
    o = q.new_empty(B, T, HQ if lam_logit is None else HQ // 2, D)
    o_noise = torch.empty_like(o) if save_noise and lam_logit is not None else o.new_empty(0)
    return o, q.new_empty((B, HQ, T) if save_lse else 0, dtype=torch.float32), o_noise


@torch.library.custom_op("diffv2_sparse::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    o: Tensor,
    lse: Tensor,
    o_noise: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
    window: int | None,
    hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and lam_logit (empty without it)."""
    if hopper:
        from .kernels.hopper.backward import backward
    else:
        from .kernels.backward import backward

    domain = _domain(q, k, indices, counts, cu_q, cu_k, block_m, block_n, window)
    with _on(q):
        transposed = _transposed(domain)
        do, q, k, v = map(_rows, (do, q, k, v))
        dq, dk, dv, dlam = backward(do, q, k, v, lam_logit, o, o_noise, lse, domain, transposed, scale)
    return dq, dk, dv, q.new_empty(0) if dlam is None else dlam


@_attention_backward.register_fake
def _(do, q, k, v, lam_logit, *rest):
    dlam = q.new_empty(0) if lam_logit is None else lam_logit.new_empty(lam_logit.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlam


def _save(ctx, inputs, output):
    q, k, v, lam_logit, indices, counts, cu_q, cu_k, *options, save_noise, save_lse, hopper = inputs
    ctx.options = *options, hopper
    if not save_lse or (lam_logit is not None and not save_noise):
        output = None
    ctx.saved = output is not None
    ctx.differential = lam_logit is not None
    ctx.save_for_backward(q, k, v, lam_logit, *(output or (None, None, None)), indices, counts, cu_q, cu_k)


def _gradients(ctx, do, *_):
    if not ctx.saved:
        raise RuntimeError("diffv2_sparse::attention: a backward needs save_noise and save_lse in the forward")
    dq, dk, dv, dlam = _attention_backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, dlam if ctx.differential else None, *(None,) * 11


_attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("diffv2_sparse::decode", mutates_args=())
def _decode(
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
    from .kernels.decode import decode

    if indices is not None:
        indices, counts = indices.contiguous(), counts.contiguous()
    with _on(q):
        q, k_pages, v_pages, page_table = map(_rows, (q, k_pages, v_pages, page_table))
        return decode(q, k_pages, v_pages, page_table, lengths.contiguous(), lam_logit, indices, counts, block_m, scale)


@_decode.register_fake
def _(q, k_pages, v_pages, page_table, lengths, lam_logit, indices, counts, block_m, scale):
    B, T, HQ, D = q.shape
    return q.new_empty(B, T, HQ if lam_logit is None else HQ // 2, D)


def triton_select(
    q: Tensor,
    summaries: Tensor,
    key_tokens: int | Tensor,
    *,
    mode: str,
    budgets: list[tuple[int, float]],
    block_m: int,
    block_n: int,
    sink_blocks: int,
    local_blocks: int,
    row_queries: str,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `select_blocks`, already validated; `budgets` are most blocks and mass of each class, the mass
    infinite for TopK. Returns indices and counts of a BlockSelection.
    """
    q, scale = _scaled_up(q, scale)
    lengths = key_tokens if isinstance(key_tokens, Tensor) else None
    return _select(
        q,
        summaries,
        lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        0 if lengths is not None else key_tokens,
        mode,
        [blocks for blocks, _ in budgets],
        [mass for _, mass in budgets],
        block_m,
        block_n,
        sink_blocks,
        local_blocks,
        row_queries == "first",
        scale,
    )


@torch.library.custom_op("diffv2_sparse::select", mutates_args=())
def _select(
    q: Tensor,
    summaries: Tensor,
    lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    S: int,
    mode: str,
    blocks: Sequence[int],
    masses: Sequence[float],
    block_m: int,
    block_n: int,
    sink_blocks: int,
    local_blocks: int,
    first_only: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """indices and counts; S counts where `lengths` is None."""
    from .kernels.candidates import Choice
    from .kernels.choose import select

    (B, T, HQ, D), (NC, H) = q.shape, summaries.shape[1:3]
    lengths = None if lengths is None else lengths.int()
    sizes = {"B": B, "T": T, "S": S, "H": H, "G": HQ // H, "D": D, "NC": NC}
    how = {"mode": mode, "first_only": first_only, "block_m": block_m, "block_n": block_n}
    choice = Choice(**sizes, **how, lengths=lengths, cu_q=cu_q, cu_k=cu_k)
    with _on(q):
        budgets = list(zip(blocks, masses))
        return select(_rows(q), _rows(summaries), choice, budgets, sink_blocks, local_blocks, scale)


@_select.register_fake
def _(q, summaries, lengths, cu_q, cu_k, S, mode, blocks, masses, block_m, block_n, sink, local, first_only, scale):
    sequences = 1 if cu_q is None else cu_q.shape[0] - 1
    NM = (q.shape[1] + sequences * (block_m - 1)) // block_m
    shape = q.shape[0], 2 if mode == "per_class" else 1, summaries.shape[2], NM
    return q.new_empty(*shape, max(blocks), dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("diffv2_sparse::summaries", mutates_args=())
def triton_summaries(k: Tensor, block_n: int, cu_k: Tensor | None) -> Tensor:
    """Mean keys, `[B, S // block_n, H, D]`, as `block_summaries`; those of packed sequences, bounded by `cu_k` int32
    `[N + 1]`, stand one after another, with zeros behind.
    """
    from .kernels.summaries import summaries

    with _on(k):
        return summaries(_rows(k), block_n, cu_k)


@triton_summaries.register_fake
def _(k, block_n, cu_k):
    B, S, H, D = k.shape
    return k.new_empty(B, S // block_n, H, D)


@torch.library.custom_op(
    "diffv2_sparse::fetch",
    mutates_args=("k_slots", "v_slots", "slot_of", "page_in", "order", "last_read", "claims", "clock", "fetched"),
)
def triton_fetch(
    indices: Tensor,
    counts: Tensor,
    page_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    slot_of: Tensor,
    page_in: Tensor,
    order: Tensor,
    last_read: Tensor,
    claims: Tensor,
    clock: Tensor,
    fetched: Tensor,
) -> Tensor:
    """Brings the pages on lists from the host's memory to slots; returns the page table of these, int32 `[B, H, NP]`.
    What it changes is in `OffloadedPool`.
    """
    from .kernels.fetch import fetch

    with _on(k_slots):
        lists = indices.contiguous(), counts.contiguous(), _rows(page_table)
        residence = k_slots, v_slots, slot_of, page_in, order, last_read, claims, clock, fetched
        return fetch(*lists, k_pages, v_pages, *residence)


@triton_fetch.register_fake
def _(indices, counts, page_table, *rest):
    return page_table.new_empty(page_table.shape)


@torch.library.custom_op("diffv2_sparse::copy_pages", mutates_args=("k_to", "v_to"))
def triton_copy_pages(
    k_from: Tensor, v_from: Tensor | None, k_to: Tensor, v_to: Tensor | None, origins: Tensor, places: Tensor
) -> None:
    """Copies pages by the device, which holds the numbers int64 `[n]`; the pages may be in pinned memory."""
    from .kernels.fetch import copy_pages

    with _on(origins):
        copy_pages(k_from, v_from, k_to, v_to, origins, places)


@triton_copy_pages.register_fake
def _(k_from, v_from, k_to, v_to, origins, places):
    return None


@torch.library.custom_op("diffv2_sparse::write_pages", mutates_args=("k_pages", "v_pages", "k_slots", "v_slots"))
def triton_write_pages(
    k: Tensor,
    v: Tensor,
    block: Tensor,
    offset: Tensor,
    slot_of: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
) -> None:
    """Writes k and v `[N, H, D]` to rows `offset` of blocks `block`, int64 `[N]`: to pages in pinned memory and to the
    slots that hold them.
    """
    from .kernels.fetch import write

    with _on(slot_of):
        rows = (x.to(k_pages.dtype).contiguous() for x in (k, v))
        write(*rows, block.contiguous(), offset.contiguous(), slot_of, k_pages, v_pages, k_slots, v_slots)


@triton_write_pages.register_fake
def _(k, v, block, offset, slot_of, k_pages, v_pages, k_slots, v_slots):
    return None


def project_few(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    turned: Sequence[bool],
    rings: Sequence[Tensor | None],
    head_dim: int,
    rotary: tuple[Tensor, Tensor],
    places: Tensor | None,
) -> list[Tensor]:
    """Projections of norm(x), x `[B, T, K]` of the weights' dtype, for few tokens, validated; no gradient.

    Args:
        norm: the weight of RMSNorm, `[K]`; weights: each `[N, K]`, contiguous.
        turned: whether a projection is turned by `rotary`, cos and sin float32 `[B, T, head_dim / 2]`.
        rings: `[B, H, R, head_dim]`, contiguous, where a projection is written to; None returns it, `[B, T, N]`.
        places: int64 `[B · T]`, in rings.
    """
    from .kernels.linear import Part, project

    x_rows, outs, parts = x.flatten(0, 1).contiguous(), [], []
    for weight, turn, ring in zip(weights, turned, rings):
        N = len(weight)
        if ring is None:
            outs.append(x.new_empty(*x.shape[:2], N))
            parts.append(Part(weight, outs[-1], N, N, head_dim, int(turn), 0))
        else:
            parts.append(Part(weight, ring, N, 0, ring.stride(1), int(turn), 1))
    with _on(x):
        angles = tuple(a.flatten(0, 1).contiguous() for a in rotary) if any(turned) else None
        project(x_rows, norm, eps, parts, head_dim, rotary=angles, places=places)
    return outs


def add_few(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y weightᵀ for few tokens, validated: y `[B, T, K]`, weight `[N, K]`, contiguous; no gradient."""
    from .kernels.linear import Part, project

    N, out = len(weight), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _on(x):
        rows = y.flatten(0, 1).contiguous()
        project(rows, None, 0.0, [Part(weight, out, N, N, N, 0, 0)], N, residual=x.contiguous())
    return out


def gate_few(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """silu(norm(x) gateᵀ) · (norm(x) upᵀ) for few tokens, validated: x `[B, T, K]`, gate and up `[N, K]`, contiguous;
    no gradient.
    """
    from .kernels.linear import gated

    with _on(x):
        return gated(x.flatten(0, 1).contiguous(), norm, eps, gate, up).unflatten(0, x.shape[:2])


def _domain(q, k, indices, counts, cu_q, cu_k, block_m, block_n, window):
    from .kernels.domain import Domain

    if indices is None:  # tiles as large as they come
        block_m, block_n = 1 << 20, 128
    return Domain(*q.shape[:2], *k.shape[1:3], window, indices, counts, block_m, block_n, cu_q, cu_k)


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(x: Tensor):
    """Launches go to the device that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _transposed(domain) -> tuple[Tensor, Tensor] | None:
    """Key block → rows, the key blocks of packed sequences counted one after another."""
    indices = domain.indices
    if indices is None:
        return None
    blocks, table = domain.pieces(domain.block_n, keys=True)
    if domain.packed:
        lengths, row_starts = domain.cu_k.diff(), domain.row_starts(domain.block_m)
        row = torch.arange(indices.shape[3], device=indices.device, dtype=torch.int32)
        sequence = torch.searchsorted(row_starts[1:], row, right=True).clamp(max=len(lengths) - 1)
        own = (lengths + domain.block_n - 1) // domain.block_n
        before = own.cumsum(0, dtype=torch.int32) - own
        own, before = own[sequence][:, None], before[sequence][:, None]
        inside = (indices >= 0) & (indices < own)
        indices = torch.where(inside, indices + before, -1)
    return BlockSelection(indices, domain.counts, domain.block_m, domain.block_n).transpose(blocks * domain.block_n)
