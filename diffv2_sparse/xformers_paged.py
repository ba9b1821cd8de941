"""Sparse decoding through xFormers' paged split-K kernel, a peer of our own behind the same contract.

xFormers knows one list of pages per batch entry and nothing of pairs. So sequences, query tokens, classes and KV heads
are folded into its batch: each entry is the heads of one group and class at one token, its block table the pages that
their list names, its length the keys in them that the token sees. The pairs are combined afterwards,

    o[p] = o_2p − sigmoid(lam_logit[p]) · o_2p+1

Lists ascend, so only an entry's last page can be partly visible, which is what a length can say. Everything is computed
on the device; nothing is read back. Source: the documentation of xFormers' `fmha`, 0.0.35.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from .adapters import combine_pairs
from .selection import BlockSelection

KEYS_PER_TILE = 64  # of the kernel; pages are whole tiles
HEAD_DIMS = (16, 32, 64, 128, 256, 512)


@functools.cache
def load_fmha():
    """xFormers' attention, the operator and the bias in question.

    Where its C library does not load, xFormers keeps that error for good, and with it the frames of whoever imports it
    and their tensors, a cache for instance. A thread has no such frames above it.

    Raises:
        ImportError: it cannot be imported; says why and what to install.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_import).result()


def _import():
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha import triton_splitk
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask
    except ImportError as error:
        reason = "which is not installed: pip install 'diffv2-sparse[xformers]'"
        if error.name is None or not error.name.startswith("xformers"):
            reason = f"which cannot be imported here ({error})"
        if (error.name or "").startswith("flash_attn"):
            reason += (
                "; it takes the bare namespace package flash_attn, as FlashAttention-4 installs it, for flash-attn"
            )
        raise ImportError(f"backend: 'xformers' needs the package xformers, {reason}; 'triton' would do") from error
    if triton_splitk._fwd_kernel_splitK is None:
        raise ImportError("backend: 'xformers' needs its Triton kernels, which it has not loaded here")
    return fmha, triton_splitk.FwOp, PagedBlockDiagonalPaddedKeysMask


def _check(q: Tensor, block_n: int) -> None:
    D = q.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f'backend: "xformers" takes float16 and bfloat16, got {q.dtype}; "torch" takes any')
    if block_n % KEYS_PER_TILE:
        raise ValueError(
            f'pages: backend "xformers" needs block_n a multiple of {KEYS_PER_TILE}, got {block_n}; "triton" takes any'
        )
    if D not in HEAD_DIMS:
        raise ValueError(f'q: backend "xformers" needs D one of {HEAD_DIMS}, got {D}; "triton" takes any up to 256')
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f'backend: "xformers" needs tensors on a GPU, got them on {q.device}; "torch" would do')


def xformers_paged(
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
    """Arguments as `diff_attention_paged`, already validated. Returns o `[B, T, HO, D]`; no gradient.

    Every query token reads its keys for itself, so it is meant for few of them.

    Raises:
        ImportError: xFormers is not installed, or cannot be imported.
        ValueError: not 16-bit, block_n no multiple of 64, D not in HEAD_DIMS, or no GPU.
    """
    P, block_n, D = k_pages.shape
    _check(q, block_n)
    fmha, operator, _ = load_fmha()
    B, T, HQ, _ = q.shape
    H = page_table.shape[1]
    pages, keys = _tables(page_table, lengths, selection, T, P, block_n)  # [B, T, C, H, NB], [B, T, C, H]
    C, NB = pages.shape[2], pages.shape[-1]
    heads = HQ // H // C
    entries = B * T * C * H
    bias = _bias(entries, NB, block_n, q.device)
    bias = replace(
        bias, block_tables=pages.reshape(entries, NB), k_seqinfo=replace(bias.k_seqinfo, seqlen=keys.flatten())
    )
    # of a pair, head 0 is of class 0 and head 1 of class 1
    folded = q.view(B, T, H, heads, C, D).permute(0, 1, 4, 2, 3, 5).reshape(1, entries, 1, heads, D)
    k, v = (x.reshape(1, P * block_n, 1, 1, D).expand(-1, -1, -1, heads, -1) for x in (k_pages, v_pages))
    # the operator itself: the public function refuses all where the package's C library does not load, which this
    # operator has no need of
    inputs = fmha.Inputs(query=folded, key=k, value=v, attn_bias=bias, scale=scale)
    o = operator.apply(inputs, needs_gradient=False)[0]
    o = o.view(B, T, C, H, heads, D).masked_fill((keys == 0)[..., None, None], 0)
    return combine_pairs(o.permute(0, 1, 3, 4, 2, 5).reshape(B, T, HQ, D), lam_logit)


def _tables(
    page_table: Tensor, lengths: Tensor, selection: BlockSelection | None, T: int, P: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """Per sequence, token, class and KV head: the pages that the token attends to, int32 `[B, T, C, H, NB]` packed
    left, and how many keys of them it sees, int32 `[B, T, C, H]`.
    """
    B, H, NP = page_table.shape
    device = page_table.device
    position = lengths[:, None] - T + torch.arange(T, dtype=torch.int32, device=device)  # [B, T]
    position = position[:, :, None, None, None]
    if selection is None:
        blocks = torch.arange(NP, dtype=torch.int32, device=device).expand(B, T, 1, H, NP)
        valid = True
    else:
        row = torch.arange(T, device=device) // selection.block_m
        blocks, counts = (x[:, :, :, row].movedim(3, 1) for x in (selection.indices, selection.counts))
        valid = torch.arange(blocks.shape[-1], device=device) < counts[..., None]
    valid = valid & (blocks >= 0) & (blocks < NP)
    blocks = blocks.clamp(0, NP - 1)
    pages = page_table[:, None, None].expand(*blocks.shape[:4], NP).gather(-1, blocks.long())
    # keys of each page that the token sees; none of pages that do not exist
    seen = (position + 1 - blocks * block_n).clamp(0, block_n)
    seen = torch.where(valid & (pages >= 0) & (pages < P), seen, 0)
    order = (seen == 0).to(torch.uint8).argsort(dim=-1, stable=True)  # pages to read come first, as they were
    pages = torch.where(seen > 0, pages, 0).gather(-1, order)
    return pages, seen.sum(-1, dtype=torch.int32)


@functools.lru_cache(maxsize=64)
def _bias(entries: int, blocks: int, block_n: int, device: torch.device):
    """A bias for one query token per entry. Its tables and lengths are stand-ins; what else it holds depends on these
    sizes alone, and is sent to the device once.
    """
    return load_fmha()[2].from_seqlens(
        q_seqlen=[1] * entries,
        kv_seqlen=[blocks * block_n] * entries,
        block_tables=torch.empty(entries, blocks, dtype=torch.int32, device="meta"),
        page_size=block_n,
        device=device,
    )
