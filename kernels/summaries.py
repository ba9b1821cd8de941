"""Block summaries: the mean key of every complete block, added as one fixed binary tree.

    x₀, …, xₙ₋₁  →  x₀ + x_h, …, x_{h−1} + x_{2h−1} (and x_{n−1} where n is odd), h = ⌊n / 2⌋,  until one is left

All in float32, divided by the block's length and rounded once; the same bits as `block_mean` in plain torch, whatever
the layout, batch or device. A thread holds the same few columns of every key of a block, so the tree is unrolled in its
registers and each key is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import cdiv, next_power_of_2

MOST = 256  # keys of a block in one unrolled tree; longer blocks are folded before


@triton.jit
def _node(at, stride, mask, SIZES: tl.constexpr, LEVEL: tl.constexpr, I: tl.constexpr):
    """Partial sum `I` after LEVEL folds of rows `stride` apart; SIZES[l] of them are left after l folds."""
    if LEVEL == 0:
        return tl.load(at + I * stride, mask=mask, other=0.0).to(tl.float32)
    else:
        HALF: tl.constexpr = SIZES[LEVEL - 1] // 2
        if I < HALF:
            first = _node(at, stride, mask, SIZES, LEVEL - 1, I)
            return first + _node(at, stride, mask, SIZES, LEVEL - 1, HALF + I)
        else:  # the odd one out
            return _node(at, stride, mask, SIZES, LEVEL - 1, SIZES[LEVEL - 1] - 1)


@triton.jit(do_not_specialize=["NC", "n"])
def _tree_kernel(
    x,
    out,
    firsts,
    stride_b,
    stride_block,
    stride_row,
    stride_h,
    NC,
    n,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    SIZES: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: WIDTH of the H · D columns of one block. With `firsts`, block i begins at row firsts[i], or is
    padding where that is negative.
    """
    pid = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = column < COLUMNS
    i_b = pid // NC
    if firsts is None:
        first = (pid % NC) * stride_block
    else:
        row = tl.load(firsts + pid % NC).to(tl.int64)
        mask_in = mask & (row >= 0)
        first = tl.maximum(row, 0) * stride_row
    at = x + i_b * stride_b + first + (column // D) * stride_h + column % D
    total = _node(at, stride_row, mask if firsts is None else mask_in, SIZES, LEVELS, 0)
    tl.store(out + pid * COLUMNS + column, tl.div_rn(total, n).to(out.dtype.element_ty), mask=mask)


def summaries(k: Tensor, block_n: int, cu_k: Tensor | None) -> Tensor:
    """Mean keys, `[B, S // block_n, H, D]` in k's dtype.

    Args:
        k: `[B, S, H, D]`, D contiguous.
        cu_k: int32 `[N + 1]`, bounds of packed sequences; then the complete blocks of all sequences stand one after
            another, and zeros after them.
    """
    B, S, H, D = k.shape
    NC = S // block_n
    out = torch.empty(B, NC, H, D, dtype=k.dtype, device=k.device)
    if NC == 0:
        return out
    firsts = None if cu_k is None else _firsts(cu_k, block_n, NC)
    rows, x = block_n, k
    strides = k.stride(0), block_n * k.stride(1), k.stride(1), k.stride(2)
    if rows > MOST:
        if firsts is None:
            x = k[:, : NC * block_n].unflatten(1, (NC, block_n))
        else:
            at = firsts.long().clamp(min=0)[:, None] + torch.arange(block_n, device=k.device)
            x = torch.where(firsts[:, None, None, None] >= 0, k[0, at], 0)[None]
        while rows > MOST:
            half = rows // 2
            folded = x[:, :, :half].float() + x[:, :, half : 2 * half].float()
            x = torch.cat([folded, x[:, :, 2 * half :].float()], 2)
            rows = x.shape[2]
        firsts, strides = None, x.stride()[:4]
    sizes = [rows]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2 + sizes[-1] % 2)
    width = min(256, next_power_of_2(H * D))
    _tree_kernel[(B * NC, cdiv(H * D, width))](
        x,
        out,
        firsts,
        *strides,
        NC,
        float(block_n),
        COLUMNS=H * D,
        D=D,
        SIZES=tuple(sizes),
        LEVELS=len(sizes) - 1,
        WIDTH=width,
        num_warps=max(1, width // 64),  # two columns a thread: a long block's tree fills its registers
    )
    return out


def _firsts(cu_k: Tensor, block_n: int, NC: int) -> Tensor:
    """First key of each complete block of packed sequences, int32 `[NC]`; −1 past the last one."""
    blocks = cu_k.diff() // block_n
    ends = blocks.cumsum(0, dtype=torch.int32)
    block = torch.arange(NC, device=cu_k.device, dtype=torch.int32)
    sequence = torch.searchsorted(ends, block, right=True).clamp(max=len(blocks) - 1)
    first = cu_k[sequence] + (block - (ends - blocks)[sequence]) * block_n
    return torch.where(block < ends[-1], first, -1)
