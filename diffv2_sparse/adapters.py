"""Peers of our own kernels behind the same contract: SDPA, flash-attn and FlexAttention.

A peer knows nothing of pairs. Each adapter runs ordinary softmax attention over all HQ query heads and combines the
pairs afterwards,

    o[p] = o_2p − sigmoid(lam_logit[p]) · o_2p+1

so the subtraction costs one pass over memory. Inputs arrive validated by `attention.py`; an adapter refuses only what
its peer cannot do. Sources: the documentation of torch's scaled_dot_product_attention and flex_attention, and of
flash-attn.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import BlockSelection

QUERY_CHUNK = 512  # query tokens that share one materialised mask, where SDPA has no bottom-right causal kernel
FLEX_BLOCK = 128  # FlexAttention's own block size, for dense and windowed attention
FLASH_PAGE = 256  # keys; pages of flash-attn's cache are multiples of it


def combine_pairs(o: Tensor, lam_logit: Tensor | None) -> Tensor:
    """Subtracts each noise head from its signal head.

    Args:
        o: [B, T, HQ, D], attention output of every query head; even heads are signal.
        lam_logit: [B, T, HQ // 2], before the sigmoid; None returns `o` as it is.

    Returns:
        [B, T, HQ // 2, D] in o.dtype. For 16-bit inputs the sigmoid and the subtraction are done in float32.
    """
    if lam_logit is None:
        return o
    lam = torch.sigmoid(lam_logit.to(torch.promote_types(lam_logit.dtype, torch.float32)))
    return (o[:, :, 0::2] - lam[..., None] * o[:, :, 1::2]).to(o.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, lam_logit: Tensor | None, *, scale: float) -> Tensor:
    """Dense causal attention through `scaled_dot_product_attention`, which picks its own kernel.

    Memory: nothing of size T × S on CUDA in 16 bit. Elsewhere K and V are expanded to HQ heads and, for 1 < T < S, one
    boolean mask of QUERY_CHUNK × S stands in memory at a time (autograd keeps them all).

    Args:
        q: [B, T, HQ, D].
        k, v: [B, S, H, D].
        lam_logit: [B, T, HQ // 2], or None for ordinary attention.

    Returns:
        [B, T, HO, D] in q.dtype, differentiable.
    """
    T, HQ, S, H = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    grouped = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)  # the fused kernels take GQA as it is
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    if not grouped and HQ != H:
        k, v = (x.repeat_interleave(HQ // H, dim=1) for x in (k, v))
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=grouped)
    if T == S:
        o = attend(q, k, v, is_causal=True)
    elif T == 1:
        o = attend(q, k, v)
    elif grouped:
        from torch.nn.attention.bias import causal_lower_right

        o = attend(q, k, v, attn_mask=causal_lower_right(T, S))
    else:
        parts = []
        for start in range(0, T, QUERY_CHUNK):
            rows = q[:, :, start : start + QUERY_CHUNK]
            seen = S - T + start + rows.shape[2]  # no query of the chunk sees a later key
            mask = torch.ones(rows.shape[2], seen, dtype=torch.bool, device=q.device).tril(S - T + start)
            parts.append(attend(rows, k[:, :, :seen], v[:, :, :seen], attn_mask=mask))
        o = torch.cat(parts, dim=2)
    return combine_pairs(o.transpose(1, 2), lam_logit)


@functools.cache
def flash_available() -> bool:
    """Whether flash-attn's functions can be imported; the bare namespace that FlashAttention-4 installs lacks them."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True


def _require_flash(q: Tensor) -> None:
    if not flash_available():
        raise ImportError(
            "backend: 'flash' needs the package flash-attn, and flash_attn.flash_attn_func cannot be imported here; "
            "backend='auto' takes SDPA for dense attention, backend='torch' runs anywhere"
        )
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"backend: 'flash' takes float16 or bfloat16 on CUDA, got {q.dtype} on {q.device}; "
            "backend='torch' takes any"
        )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    *,
    scale: float,
    window: int | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense or windowed causal attention through flash-attn ≥ 2.7.

    Args and results as `diff_attention`, packed form included. The lse is a value only: flash-attn passes no gradient
    through it.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: the tensors are not 16-bit CUDA tensors.
    """
    _require_flash(q)
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1 if window is None else window - 1, 0),
        "return_attn_probs": return_lse,  # flash-attn's name for (out, lse, ...)
    }
    if cu_seqlens_q is None:
        o = flash_attn_func(q, k, v, **options)
    else:
        longest = [int(lengths.diff().max()) for lengths in (cu_seqlens_q, cu_seqlens_k)]
        o = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k, *longest, **options)
    lse = None
    if return_lse:
        o, lse = o[0], o[1].detach()
    if cu_seqlens_q is not None:  # [ΣT, HQ, D], [HQ, ΣT]
        o, lse = o[None], None if lse is None else lse[None]
    o = combine_pairs(o, lam_logit)
    return (o, lse) if return_lse else o


def flash_paged(
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
    """Dense decoding through flash-attn's paged cache: KV heads are folded into the batch, as each has its own pages.

    Arguments as `diff_attention_paged`, already validated. Returns o `[B, T, HO, D]`; no gradient. An entry of the page
    table that names no page is read as the nearest one that exists.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: a selection, block_n no multiple of FLASH_PAGE, or no 16-bit CUDA tensors.
    """
    P, block_n, D = k_pages.shape
    if selection is not None:
        raise ValueError('backend: "flash" takes no selection; "triton" and "xformers" do')
    if block_n % FLASH_PAGE:
        raise ValueError(
            f'pages: backend "flash" needs block_n a multiple of {FLASH_PAGE}, got {block_n}; "triton" takes any'
        )
    _require_flash(q)
    from flash_attn import flash_attn_with_kvcache

    B, T, HQ, _ = q.shape
    H = page_table.shape[1]
    o = flash_attn_with_kvcache(
        q.unflatten(2, (H, -1)).transpose(1, 2).flatten(0, 1),  # [B · H, T, G, D]
        k_pages[:, :, None],
        v_pages[:, :, None],
        cache_seqlens=lengths.repeat_interleave(H, output_size=B * H),
        block_table=page_table.clamp(0, P - 1).flatten(0, 1),
        softmax_scale=scale,
        causal=True,
    )
    o = o.unflatten(0, (B, H)).transpose(1, 2).flatten(2, 3)
    before_the_first = lengths[:, None] - T + torch.arange(T, device=q.device) < 0
    return combine_pairs(o.masked_fill(before_the_first[:, :, None, None], 0), lam_logit)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None,
    *,
    scale: float,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense, windowed or block-selected attention through FlexAttention; not for the packed form.

    On CUDA the kernel is compiled, once for each shape, and skips the blocks that are not listed. On a CPU
    FlexAttention runs eagerly: every score is in memory, the result is exact, and there is no backward.

    Args and results as `diff_attention`.

    Raises:
        ValueError: a gradient on a CPU, float64 on CUDA, or block sizes that FlexAttention's kernels cannot tile.
    """
    tensors = [x.transpose(1, 2) for x in (q, k, v)]  # [B, heads, tokens, D]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not learns:
        tensors = [x.detach() for x in tensors]  # FlexAttention refuses a leaf on a CPU even under no_grad
    B, T, HQ, S = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    if selection is not None and selection.block_m < 16:
        raise ValueError(
            f"selection: backend 'flex' needs block_m ≥ 16, got {selection.block_m}; backend='torch' takes any"
        )
    if q.is_cuda:
        if q.dtype == torch.float64:
            raise ValueError("q: backend 'flex' takes float16, bfloat16 or float32 on CUDA, got float64; use 'torch'")
        block_mask = _listed_blocks(selection, T, S, HQ, window, q.device)
        options = _kernel_options(block_mask.BLOCK_SIZE, learns)
        # FlexAttention's default backward tiles fit blocks of 128; smaller ones are found by its autotuner
        attend = _compiled_flex_attention(autotune=learns and len(options) > 1)
    else:
        if learns:
            raise ValueError(
                "backend: 'flex' has no backward on a CPU; backend='torch' has one (or compute under torch.no_grad())"
            )
        from torch.nn.attention.flex_attention import flex_attention as attend

        block_mask, options = _looked_up_blocks(selection, B, T, S, HQ, k.shape[2], window, q.device), None
    from torch.nn.attention.flex_attention import AuxRequest

    # Every shape compiles anew. Past the limit dynamo raises; it must not run the eager form, which ignores the lists.
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        o, aux = attend(
            *tensors,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=True,
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
    o = combine_pairs(o.transpose(1, 2), lam_logit)
    return (o, aux.lse.detach()) if return_lse else o


@functools.cache
def _compiled_flex_attention(autotune: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True, options={"max_autotune": autotune})


def _kernel_options(block_size: tuple[int, int], learns: bool) -> dict[str, object]:
    """Forward tiles that divide the selection's blocks, where FlexAttention's own would not."""
    options: dict[str, object] = {"FORCE_USE_FLEX_ATTENTION": True}  # its decode kernel takes few shapes
    if any(size % FLEX_BLOCK for size in block_size):
        tiles = [min(size & -size, 64) for size in block_size]  # size & -size: the largest power of two that divides it
        least = 32 if learns else 16
        if min(tiles) < least:
            raise ValueError(
                f"selection: backend 'flex' needs block_m and block_n divisible by {least} on CUDA"
                f"{' for a backward' if learns else ''}, got {block_size}; backend='torch' takes any"
            )
        options |= dict(zip(("fwd_BLOCK_M", "fwd_BLOCK_N"), tiles))
    return options


def _listed_blocks(selection, T: int, S: int, HQ: int, window: int | None, device: torch.device):
    """A BlockMask whose lists hold the blocks to visit: causal, inside the window, selected. Nothing of size T × S."""
    from torch.nn.attention.flex_attention import BlockMask

    if selection is not None and window is None:
        return selection.to_block_mask(T, S, HQ)
    block_m, block_n = (FLEX_BLOCK, FLEX_BLOCK) if selection is None else (selection.block_m, selection.block_n)
    first_row = torch.arange(0, T, block_m, device=device)
    first_position = (S - T + first_row)[:, None]  # [NM, 1]
    last_position = (S - T + (first_row + block_m).clamp(max=T) - 1)[:, None]
    first_key = torch.arange(0, S, block_n, device=device)  # [NN]
    last_key = first_key + block_n - 1  # of a partial last block: past S, so never fully visible
    touched, full = first_key <= last_position, last_key <= first_position
    if window is not None:
        touched, full = touched & (last_key > first_position - window), full & (first_key > last_position - window)
    if selection is not None:
        listed = selection.to_block_mask(T, S, HQ).to_dense()[..., : len(first_key)].bool()  # [B, HQ, NM, NN]
        touched, full = touched & listed, full & listed
    else:
        touched, full = touched[None, None], full[None, None]

    def visible(b, h, i, j):
        keep = j <= i + (S - T)
        return keep if window is None else keep & (j > i + (S - T) - window)

    lists = []
    for table in (touched & ~full, full):
        order = torch.argsort((~table).int(), dim=-1, stable=True)
        lists += [table.sum(-1, dtype=torch.int32), order.int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(block_m, block_n), mask_mod=visible, seq_lengths=(T, S))


def _looked_up_blocks(selection, B: int, T: int, S: int, HQ: int, H: int, window: int | None, device: torch.device):
    """A BlockMask whose mask function alone decides, from a dense table: eager FlexAttention reads no lists."""
    from torch.nn.attention.flex_attention import create_block_mask

    position = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    table = (key <= position)[None, None, None]  # [B, C, H, T, S], broadcast below
    if window is not None:
        table = table & (key > position - window)
    if selection is not None:
        table = table & selection.to_mask(T, S)
    C = table.shape[1]
    table = table.expand(B, C, H, T, S)

    def visible(b, h, i, j):
        return table[b, h % C, h // (HQ // H), i, j]

    return create_block_mask(visible, B, HQ, T, S, device=device)
