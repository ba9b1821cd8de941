"""Pieces that the attention kernels share: where a tile stands, what it sees, products, one step of online softmax.

A *list* is the walk of one run of query tokens over key blocks (see `domain.py`). Logits are kept in base 2: with
s = scale · log2 e, softmax(x · scale) = exp2(x · s − m) / Σ exp2(x · s − m).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


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
        q0 = tl.full((), 0, tl.int32)
        k0 = tl.full((), 0, tl.int32)
        Tq = T
        Sk = S
    return own, sequence, q0.to(tl.int64), Tq, k0.to(tl.int64), Sk


@triton.jit
def walk_bounds(
    i_list,
    pos_first,
    pos_last,
    lengths,
    NE,
    window,
    MASKED: tl.constexpr,
    LISTS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SUB: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One half of a tile's walk, as `begin, end, jump, skip`: steps begin … end − 1.

    One half sees its keys whole, the other is MASKED. With LISTS, a step is one of SUB parts of an entry:
    clear entries fill a list from the front, masked ones from the back. Without, step e is key tile e, or from `jump`
    on e + skip, so that the masked half leaves out the clear one.
    """
    if LISTS:
        if MASKED:
            begin = (NE - tl.load(lengths + 2 * i_list + 1)) * SUB
            end = NE * SUB
        else:
            begin = 0
            end = tl.load(lengths + 2 * i_list) * SUB
        jump = end
        skip = 0
    else:
        low = 0
        clear_from = 0
        if WINDOWED:
            low = tl.maximum(pos_first - window + 1, 0) // KEYS
            clear_from = tl.cdiv(tl.maximum(pos_last - window + 1, 0), KEYS)
        high = pos_last // KEYS + 1
        clear_to = tl.maximum((pos_first + 1) // KEYS, clear_from)
        clear_from = tl.minimum(clear_from, high)
        clear_to = tl.minimum(clear_to, high)
        if MASKED:
            begin = low
            end = high - (clear_to - clear_from)
            jump = clear_from
            skip = clear_to - clear_from
        else:
            begin = clear_from
            end = clear_to
            jump = end
            skip = 0
    return begin, end, jump, skip


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
