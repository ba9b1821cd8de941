"""Pieces that the attention kernels share: where a tile stands, its walk over keys, products, a step of online softmax.

A *list* is the walk of one run of query tokens over key blocks (see `domain.py`). Logits are kept in base 2: with
s = scale · log2 e, softmax(x · scale) = exp2(x · s − m) / Σ exp2(x · s − m).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import next_power_of_2

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


class Strides(NamedTuple):
    """Of a tensor `[B, tokens, heads, D]`, or `[B, tokens, heads]`, in elements."""

    b: int
    t: int
    h: int


def strides_of(x: Tensor | None) -> Strides:
    return Strides(0, 0, 0) if x is None else Strides(*x.stride()[:3])


def new_outputs(q: Tensor, *, differential: bool, save_noise: bool, save_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and o_noise as `forward` returns them, not yet written; what is not saved is empty."""
    B, T, HQ, D = q.shape
    o = q.new_empty(B, T, HQ // 2 if differential else HQ, D)
    lse = q.new_empty((B, HQ, T) if save_lse else 0, dtype=torch.float32)
    return o, lse, torch.empty_like(o) if save_noise else o.new_empty(0)


def padded(head_dim: int) -> int:
    """The head size of a tile: a power of two that the tensor cores take."""
    return max(16, next_power_of_2(head_dim))


def describable(arch: int, *tensors: Tensor) -> bool:
    """Whether Hopper's copy engine can fetch tiles of these tensors `[B, S, H, D]`: it wants multiples of 16 bytes."""
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:3])
        for x in tensors
    )
    return aligned and (arch == 0 or arch >= 90)


def describe(x: Tensor, keys: int) -> TensorDescriptor:
    """Tiles of `keys` tokens of one head; what lies outside of x reads as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, keys, 1, padded(x.shape[3])])


@triton.jit
def product(a, b, acc=None):
    """a · b (+ acc) in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sequence_of(i, table, cu_q, cu_k, T, S, PACKED: tl.constexpr):
    """Of list (or key block) `i`: its number inside its sequence, the sequence, first query, queries, first key, keys.

    Packed, `table[i]` is (sequence, number); padding entries have a number past their sequence's end.
    """
    if PACKED:
        sequence = tl.load(table + 2 * i)
        own = tl.load(table + 2 * i + 1)
        q0 = tl.load(cu_q + sequence)
        k0 = tl.load(cu_k + sequence)
        Tq = tl.load(cu_q + sequence + 1) - q0
        Sk = tl.load(cu_k + sequence + 1) - k0
    else:
        sequence = 0
        own = i.to(tl.int32)
        q0 = tl.cast(0, tl.int32)
        k0 = tl.cast(0, tl.int32)
        Tq = T
        Sk = S
    return own, sequence, q0.to(tl.int64), Tq, k0.to(tl.int64), Sk


