"""Long lists of rows are cut into shares, so that no block of keys that all rows chose becomes the straggler.

A share is at most `most` entries, such that all lists together make PROCESSOR_SHARES shares a multiprocessor. The first
share of a block is the block's own program; every further one is a program more, and those come first. Blocks with
several shares leave their sums in a workspace, from where they are added in the order of the list: deterministic.
Everything is counted on the GPU; the host knows only how many there can be.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import sequence_of
from ..tiles import processors_of

PROCESSOR_SHARES = 2
LEAST_TILES = 16  # of a share that is worth a program


class Shares(NamedTuple):
    """Blocks are those of all batches and heads, `(b · H + h) · NN + block`. All int32 but for the workspace."""

    blocks: Tensor  # [X] of the further shares; past the last block where there is none
    numbers: Tensor  # [X] which share of the block it is: 1, 2, …
    firsts: Tensor  # [B · H · NN] the first further share of each block
    further: Tensor  # [B · H · NN] how many there are
    most: Tensor  # [1] entries of a share
    partial: Tensor  # float32 [2 X, 2, KEYS, D]: dk and dv of further shares, then of the first ones of their blocks


def shares_of(offsets: Tensor, entries: int, rows_per_tile: int, KEYS: int, D: int) -> Shares | None:
    """Of transposed lists (see `BlockSelection.transpose`) of so many entries at most; None where all are short."""
    least = LEAST_TILES * rows_per_tile
    X = min(PROCESSOR_SHARES * processors_of(offsets.device), entries // least)
    if X == 0:
        return None
    lengths = offsets.diff(dim=-1).sum(1, dtype=torch.int32).flatten()  # over the classes
    most = ((lengths.sum() + X - 1) // X).clamp(min=least)
    further = (lengths - 1).clamp(min=0) // most
    ends = further.cumsum(0)
    share = torch.arange(X, device=offsets.device)
    blocks = torch.searchsorted(ends, share, right=True)
    firsts = ends - further
    numbers = 1 + share - firsts[blocks.clamp(max=len(firsts) - 1)]
    partial = torch.empty(2 * X, 2, KEYS, D, dtype=torch.float32, device=offsets.device)
    return Shares(*(x.int() for x in (blocks, numbers, firsts, further, most.view(1))), partial)


@triton.jit
def share_of(pid, shares, X, BH, NN, SHARED: tl.constexpr):
    """Of program `pid`: batch and head, block, its range of entries of the list, and its place in the workspace, −1
    where the sums are the whole block's. A program without work gets block NN.

    Further shares come first, then the first block, which may be everyone's, of all heads; then one head after another.
    """
    number = tl.cast(0, tl.int32)
    slot = tl.cast(-1, tl.int32)
    rest = tl.maximum(pid - X, 0)
    first = rest < BH
    i_bh = tl.where(first, rest, (rest - BH) // tl.maximum(NN - 1, 1))
    i_block = tl.where(first, 0, 1 + (rest - BH) % tl.maximum(NN - 1, 1))
    begin = 0
    end = 1 << 30
    if SHARED:
        most = tl.load(shares.most)
        if pid < X:
            at = tl.load(shares.blocks + pid)
            number = tl.load(shares.numbers + pid)
            slot = pid
            i_bh = tl.minimum(at // NN, BH - 1)
            i_block = tl.where(at < BH * NN, at % NN, NN)
        else:
            at = i_bh * NN + i_block
            if tl.load(shares.further + at) > 0:
                slot = X + tl.load(shares.firsts + at)
        begin = number * most
        end = begin + most
    return i_bh, i_block, begin, end, slot


@triton.jit(do_not_specialize=["T", "S", "X", "BH", "NN"])
def _sum_kernel(
    dk,
    dv,
    shares,
    table,
    cu_k,
    S,
    X,
    BH,
    NN,
    H,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    PART: tl.constexpr,
):
    """Adds up PART keys of one block: the program of its second share does, the others have nothing to do."""
    pid = tl.program_id(0)
    at = tl.load(shares.blocks + pid).to(tl.int64)
    if at >= BH * NN:
        return
    if tl.load(shares.numbers + pid) != 1:
        return
    own, _, _, _, k0, Sk = sequence_of(at % NN, table, cu_k, cu_k, S, S, PACKED)
    i_b = at // NN // H
    i_h = at // NN % H
    key = tl.program_id(1) * PART + tl.arange(0, PART)
    dims = tl.arange(0, D)
    there = (own * KEYS + key < Sk)[:, None]
    part = key[:, None] * D + dims[None, :]
    out = ((i_b * S + k0 + own * KEYS + key) * H + i_h)[:, None] * D + dims[None, :]
    for gradient in tl.static_range(2):
        from_here = shares.partial + gradient * (KEYS * D) + part
        total = tl.load(from_here + (X + pid).to(tl.int64) * (2 * KEYS * D))
        for i in range(tl.load(shares.further + at)):
            total += tl.load(from_here + (pid + i).to(tl.int64) * (2 * KEYS * D))
        if gradient == 0:
            tl.store(dk + out, total.to(dk.dtype.element_ty), mask=there)
        else:
            tl.store(dv + out, total.to(dv.dtype.element_ty), mask=there)


def sum_shares(shares: Shares, dk: Tensor, dv: Tensor, NN: int, table: Tensor | None, cu_k: Tensor | None):
    """Writes dk and dv of the blocks that several programs had a share of."""
    B, S, H, D = dk.shape
    X, _, KEYS, _ = shares.partial.shape
    X //= 2
    PART = 16
    _sum_kernel[(X, KEYS // PART)](
        dk,
        dv,
        shares,
        table,
        cu_k,
        S,
        X,
        B * H,
        NN,
        H,
        D=D,
        KEYS=KEYS,
        PACKED=cu_k is not None,
        PART=PART,
    )
