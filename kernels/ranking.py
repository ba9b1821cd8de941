"""Scores → lists: the blocks of each row that its budget keeps, without sorting.

    TopK: the k best free candidates.    TopP: free candidates in falling score until their mass, with that of the
    forced ones before them, reaches `mass`; at most k.

One program ranks one row. Where the best of every stretch of candidates were found before (`Best`), it looks at those
alone: the best of a row are among the best of its stretches. Forced candidates and the row's own blocks are added, and
the list is written ascending.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .candidates import Bounds, Choice, Form, free_of, unit_of
from .threshold import cut_of, kept_of, load_bits, sum_of
from .tiles import next_power_of_2

IN_REGISTERS = 16384  # scores that a program keeps in registers; longer rows are read again in every step


class Best(NamedTuple):
    """The best free candidates of each stretch of a row, ascending."""

    scores: Tensor  # float32 [rows, stretches, kept]; −1 where there are fewer
    blocks: Tensor  # int32, the same shape
    width: int  # candidates of a stretch


@triton.jit(do_not_specialize=["T", "S", "NC", "NL", "NM", "first_unit", "sink", "local", "blocks_0", "blocks_1", "NB"])
def _rank_kernel(
    scores,
    best,
    best_blocks,
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
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    LISTED: tl.constexpr,
):
    """KEPT of every WIDTH candidates are among the best, if those are given."""
    line = tl.program_id(0).to(tl.int64)  # [units, C, H, rows]
    i_h = line // FORM.rows % FORM.H
    i_c = line // FORM.rows // FORM.H % FORM.classes
    unit = unit_of(line // FORM.rows // FORM.H // FORM.classes + first_unit, bounds, T, S, NL)
    row = unit.own * FORM.rows + (line % FORM.rows).to(tl.int32)
    blocks = tl.where(i_c == 0, blocks_0, blocks_1)
    n, low, high, room, first_own, overlapped = free_of(row, unit, NC, sink, local, blocks, FORM)
    wanted = tl.where(i_c == 0, wanted_0, wanted_1)
    if row >= tl.cdiv(unit.Tq, FORM.block_m):
        return

    at = scores + line * PARTS * stride_line
    listed = tl.arange(0, LISTED)
    forced_mass = tl.full((), 0.0, tl.float32)
    if MASS:
        forced = tl.where(listed < low, listed, high + listed - low)
        forced_mass += sum_of(load_bits(at, forced, 0, n, stride_line, PARTS), forced < n)
    first, end = low, high  # entries that are free candidates
    if best is not None:
        first_best = line * tl.cdiv(NC, WIDTH) * KEPT
        at = best + first_best
        first = 0
        end = tl.cdiv(high, WIDTH) * KEPT
    offs = tl.arange(0, BLOCK)
    if WHOLE:
        bits = load_bits(at, offs, first, end, stride_line, PARTS)
        least = tl.min(tl.where(bits < 0, 0x7FFFFFFF, bits), 0)
        most = tl.max(bits, 0)
    else:
        bits = offs  # not used
        least = tl.full((), 0x7FFFFFFF, tl.int32)
        most = tl.full((), -1, tl.int32)
        if PARTS > 1:
            tl.debug_barrier()  # the forced ones are read before they are written
        for start in range(0, high, BLOCK):
            own = load_bits(at, start + offs, low, high, stride_line, PARTS)
            least = tl.minimum(least, tl.min(tl.where(own < 0, 0x7FFFFFFF, own), 0))
            most = tl.maximum(most, tl.max(own, 0))
            if PARTS > 1:
                tl.store(at + start + offs, own.to(tl.float32, bitcast=True), mask=own >= 0)
        if PARTS > 1:
            tl.debug_barrier()  # what one thread stored, others read
    cut = cut_of(at, bits, least, most, first, end, room, room, forced_mass, wanted, MASS, WHOLE, BLOCK)

    row_out = row
    if bounds.row_starts is not None:
        row_out = row + tl.load(bounds.row_starts + unit.sequence)
    out = ((unit.batch * FORM.classes + i_c) * FORM.H + i_h) * NM + row_out
    list_at = indices + out * NB
    kept = low
    passed = tl.full((), 0, tl.int32)
    for start in range(0, end, STEP):
        entry = start + tl.arange(0, STEP)
        own = bits
        if STEP < BLOCK or not WHOLE:
            own = load_bits(at, entry, first, end, stride_line, PARTS if WHOLE else 1)
        keep, passed = kept_of(own, cut, room, wanted, passed, MASS)
        block = entry
        if best is not None:
            block = tl.load(best_blocks + first_best + entry, mask=keep, other=0)
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(list_at + place, block, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    candidates = kept + n - high
    total = candidates + overlapped
    after = tl.where(listed < candidates, high + listed - kept, first_own + listed - candidates)
    after = tl.where(listed < total, after, 0)
    others = (listed < low) | ((listed >= kept) & (listed < NB))
    tl.store(list_at + listed, tl.where(listed < low, listed, after), mask=others)
    tl.store(counts + out, tl.minimum(total, NB))


def workers(block: int, rows: int) -> tuple[int, int]:
    """Warps of a program, and how many candidates it writes at a time: with few rows each is finished as soon as can
    be, with many registers are spared.
    """
    if rows <= 1024:
        return min(16, max(1, block // 256)), block
    warps = min(16, max(1, block // 1024))
    return warps, min(block, 256 * warps)


def rank(
    scores: Tensor,
    best: Best | None,
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
        best: of each row; None to look at all its scores. Otherwise `scores` are those of forced candidates.
        indices, counts: int32 `[B, C, H, NM, NB]` and `[B, C, H, NM]`.
        units: of a batch entry; the chunk begins at `first_unit`, counted over all.
        budgets: of each class, most blocks and mass; the mass is infinite for TopK.
    """
    NB = indices.shape[-1]
    rows = scores[..., 0, 0].numel()
    entries, width, kept = choice.NC, 0, 0
    if best is not None:
        _, stretches, kept = best.scores.shape
        entries, width = stretches * kept, best.width
    block = min(IN_REGISTERS, max(16, next_power_of_2(entries)))
    warps, step = workers(block, rows)
    _rank_kernel[(rows,)](
        scores,
        None if best is None else best.scores,
        None if best is None else best.blocks,
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
        WIDTH=width,
        KEPT=kept,
        WHOLE=block >= entries,
        BLOCK=block,
        STEP=step,
        LISTED=next_power_of_2(NB),
        num_warps=warps,
    )
