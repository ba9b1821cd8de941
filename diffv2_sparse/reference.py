"""The oracle: differential attention exactly as its formula reads, with every score in memory.

    o[p] = softmax(q_2p kᵀ · scale) v − sigmoid(lam_logit[p]) · softmax(q_2p+1 kᵀ · scale) v

Short, obviously right, any device and dtype; it computes in the dtype it is given. Source: microsoft/unilm,
Diff-Transformer-V2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import BlockSelection


def visible_keys(
    T: int, S: int, HQ: int, H: int, selection: BlockSelection | None, window: int | None, device: torch.device
) -> Tensor:
    """Which keys each token of each query head sees: bool `[B or 1, HQ, T, S]`."""
    position = torch.arange(S - T, S, device=device)[:, None]  # of each query among the keys
    key = torch.arange(S, device=device)
    visible = key <= position
    if window is not None:
        visible = visible & (key > position - window)
    visible = visible[None, None].expand(1, HQ, T, S)
    if selection is not None:
        group = torch.arange(HQ, device=device) // (HQ // H)
        head_class = torch.arange(HQ, device=device) % selection.num_classes
        visible = visible & selection.to_mask(T, S)[:, head_class, group]
    return visible


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Differential attention; arguments and results as `diff_attention`."""
    if cu_seqlens_q is not None:
        return _packed(q, k, v, lam_logit, selection, scale, window, return_lse, cu_seqlens_q, cu_seqlens_k)
    T, HQ, D = q.shape[1:]
    S, H = k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(HQ // H, dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * scale
    logits = logits.masked_fill(~visible_keys(T, S, HQ, H, selection, window, q.device), float("-inf"))
    lse = torch.logsumexp(logits, -1)
    # a token that sees nothing has lse −inf: shift by 0 there, so that its weights are exp(−inf) = 0
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    o = torch.einsum("bhts,bshd->bthd", weights, v)
    if lam_logit is not None:
        o = (o[:, :, 0::2] - torch.sigmoid(lam_logit)[..., None] * o[:, :, 1::2]).to(q.dtype)
    return (o, lse.to(torch.promote_types(torch.float32, lse.dtype))) if return_lse else o


def _packed(q, k, v, lam_logit, selection, scale, window, return_lse, cu_seqlens_q, cu_seqlens_k):
    """Each sequence alone, one after another."""
    parts, row = [], 0
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        own = None
        if selection is not None:
            rows = slice(row, row - (q0 - q1) // selection.block_m)  # ⌈(q1 − q0) / block_m⌉ rows
            row = rows.stop
            own = BlockSelection(
                selection.indices[:, :, :, rows], selection.counts[:, :, :, rows], selection.block_m, selection.block_n
            )
        lam = None if lam_logit is None else lam_logit[:, q0:q1]
        one = reference_attention(
            q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], lam, own, scale=scale, window=window, return_lse=True
        )
        parts.append(one)
    o, lse = torch.cat([o for o, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    return (o, lse) if return_lse else o
