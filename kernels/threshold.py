"""The best of a row of scores within a budget, without sorting: the least score that is kept, and which are.

Scores are not negative, so their bits order them as integers: the threshold is found by bisection between integers,
with one count (and one sum) of the row in every step. Of equal scores the first are kept.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Cut(NamedTuple):
    """All scores from the bits `hi` on are kept, none below `lo`; what lies between is kept, or is equal to `lo` and
    kept in part. `mass` is that of what was forced and of all from `hi` on.
    """

    lo: tl.tensor
    hi: tl.tensor
    count_lo: tl.tensor
    count_hi: tl.tensor
    mass: tl.tensor


@triton.jit
def bits_of(score):
    """−1 for what is no candidate, with a score below 0."""
    bits = tl.where(score > 0, score.to(tl.int32, bitcast=True), 0)  # no number: as good as 0
    return tl.where(score < 0, -1, bits)


@triton.jit
def load_bits(at, j, low, high, stride_part, PARTS: tl.constexpr):
    """Of entries `j` the bits of their scores, each the sum of its parts; −1 outside low … high − 1."""
    inside = (j >= low) & (j < high)
    score = tl.load(at + j, mask=inside, other=-1.0)
    for part in range(1, PARTS):
        score += tl.load(at + part * stride_part + j, mask=inside, other=0.0)
    return bits_of(score)


@triton.jit
def sum_of(bits, which):
    return tl.sum(tl.where(which, bits.to(tl.float32, bitcast=True), 0.0), 0)


@triton.jit
def _tally(at, bits, least, low, high, MASS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries have at least the bits `least`, and (with MASS) the sum of their scores. `bits` are those of the
    row, if WHOLE.
    """
    count = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    if WHOLE:
        count += tl.sum((bits >= least).to(tl.int32), 0)
        if MASS:
            mass += sum_of(bits, bits >= least)
    else:
        for start in range(low, high, BLOCK):
            own = load_bits(at, start + tl.arange(0, BLOCK), low, high, 0, 1)
            count += tl.sum((own >= least).to(tl.int32), 0)
            if MASS:
                mass += sum_of(own, own >= least)
    return count, mass


@triton.jit
def cut_of(
    at,
    bits,
    least,
    most,
    low,
    high,
    room,
    settled,
    forced_mass,
    wanted,
    MASS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bisects from `least` to `most` for `room` entries, or (with MASS) for those that the mass `wanted` takes. Without
    MASS, up to `settled` ≥ `room` are as good.
    """
    lo, hi = least, most + 1
    count_lo, total = _tally(at, bits, least, low, high, MASS, WHOLE, BLOCK)
    count_hi = tl.full((), 0, tl.int32)
    mass = forced_mass
    nothing = room <= 0
    searching = count_lo > settled
    if MASS:
        nothing = nothing | (forced_mass >= wanted)
        searching = searching | (forced_mass + total >= wanted)
    lo = tl.where(nothing, hi, lo)
    while searching & (hi - lo > 1) & (count_lo - count_hi > 1):
        middle = lo + (hi - lo) // 2
        count, above = _tally(at, bits, middle, low, high, MASS, WHOLE, BLOCK)
        enough = count >= room
        if MASS:
            enough = enough | (forced_mass + above >= wanted)
        lo = tl.where(enough, middle, lo)
        count_lo = tl.where(enough, count, count_lo)
        hi = tl.where(enough, hi, middle)
        count_hi = tl.where(enough, count_hi, count)
        if MASS:
            mass = tl.where(enough, mass, forced_mass + above)
        else:
            searching = count_lo > settled
    return Cut(lo, hi, count_lo, count_hi, mass)


@triton.jit
def kept_of(bits, cut, room, wanted, passed, MASS: tl.constexpr):
    """Which entries are kept, and how many that equal `lo` there were by now, `passed` before."""
    keep = bits >= cut.lo
    if (cut.hi - cut.lo == 1) & (cut.count_lo - cut.count_hi > 1):  # equal scores, and not all may be kept
        tie = bits == cut.lo
        before = passed + tl.cumsum(tie.to(tl.int32), 0) - 1
        passed += tl.sum(tie.to(tl.int32), 0)
        wins = before < room - cut.count_hi
        if MASS:
            wins = wins & (cut.mass + before.to(tl.float32) * cut.lo.to(tl.float32, bitcast=True) < wanted)
        keep = keep & (wins | (bits > cut.lo))
    return keep, passed
