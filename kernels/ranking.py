"""Scores → lists: the blocks of each row that its budget keeps, without sorting.

    TopK: the k best free candidates.    TopP: free candidates in falling score until their mass, with that of the
    forced ones before them, reaches `mass`; at most k.

Scores are not negative, so their bits order them as integers: the least score that is kept is found by cutting the
integers in two, or in more parts at once, again and again, with one count (and one sum) of the row in every step. Of
equal scores the first are kept. Forced candidates and the row's own blocks are added, and the list is written
ascending. One program ranks one row.
"""

import triton
import triton.language as tl
from torch import Tensor

from .candidates import Bounds, Choice, Form, candidates_of, unit_of
from .tiles import next_power_of_2

IN_REGISTERS = 16384  # candidates that a program keeps in registers; longer rows are read again in every step


@triton.jit
def _bits(at, j, low, high, stride_part, PARTS: tl.constexpr):
    """Of candidates `j` the bits of their scores, each the sum of its parts; −1 outside low … high − 1."""
    inside = (j >= low) & (j < high)
    score = tl.load(at + j, mask=inside, other=0.0)
    for part in range(1, PARTS):
        score += tl.load(at + part * stride_part + j, mask=inside, other=0.0)
    score = tl.where(score > 0, score, 0.0)  # no number: as good as 0
    return tl.where(inside, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _sum(bits, which):
    return tl.sum(tl.where(which, bits.to(tl.float32, bitcast=True), 0.0), 0)


@triton.jit
def _tally(at, bits, least, low, high, MASS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """How many free candidates have at least the bits `least` `[WAYS]`, and (with MASS) the sum of their scores. `bits`
    are those of the row, if WHOLE.
    """
    count = least * 0
    mass = count.to(tl.float32)
    if WHOLE:
        above = bits[:, None] >= least[None, :]
        count += tl.sum(above.to(tl.int32), 0)
        if MASS:
            mass += _sum(bits[:, None], above)
    else:
        for start in range(low, high, BLOCK):
            own = _bits(at, start + tl.arange(0, BLOCK), low, high, 0, 1)
            above = own[:, None] >= least[None, :]
            count += tl.sum(above.to(tl.int32), 0)
            if MASS:
                mass += _sum(own[:, None], above)
    return count, mass


@triton.jit(do_not_specialize=["T", "S", "NC", "NL", "NM", "first_unit", "sink", "local", "blocks_0", "blocks_1", "NB"])
def _rank_kernel(
    scores,
    indices,
    counts,
    bounds,
    T,
    S,
    NC,
    NL,
    NM,
    first_unit,
    stride_line,
    sink,
    local,
    blocks_0,
    blocks_1,
    wanted_0,
    wanted_1,
    NB,
    FORM: tl.constexpr,
    PARTS: tl.constexpr,
    MASS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    LISTED: tl.constexpr,
    WAYS: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)  # [units, C, H, rows]
    i_h = line // FORM.rows % FORM.H
    i_c = line // FORM.rows // FORM.H % FORM.classes
    unit = unit_of(line // FORM.rows // FORM.H // FORM.classes + first_unit, bounds, T, S, NL)
    row = unit.own * FORM.rows + (line % FORM.rows).to(tl.int32)
    if row >= tl.cdiv(unit.Tq, FORM.block_m):
        return
    position = unit.Sk - unit.Tq + row * FORM.block_m
    last = tl.minimum(position + FORM.block_m, unit.Sk) - 1
    first_own = tl.maximum(position, 0) // FORM.block_n
    overlapped = tl.where(last < 0, 0, tl.maximum(last, 0) // FORM.block_n - first_own + 1)
    n = candidates_of(row, unit, NC, FORM)
    low = tl.minimum(sink, n)  # the candidates low … high − 1 are free, the others forced
    high = tl.maximum(tl.minimum(first_own - local + 1, n), low)
    room = tl.where(i_c == 0, blocks_0, blocks_1) - overlapped - (n - (high - low))
    wanted = tl.where(i_c == 0, wanted_0, wanted_1)

    at = scores + line * PARTS * stride_line
    offs = tl.arange(0, BLOCK)
    mass = tl.full((), 0.0, tl.float32)  # of the forced candidates, later of those from `hi` on, too
    if WHOLE:
        bits = _bits(at, offs, low, high, stride_line, PARTS)
        least = tl.min(tl.where(bits < 0, 0x7FFFFFFF, bits), 0)
        most = tl.max(bits, 0)
        if MASS:
            mass += _sum(_bits(at, offs, 0, n, stride_line, PARTS), (offs < n) & (bits < 0))
    else:
        bits = offs  # not used
        least = tl.full((), 0x7FFFFFFF, tl.int32)
        most = tl.full((), -1, tl.int32)
        for start in range(0, n, BLOCK):
            j = start + offs
            own = _bits(at, j, 0, n, stride_line, PARTS)
            free = (j >= low) & (j < high)
            least = tl.minimum(least, tl.min(tl.where(free, own, 0x7FFFFFFF), 0))
            most = tl.maximum(most, tl.max(tl.where(free, own, -1), 0))
            mass += _sum(own, (j < n) & (free == 0))
            if PARTS > 1:
                tl.store(at + j, own.to(tl.float32, bitcast=True), mask=j < n)
        if PARTS > 1:
            tl.debug_barrier()  # what one thread stored, others read

    # From `hi` on all are kept, below `lo` none; WAYS cuts decide what lies between, down to one score.
    forced_mass = mass
    lo, hi = least, most + 1
    cut = tl.arange(0, WAYS) + 1
    counts_lo, masses_lo = _tally(at, bits, lo + cut * 0, low, high, MASS, WHOLE, BLOCK)
    count_lo = tl.max(counts_lo, 0)
    count_hi = tl.full((), 0, tl.int32)
    nothing = room <= 0
    searching = count_lo > room
    if MASS:
        nothing = nothing | (forced_mass >= wanted)
        searching = searching | (forced_mass + tl.max(masses_lo, 0) >= wanted)
        settled = tl.full((), 0, tl.int32)
    else:
        settled = room  # so many from `lo` on, and there is no need to go on
    lo = tl.where(nothing, hi, lo)
    while searching & (hi - lo > 1) & (count_lo - count_hi > 1) & (count_lo > settled):
        span = hi - lo
        least_now = lo + span // (WAYS + 1) * cut + span % (WAYS + 1) * cut // (WAYS + 1)  # [WAYS], ascending
        count, above = _tally(at, bits, least_now, low, high, MASS, WHOLE, BLOCK)
        enough = count >= room
        if MASS:
            enough = enough | (forced_mass + above >= wanted)
        count_lo = tl.minimum(count_lo, tl.min(tl.where(enough, count, 0x7FFFFFFF), 0))
        count_hi = tl.maximum(count_hi, tl.max(tl.where(enough, 0, count), 0))
        mass = tl.maximum(mass, forced_mass + tl.max(tl.where(enough, 0.0, above), 0))
        hi = tl.minimum(hi, tl.min(tl.where(enough, 0x7FFFFFFF, least_now), 0))
        lo = tl.maximum(lo, tl.max(tl.where(enough, least_now, -1), 0))

    row_out = row
    if bounds.row_starts is not None:
        row_out = row + tl.load(bounds.row_starts + unit.sequence)
    out = ((unit.batch * FORM.classes + i_c) * FORM.H + i_h) * NM + row_out
    list_at = indices + out * NB
    surplus = (hi - lo == 1) & (count_lo - count_hi > 1)  # equal scores, and not all may be kept
    kept = tl.full((), 0, tl.int32)
    passed = tl.full((), 0, tl.int32)
    for start in range(0, n, STEP):
        block = start + tl.arange(0, STEP)
        own_bits = _bits(at, block, low, high, stride_line, PARTS if WHOLE else 1)
        keep = own_bits >= lo
        if surplus:
            tie = own_bits == lo
            before = passed + tl.cumsum(tie.to(tl.int32), 0) - 1
            passed += tl.sum(tie.to(tl.int32), 0)
            wins = before < room - count_hi
            if MASS:
                wins = wins & (mass + before.to(tl.float32) * lo.to(tl.float32, bitcast=True) < wanted)
            keep = keep & (wins | (own_bits > lo))
        keep = keep | ((own_bits < 0) & (block < n))
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(list_at + place, block, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    listed = tl.arange(0, LISTED)
    blocks = tl.where(listed < kept + overlapped, first_own + listed - kept, 0)
    tl.store(list_at + listed, blocks, mask=(listed >= kept) & (listed < NB))
    tl.store(counts + out, tl.minimum(kept + overlapped, NB))


def workers(block: int, rows: int) -> tuple[int, int, int]:
    """Warps of a program, how many candidates it writes at a time, and in how many places it cuts at once: with few
    rows each is finished as soon as can be, with many work is spared.
    """
    if rows <= 1024:
        return min(16, max(1, block // 512)), block, 4
    warps = min(16, max(1, block // 1024))
    return warps, min(block, 256 * warps), 1


def rank(
    scores: Tensor,
    indices: Tensor,
    counts: Tensor,
    choice: Choice,
    form: Form,
    bounds: Bounds,
    units: int,
    first_unit: int,
    budgets: list[tuple[int, float]],
    sink_blocks: int,
    local_blocks: int,
) -> None:
    """Writes the lists of a chunk of units.

    Args:
        scores: float32 `[chunk, C, H, rows, parts, ≥ NC]`; a row's scores are the sum of its parts. Overwritten.
        indices, counts: int32 `[B, C, H, NM, NB]` and `[B, C, H, NM]`.
        units: of a batch entry; the chunk begins at `first_unit`, counted over all.
        budgets: of each class, most blocks and mass; the mass is infinite for TopK.
    """
    NB = indices.shape[-1]
    rows = scores[..., 0, 0].numel()
    block = min(IN_REGISTERS, max(16, next_power_of_2(choice.NC)))
    warps, step, ways = workers(block, rows)
    _rank_kernel[(rows,)](
        scores,
        indices,
        counts,
        bounds,
        choice.T,
        choice.S,
        choice.NC,
        units,
        choice.NM,
        first_unit,
        scores.shape[-1],
        sink_blocks,
        local_blocks,
        *(blocks for blocks, _ in (budgets[0], budgets[-1])),
        *(mass for _, mass in (budgets[0], budgets[-1])),
        NB,
        FORM=form.of_rows,
        PARTS=scores.shape[4],
        MASS=any(mass != float("inf") for _, mass in budgets),
        WHOLE=block >= choice.NC,
        BLOCK=block,
        STEP=step,
        LISTED=next_power_of_2(NB),
        WAYS=ways,
        num_warps=warps,
    )
