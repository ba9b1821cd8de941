"""Linear layers for a few tokens, with what stands before and after them: RMSNorm, rotary positions, the residual.

    out = norm(x) Wᵀ (+ residual)          norm(x) = weight · x / sqrt(mean(x²) + eps)
    out = silu(norm(x) W_gateᵀ) · (norm(x) W_upᵀ)

One token reads every weight and does next to nothing with it: a step takes as long as the weights' way from memory, and
whatever each launch adds. So all projections of one x are one launch, the norm's 1 / sqrt(…) is a factor of the sums,
known when they are, and what follows is done where the sums are. A program takes some columns of the output for one
token; those of the other tokens run beside it and find the weights in the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import arch_of, cdiv, linear_tile


class Part(NamedTuple):
    """One of several projections of an x. Column n of token m goes to

    out + at + n // D · stride_h + n % D,  at = m · stride_m, or places[m] where `placed`.
    """

    weight: Tensor  # [N, K]
    out: Tensor
    N: int
    stride_m: int
    stride_h: int
    turned: int  # 1 by rotary positions, 0 not
    placed: int  # 1 or 0


@triton.jit
def _part_of(tile, parts, BLOCK_N: tl.constexpr):
    """The part that a tile of columns belongs to, and the tile's first column there."""
    part = parts[0]
    first = tile * BLOCK_N
    begin = tl.cdiv(part.N, BLOCK_N)
    weight = part.weight
    out = part.out
    N = tl.cast(part.N, tl.int32)
    stride_m = tl.cast(part.stride_m, tl.int64)
    stride_h = tl.cast(part.stride_h, tl.int64)
    turned = tl.cast(part.turned, tl.int32)
    placed = tl.cast(part.placed, tl.int32)
    for i in tl.static_range(1, len(parts)):
        own = parts[i]
        here = tile >= begin
        first = tl.where(here, (tile - begin) * BLOCK_N, first)
        begin += tl.cdiv(own.N, BLOCK_N)
        weight = tl.where(here, own.weight, weight)
        out = tl.where(here, own.out, out)
        N = tl.where(here, own.N, N)
        stride_m = tl.where(here, own.stride_m, stride_m)
        stride_h = tl.where(here, own.stride_h, stride_h)
        turned = tl.where(here, own.turned, turned)
        placed = tl.where(here, own.placed, placed)
    return Part(weight, out, N, stride_m, stride_h, turned, placed), first


@triton.jit
def _weights(weight, column, k, N, K: tl.constexpr, EVEN: tl.constexpr):
    """Rows `column` of a weight, float32 `[BLOCK_N, BLOCK_K]`."""
    mask = (column < N)[:, None]
    if not EVEN:
        mask = mask & (k < K)[None, :]
    at = weight + column.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _sums(x, norm, weight, up, column, N, eps, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """norm(x) weightᵀ at the columns, float32 `[BLOCK_N]`; and norm(x) upᵀ, if there is `up`."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_tile = _weights(weight, column, k, N, K, EVEN)
        if up is not None:
            up_tile = _weights(up, column, k, N, K, EVEN)
        part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if norm is not None:
            squares += part * part
            part *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        sums += w_tile * part[None, :]
        if up is not None:
            up_sums += up_tile * part[None, :]
    factor = 1.0
    if norm is not None:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    return tl.sum(sums, 1) * factor, tl.sum(up_sums, 1) * factor


@triton.jit
def _project_kernel(
    x,
    norm,
    parts,
    places,
    cos,
    sin,
    residual,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part, first = _part_of(tl.program_id(1), parts, BLOCK_N)
    column = first + tl.arange(0, BLOCK_N)
    sums, _up = _sums(x + token * K, norm, part.weight, None, column, part.N, eps, K, BLOCK_N, BLOCK_K)
    if cos is not None:  # (x_2i, x_2i+1) as a complex number
        angle = token * (D // 2) + (first + 2 * tl.arange(0, BLOCK_N // 2)) % D // 2
        turned = angle * 0 + part.turned != 0
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        real, imaginary = tl.split(tl.reshape(sums, [BLOCK_N // 2, 2]))
        sums = tl.reshape(tl.join(real * c - imaginary * s, real * s + imaginary * c), [BLOCK_N])
    at = token * part.stride_m
    if places is not None:
        at = tl.where(part.placed != 0, tl.load(places + token), at)
    at += column // D * part.stride_h + column % D
    live = column < part.N
    if residual is not None:
        sums += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    tl.store(part.out + at, sums.to(x.dtype.element_ty), mask=live)


@triton.jit
def _gated_kernel(x, norm, gate, up, out, N, eps, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates, ups = _sums(x + token * K, norm, gate, up, column, N, eps, K, BLOCK_N, BLOCK_K)
    result = gates * tl.sigmoid(gates) * ups
    tl.store(out + token * N + column, result.to(x.dtype.element_ty), mask=column < N)


def project(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    parts: list[Part],
    head_dim: int,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes the parts' outputs, for validated inputs: x `[M, K]` contiguous, of the weights' dtype.

    Args:
        norm: the weight of RMSNorm, `[K]`, or None for x as it is.
        rotary: cos and sin of the tokens, float32 `[M, head_dim / 2]`, contiguous.
        places: int64 `[M]`.
        residual: like the one part's output.
    """
    M, K = x.shape
    tile = linear_tile(arch_of(x.device))
    cos, sin = rotary or (None, None)
    _project_kernel[(M, sum(cdiv(part.N, tile.columns) for part in parts))](
        x,
        norm,
        tuple(parts),
        places,
        cos,
        sin,
        residual,
        eps,
        K=K,
        D=head_dim,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
    )


def gated(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """silu(norm(x) gateᵀ) · (norm(x) upᵀ), `[M, N]`; x `[M, K]` contiguous, gate and up `[N, K]`, all of one dtype."""
    M, K = x.shape
    out = torch.empty(M, len(gate), dtype=x.dtype, device=x.device)
    tile = linear_tile(arch_of(x.device), gated=True)
    _gated_kernel[(M, cdiv(len(gate), tile.columns))](
        x,
        norm,
        gate,
        up,
        out,
        len(gate),
        eps,
        K=K,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
    )
    return out
