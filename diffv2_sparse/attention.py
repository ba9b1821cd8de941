"""The public attention functions: inputs are validated once, then handed to one backend.

    o[p] = softmax(q_2p kᵀ · scale) v − sigmoid(lam_logit[p]) · softmax(q_2p+1 kᵀ · scale) v

`backend="auto"` takes, on CUDA: for dense and windowed calls in 16 bit flash-attn where it is installed; else SDPA for
plain dense calls; for all others the fused kernels, "hopper" where it can and rows fill its tiles, else "triton"; and
"torch" where those cannot run. On a CPU it takes "torch", which hands dense calls to SDPA. Paged calls go to "triton"
on CUDA, else to "torch". A backend that is named is used or raises; it never falls back. Source: microsoft/unilm,
Diff-Transformer-V2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .selection import BlockSelection, check_cu_seqlens

if TYPE_CHECKING:
    from .cache import PagedKV

BACKENDS = ("auto", "hopper", "triton", "torch", "flex", "flash", "reference")
FULL_TILE = 128  # query vectors of the Hopper kernels; they walk together what shorter rows chose apart
PAGED_BACKENDS = ("auto", "triton", "torch", "xformers", "flash")


def diff_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Differential attention (DIFF V2), causal; dense, windowed, or restricted to selected key blocks.

    Args:
        q: `[B, T, HQ, D]`. Even heads are signal, odd heads the noise of the same pair; HQ / H heads share one KV head.
        k, v: `[B, S, H, D]`, T ≤ S. Query t stands at key position S − T + t.
        lam_logit: `[B, T, HQ // 2]`, before the sigmoid; None for ordinary attention, with as many output heads as
            query heads.
        selection: key blocks per KV head and row of queries; None is dense. Only shapes are checked here: call
            `selection.validate` on hand-built lists. Together with `window` it is their intersection.
        scale: of the logits; D ** -0.5 by default.
        window: a token sees itself and the `window − 1` before it.
        backend: "auto", "hopper" (H100 and H200; 16 bit, heads of 64 or 128, key blocks of 64 or 128), "triton"
            (CUDA), "torch" (any device), "flex" (FlexAttention), "flash" (flash-attn; dense and windowed) or
            "reference".
        return_lse: also return the log-sum-exp of each head's logits; no gradient flows through it.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, bounds of N packed sequences; then q is `[1, ΣT, HQ, D]`, k and v
            `[1, ΣS, H, D]`.

    Returns:
        o `[B, T, HO, D]` in q's dtype, HO = HQ // 2 (HQ without lam_logit); with `return_lse` also lse float32 (float64
        for float64) `[B, HQ, T]`, natural logarithm. A token with no visible selected key gets 0 from that class, lse
        −inf and zero gradients.

    Raises:
        ValueError: shapes, dtypes or devices disagree; HQ is no multiple of H, or HQ / H is odd with lam_logit (a pair
            would straddle two groups); T > S; a selection with a wrong number of rows; a backend that cannot do what
            is asked.
        ImportError: the named backend's package is not installed.
    """
    packed = _check_call(q, k, v, lam_logit, selection, window, cu_seqlens_q, cu_seqlens_k)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dense = selection is None and window is None
    plain = dense and not packed and not return_lse  # SDPA's case
    if backend == "auto":
        backend = _automatic(q, selection, plain)
    inputs, span = (q, k, v, lam_logit), {"scale": scale, "window": window}
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if backend == "reference":
        from .reference import reference_attention

        return reference_attention(*inputs, selection, **span, **bounds, return_lse=return_lse)
    if backend == "flash":
        from .adapters import flash_attention

        if selection is not None:
            raise ValueError('backend: "flash" takes no selection; "torch" and "flex" do')
        return flash_attention(*inputs, **span, **bounds, return_lse=return_lse)
    if backend == "flex":
        from .adapters import flex_attention

        if packed:
            raise ValueError('backend: "flex" takes no cu_seqlens; "torch" does')
        return flex_attention(*inputs, selection, **span, return_lse=return_lse)
    if backend in ("hopper", "triton"):
        from .ops import hopper_attention, triton_attention

        if reason := _kernels_obstacle(backend, q, selection):
            instead = "torch" if backend == "triton" or _kernels_obstacle("triton", q, selection) else "triton"
            raise ValueError(f'backend: "{backend}": {reason}; "{instead}" would do')
        attend = hopper_attention if backend == "hopper" else triton_attention
        o, lse = attend(*inputs, selection, **span, **bounds, return_lse=return_lse)
        return (o, lse) if return_lse else o
    if plain and (q.shape[1] in (1, k.shape[1]) or q.is_cuda):
        from .adapters import sdpa_attention

        return sdpa_attention(*inputs, scale=scale)
    from .blockwise import blockwise_attention

    o, lse = blockwise_attention(*inputs, selection, **span, **bounds, return_lse=return_lse)
    return (o, lse) if return_lse else o