@triton.jit
def tile_of(NL, H, LIST_TILES: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr):
    """Of this program: batch, KV head, chunk of the group's heads, list, tokens of the list that earlier tiles have.

    One KV head comes after another, so that its keys stay in the cache, and the longest walks first.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles = NL * LIST_TILES
    i_tile = tiles - 1 - pid % tiles
    i_c = ((pid // tiles) % CHUNKS).to(tl.int32)
    i_bh = pid // tiles // CHUNKS
    return i_bh // H, i_bh % H, i_c, i_tile // LIST_TILES, (i_tile % LIST_TILES).to(tl.int32) * TOKENS


@triton.jit
def walk_of(i_list, pos_first, pos_last, lengths, window, form: tl.constexpr):
    """A tile's walk over key tiles, as `steps, clear, low, clear_from, n`: the first `clear` of `steps` need no mask.

    With LISTS of n entries, an entry is SUB steps, or a step takes PER entries. Without, the walk takes the key tiles
    from `low` on, the clear ones, which begin at `clear_from`, before the others.
    """
    low = 0
    clear_from = 0
    n = 0
    if form.LISTS:
        n = tl.load(lengths + 2 * i_list + 1)
        clear = tl.load(lengths + 2 * i_list) * form.SUB // form.PER
        steps = tl.cdiv(n * form.SUB, form.PER)
    else:
        if form.WINDOWED:
            low = tl.maximum(pos_first - window + 1, 0) // form.KEYS
            clear_from = tl.cdiv(tl.maximum(pos_last - window + 1, 0), form.KEYS)
        high = pos_last // form.KEYS + 1
        clear_to = tl.minimum(tl.maximum((pos_first + 1) // form.KEYS, clear_from), high)
        clear_from = tl.minimum(clear_from, high)
        clear = clear_to - clear_from
        steps = high - low
    return steps, clear, low, clear_from, n


@triton.jit
def tile_start(e, clear, low, clear_from):
    """Step `e` of a walk without lists, in key tiles."""
    rest = low + e - clear
    return tl.where(e < clear, clear_from + e, tl.where(rest < clear_from, rest, rest + clear))


@triton.jit
def keys_of(
    e,
    entries,
    at,
    n,
    Sk,
    clear,
    low,
    clear_from,
    form: tl.constexpr,
):
    """Step `e` of a walk, whose list begins `at`: its keys `[KEYS]`, the first of them, and where they end.

    The keys follow one another, but for steps that take PER > 1 entries.
    """
    offs = tl.arange(0, form.KEYS)
    block_end = Sk
    if form.PER > 1:
        entry = e * form.PER + offs // form.BLOCK_N
        block = tl.load(entries + at + entry, mask=entry < n, other=0)
        key = tl.where(entry < n, block * form.BLOCK_N + offs % form.BLOCK_N, Sk)
        start = 0
    else:
        if form.LISTS:
            block_start = tl.load(entries + at + e // form.SUB) * form.BLOCK_N
            start = block_start + (e % form.SUB) * form.KEYS
            block_end = tl.minimum(block_start + form.BLOCK_N, Sk)
        else:
            start = tile_start(e, clear, low, clear_from) * form.KEYS
        key = start + offs
    return key, start, block_end


@triton.jit
def members_of(e, bits, at, n, bit, form: tl.constexpr):
    """Whether each query row, by its `bit`, chose the block of step `e`: `[ROWS]`, or `[ROWS, KEYS]` where PER > 1."""
    if form.PER > 1:
        entry = e * form.PER + tl.arange(0, form.KEYS) // form.BLOCK_N
        chosen = (tl.load(bits + at + entry, mask=entry < n, other=0)[None, :] >> bit[:, None]) & 1
    else:
        chosen = (tl.load(bits + at + e // form.SUB) >> bit) & 1
    return chosen != 0


@triton.jit
def load_keys(x, i_b, i_h, k0, key, start, block_end, strides, form: tl.constexpr):
    """The rows `key` of one head of k or v, [KEYS, DP], in a sequence that begins at k0.

    Rows from `block_end` on are 0, or, DESCRIBED (x is a tensor descriptor), keys of the same sequence.
    """
    if form.DESCRIBED:
        tile = x.load([i_b.to(tl.int32), start, i_h.to(tl.int32), 0]).reshape(form.KEYS, form.DP)
    else:
        dims = tl.arange(0, form.DP)
        at = x + i_b * strides.b + k0 * strides.t + i_h * strides.h
        if form.PER > 1:
            rows = key.to(tl.int64)
        else:  # one row number for all threads, and small offsets
            at += start.to(tl.int64) * strides.t
            rows = tl.arange(0, form.KEYS)
        inside = (key < block_end)[:, None] & (dims < form.D)[None, :]
        tile = tl.load(at + rows[:, None] * strides.t + dims[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def visible(pos, key, block_end, window, WINDOWED: tl.constexpr):
    """Which keys (a row vector) the positions (a column vector) see, inside a block that ends at `block_end`."""
    seen = (key <= pos) & (key < block_end)
    if WINDOWED:
        seen = seen & (key > pos - window)
    return seen


@triton.jit
def softmax_step(logits, m, l, scale_log2, member, MEMBERS: tl.constexpr):
    """One block of online softmax, base 2.

    logits `[ROWS, KEYS]` before the scale (> 0), −inf where hidden; m, l `[ROWS]` so far. Rows that are no member
    of the block keep what they have.

    Returns:
        weights `[ROWS, KEYS]` relative to the new maximum, the factor for what was summed before, and the new m, l.
    """
    peak = tl.maximum(m, tl.max(logits, 1) * scale_log2)
    if MEMBERS:
        peak = tl.where(member, peak, m)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    decay = tl.exp2(m - shift)
    if MEMBERS:
        shift = tl.where(member, shift, float("inf"))
    weights = tl.exp2(logits * scale_log2 - shift[:, None])
    return weights, decay, peak, l * decay + tl.sum(weights, 1)


@triton.jit
def load_lse(at, live):
    """In base 2, and +∞ where nothing was seen: weights then come out as 0."""
    x = tl.load(at, mask=live, other=float("-inf")) * LOG2E
    return tl.where(x == float("-inf"), float("inf"), x)
