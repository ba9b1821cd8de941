"""Fused backward of block-sparse differential attention, deterministic: dq by query rows, dk and dv by key blocks.

With P = softmax, λ = sigmoid(lam_logit), and one dP = dO vᵀ for both heads of a pair:

    δ_noise = dO · o_noise           dS_noise  = −λ P_noise ∘ (dP − δ_noise)     d lam_logit = −λ (1 − λ) δ_noise
    δ_signal = dO · (o + λ o_noise)  dS_signal =  P_signal ∘ (dP − δ_signal)     dv = (P_signal − λ P_noise)ᵀ dO

A tile holds tokens × pairs of heads of one GQA group, signal and noise side by side; ordinary attention is the signal
half alone. Weights are computed again from lse. Source: the formula above, and FlashAttention-2 (Dao, 2307.08691).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .domain import Domain
from .key_gradients import key_gradients
from .primitives import padded, strides_of
from .query_gradient import query_gradient
from .tiles import cdiv


@triton.jit(do_not_specialize=["N", "T"])
def _delta_kernel(
    do,
    o,
    o_noise,
    lam_logit,
    delta,
    dlam,
    do_strides,
    lam_strides,
    N,
    T,
    HO: tl.constexpr,
    D: tl.constexpr,
    DIFF: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """δ of both classes `[B, HQ, T]` and d lam_logit; a row is one output head of one token, N in all."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = i % HO
    b = i // HO // T
    t = (i // HO) % T
    live = i < N
    dims = tl.arange(0, DP)
    inside = live[:, None] & (dims < D)[None, :]
    do_at = do + (b * do_strides.b + t * do_strides.t + head * do_strides.h)[:, None] + dims[None, :]
    do_tile = tl.load(do_at, mask=inside, other=0.0).to(tl.float32)
    offs = i[:, None] * D + dims[None, :]
    own = tl.sum(do_tile * tl.load(o + offs, mask=inside, other=0.0).to(tl.float32), 1)
    if DIFF:
        lam_at = lam_logit + b * lam_strides.b + t * lam_strides.t + head * lam_strides.h
        lam = tl.sigmoid(tl.load(lam_at, mask=live, other=0.0).to(tl.float32))
        noise = tl.sum(do_tile * tl.load(o_noise + offs, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(dlam + i, (-lam * (1.0 - lam) * noise).to(dlam.dtype.element_ty), mask=live)
        at = delta + (b * 2 * HO + 2 * head) * T + t
        tl.store(at, own + lam * noise, mask=live)
        tl.store(at + T, noise, mask=live)
    else:
        tl.store(delta + (b * HO + head) * T + t, own, mask=live)


def deltas(
    do: Tensor, o: Tensor, o_noise: Tensor, lam_logit: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor | None]:
    """δ, like lse, and d lam_logit, like lam_logit; arguments as `backward` takes them."""
    B, T, HO, D = do.shape
    diff = lam_logit is not None
    delta = torch.empty_like(lse)
    dlam = torch.empty(B, T, HO, dtype=lam_logit.dtype, device=do.device) if diff else None
    DP = padded(D)
    rows = max(1, 4096 // DP)
    _delta_kernel[(cdiv(B * T * HO, rows),)](
        do,
        o,
        o_noise if diff else None,
        lam_logit,
        delta,
        dlam,
        strides_of(do),
        strides_of(lam_logit),
        B * T * HO,
        T,
        HO=HO,
        D=D,
        DIFF=diff,
        ROWS=rows,
        DP=DP,
    )
    return delta, dlam


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    o: Tensor,
    o_noise: Tensor,
    lse: Tensor,
    domain: Domain,
    transposed: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and lam_logit.

    Args:
        do, o, o_noise: `[B, T, HO, D]`; lse `[B, HQ, T]`; all as `forward` returned and took them.
        transposed: key block → rows of the selection (`BlockSelection.transpose`): offsets `[B, C, H, NN + 1]` and
            rows `[B, C, H, NM · NB]`, key blocks of packed sequences counted one after another; None without lists.
    """
    delta, dlam = deltas(do, o, o_noise, lam_logit, lse)
    dq = query_gradient(do, q, k, v, lam_logit, lse, delta, domain, scale)
    dk, dv = key_gradients(do, q, k, v, lam_logit, lse, delta, domain, transposed, scale)
    return dq, dk, dv, dlam