def diff_attention_paged(
    q: Tensor,
    lam_logit: Tensor | None,
    pages: PagedKV,
    selection: BlockSelection | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differential attention of the last T tokens of each sequence over a paged cache; for decoding, without gradients.

    Args:
        q: `[B, T, HQ, D]`. Query t of sequence b stands at key position pages.lengths[b] − T + t.
        lam_logit: `[B, T, HQ // 2]`, or None for ordinary attention.
        pages: keys and values, one page = one key block of one KV head.
        selection: its `block_n` is the page size; None attends to everything.
        scale: of the logits; D ** -0.5 by default.
        backend: "auto", "triton" (CUDA), "torch" (any device), "xformers" (CUDA, 16 bit, pages of a multiple of 64
            keys, D a power of two from 16 to 512; it folds query tokens into the batch, so for few of them) or "flash"
            (flash-attn; dense, 16 bit, pages of a multiple of 256 keys). Of those for CUDA nothing is read back to the
            host, so graphs can hold them.

    Returns:
        `[B, T, HO, D]` in q's dtype. A query before its sequence's first key gets 0.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the selection's blocks are no pages of this cache, or a backend
            that cannot do what is asked.
        ImportError: xFormers or flash-attn is named and cannot be imported.
    """
    if backend not in PAGED_BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(PAGED_BACKENDS)} for paged keys, got {backend!r}")
    if not all(hasattr(pages, name) for name in ("k_pages", "v_pages", "page_table", "lengths")):
        raise ValueError(f"pages: expected a PagedKV, got {type(pages).__name__}")
    k_pages, v_pages, page_table = pages.k_pages, pages.v_pages, pages.page_table
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: expected [B, T, HQ, D], no 0 among them, got shape {tuple(q.shape)}")
    B, T, HQ, D = q.shape
    if page_table.ndim != 3 or page_table.shape[0] != B or pages.lengths.shape != (B,):
        raise ValueError(
            f"pages: expected page_table [{B}, H, NP] and lengths [{B}] to go with q, "
            f"got {tuple(page_table.shape)} and {tuple(pages.lengths.shape)}"
        )
    for name in ("page_table", "lengths"):
        x = getattr(pages, name)
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(f"pages: expected {name} int32 on {q.device} like q, got {x.dtype} on {x.device}")
    if 0 in page_table.shape or 0 in k_pages.shape:
        raise ValueError(f"pages: expected at least one, got {tuple(page_table.shape)} of {tuple(k_pages.shape)}")
    if k_pages.ndim != 3 or k_pages.shape != v_pages.shape or k_pages.shape[2] != D:
        raise ValueError(
            f"pages: expected k_pages and v_pages [P, block_n, {D}], got {tuple(k_pages.shape)}, {tuple(v_pages.shape)}"
        )
    _check_heads(q, page_table.shape[1], lam_logit)
    _check_like_q(q, k_pages=k_pages, v_pages=v_pages)
    if selection is not None:
        _check_selection(selection, q, page_table.shape[1], lam_logit, None)
        if selection.block_n != k_pages.shape[1]:
            raise ValueError(f"selection: expected block_n {k_pages.shape[1]}, the page size, got {selection.block_n}")
    attend = _paged_backend(backend, q)
    scale = D**-0.5 if scale is None else scale
    with torch.no_grad():
        return attend(q, k_pages, v_pages, page_table, pages.lengths, lam_logit, selection, scale=scale)


def _paged_backend(backend: str, q: Tensor):
    if backend == "xformers":
        from .xformers_paged import xformers_paged

        return xformers_paged
    if backend == "flash":
        from .adapters import flash_paged

        return flash_paged
    from .blockwise import blockwise_paged
    from .ops import obstacle, triton_paged

    reason = obstacle(q)
    if backend == "auto":
        backend = "triton" if q.is_cuda and reason is None else "torch"
    if backend == "triton" and reason:
        raise ValueError(f'backend: "triton": {reason}; "torch" would do')
    return triton_paged if backend == "triton" else blockwise_paged


def _automatic(q: Tensor, selection: BlockSelection | None, plain: bool) -> str:
    if not q.is_cuda:
        return "torch"
    if selection is None and q.dtype in (torch.float16, torch.bfloat16):
        from .adapters import flash_available

        if flash_available():
            return "flash"
    if plain:
        return "torch"
    fills = selection is None or selection.block_m * (q.shape[2] // selection.indices.shape[2]) >= FULL_TILE
    kernels = ("hopper", "triton") if fills else ("triton",)
    return next((name for name in kernels if not _kernels_obstacle(name, q, selection)), "torch")


def _kernels_obstacle(backend: str, q: Tensor, selection: BlockSelection | None) -> str | None:
    from .ops import hopper_obstacle, obstacle

    return hopper_obstacle(q, selection) if backend == "hopper" else obstacle(q)


def _check_call(q, k, v, lam_logit, selection, window, cu_seqlens_q, cu_seqlens_k) -> bool:
    """Returns whether the call is packed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected floating point [B, tokens, heads, D], no 0 among them, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    B, T, _, D = q.shape
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected [{B}, S, H, {D}] to go with q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected shape {tuple(k.shape)} like k, got {tuple(v.shape)}")
    _check_heads(q, k.shape[2], lam_logit)
    _check_like_q(q, k=k, v=v)
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window: expected a positive int, got {window!r}")
    packed = check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, B, T, k.shape[1], q.device)
    S = k.shape[1]
    if T > S:
        raise ValueError(f"q: expected at most as many queries as keys under causality, got T = {T} > S = {k.shape[1]}")
    if selection is not None:
        _check_selection(selection, q, k.shape[2], lam_logit, cu_seqlens_q)
    return packed


def _check_heads(q: Tensor, H: int, lam_logit: Tensor | None) -> None:
    B, T, HQ, _ = q.shape
    if H == 0 or HQ % H:
        raise ValueError(f"q: expected HQ a multiple of the {H} KV heads, got HQ = {HQ}")
    if lam_logit is None:
        return
    if (HQ // H) % 2:
        raise ValueError(
            f"q: differential attention needs an even number of query heads per KV head, got {HQ} / {H}: a pair would "
            "straddle two groups"
        )
    if lam_logit.shape != (B, T, HQ // 2):
        raise ValueError(f"lam_logit: expected [{B}, {T}, {HQ // 2}], got {tuple(lam_logit.shape)}")
    if not lam_logit.is_floating_point():
        raise ValueError(f"lam_logit: expected floating point, got {lam_logit.dtype}")
    if lam_logit.device != q.device:
        raise ValueError(f"lam_logit: expected on {q.device} like q, got {lam_logit.device}")


def _check_like_q(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")


def _check_selection(selection, q: Tensor, H: int, lam_logit: Tensor | None, cu_seqlens_q: Tensor | None) -> None:
    if not isinstance(selection, BlockSelection):
        raise ValueError(f"selection: expected a BlockSelection or None, got {type(selection).__name__}")
    selection.check_rows(q.shape[0], q.shape[1], H, cu_seqlens_q)
    if selection.num_classes == 2 and lam_logit is None:
        raise ValueError("selection: lists per class (C = 2) need lam_logit; ordinary attention has one class")
    if selection.indices.device != q.device:
        raise ValueError(f"selection: expected on {q.device} like q, got {selection.indices.device}")
