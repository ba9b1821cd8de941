"""Block scores for few query vectors, such as in decoding: the candidates are cut into pieces.

Tiles that walk all their candidates, as in `score.py`, would be too few to keep a GPU busy, and would read the
summaries twice. Here one kernel takes the logits of each piece, with the maximum and the sum of their exponentials, and
a second one the scores from the logits of all heads. Formula and layout are those of `score.py`. Long rows are cut into
stretches, and the second kernel finds the best of each stretch, so that few are left to rank.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from .candidates import Bounds, Choice, Form, candidates_of, free_of, reach, unit_of
from .primitives import product
from .ranking import IN_REGISTERS, Best
from .score import first_summary, load_queries, load_summaries, log_sum, vectors_in, vectors_of
from .threshold import bits_of, cut_of, kept_of
from .tiles import Tile, arch_of, cdiv, next_power_of_2, tile_sizes

FEW_TILES = 48  # of full tiles; fewer are cut into pieces
MANY_PIECES = 256  # keep a GPU busy
PARTIALS = 4096  # maxima of pieces that a program holds at once
WEIGHTS = 8192  # that a program holds at once
LONG = 2048  # candidates; shorter rows are ranked at once


@triton.jit(do_not_specialize=["T", "S", "NC", "NL", "NP", "first_unit"])
def _logits_kernel(
    q,
    summaries,
    logits,
    peaks,
    sums,
    bounds,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_sb,
    stride_sn,
    stride_sh,
    stride_line,
    T,
    S,
    NC,
    NL,
    NP,
    first_unit,
    scale_log2,
    FORM: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    DP: tl.constexpr,
):
    """One program: one tile of vectors against one of NP pieces of the candidates, SPAN tiles of KEYS. Keeps the logits
    in base 2, scaled, and of each vector their maximum and the sum of exp2(logit − maximum).
    """
    VECTORS: tl.constexpr = FORM.vectors
    pid = tl.program_id(0).to(tl.int64)
    piece = (pid % NP).to(tl.int32)
    tile = pid // NP  # [chunk, C, H, parts]
    part = (tile % FORM.parts).to(tl.int32)
    i_h = tile // FORM.parts % FORM.H
    i_c = tile // FORM.parts // FORM.H % FORM.classes
    unit = unit_of(first_unit + tile // FORM.parts // FORM.H // FORM.classes, bounds, T, S, NL)
    _n_all, n_any = reach(unit, NC, FORM)
    if piece * SPAN * KEYS >= n_any:
        return
    dims = tl.arange(0, DP)
    s_at = first_summary(summaries, unit, i_h, bounds, stride_sb, stride_sn, stride_sh)
    q_tile, row, live = load_queries(q, unit, part, i_h, i_c, stride_qb, stride_qt, stride_qh, dims, FORM)
    n = candidates_of(row, unit, NC, FORM)
    line = tile * VECTORS + tl.arange(0, VECTORS)
    m = tl.full([VECTORS], float("-inf"), tl.float32)
    l = tl.zeros([VECTORS], tl.float32)
    for j in range(piece * SPAN, tl.minimum(piece * SPAN + SPAN, tl.cdiv(n_any, KEYS))):
        key = j * KEYS + tl.arange(0, KEYS)
        s_tile = load_summaries(s_at, stride_sn, key, n_any, dims, FORM)
        seen = live[None, :] & (key[:, None] < n[None, :])
        x = tl.where(seen, product(s_tile, tl.trans(q_tile)) * scale_log2, float("-inf"))  # [KEYS, vectors]
        tl.store(logits + line[None, :] * stride_line + key[:, None], x, mask=seen)
        peak = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        l = l * tl.exp2(m - shift) + tl.sum(tl.exp2(x - shift[None, :]), 0)
        m = peak
    tl.store(peaks + line * NP + piece, m, mask=live)
    tl.store(sums + line * NP + piece, l, mask=live)


@triton.jit(
    do_not_specialize=[
        "T", "S", "NC", "NL", "NP", "first_unit", "rows", "sink", "local", "blocks_0", "blocks_1"
    ]
)  # fmt: skip
def _mean_kernel(
    logits,
    peaks,
    sums,
    scores,
    best,
    best_blocks,
    bounds,
    stride_line,
    T,
    S,
    NC,
    NL,
    NP,
    first_unit,
    rows,
    sink,
    local,
    blocks_0,
    blocks_1,
    FORM: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """One program: WIDTH candidates of one row, from the logits of all its parts. PIECES of PIECE candidates are looked
    at together. The scores are kept, or those of forced candidates and the best of the others, at most KEPT.
    """
    VECTORS: tl.constexpr = FORM.counted
    pid = tl.program_id(0).to(tl.int64)
    line = pid % rows  # [chunk, C, H, rows]
    stretch = (pid // rows).to(tl.int32)
    r = (line % FORM.rows).to(tl.int32)
    group = line // FORM.rows
    unit = unit_of(first_unit + group // FORM.H // FORM.classes, bounds, T, S, NL)
    row = unit.own * FORM.rows + r
    n = candidates_of(row, unit, NC, FORM)
    if (row >= tl.cdiv(unit.Tq, FORM.block_m)) | (stretch * WIDTH >= n):
        return
    key = stretch * WIDTH + tl.arange(0, WIDTH)
    vector = r * FORM.row_vectors + tl.arange(0, VECTORS)
    pieces = tl.cdiv(n, PIECE)
    weights = tl.zeros([WIDTH, VECTORS], tl.float32)
    for part in range(0, FORM.parts):
        _row, _t, _head, live = vectors_of(vector, unit, part, FORM)
        at = (group * FORM.parts + part) * FORM.vectors + vector
        m = tl.full([VECTORS], float("-inf"), tl.float32)
        l = tl.zeros([VECTORS], tl.float32)
        for start in range(0, pieces, PIECES):
            piece = start + tl.arange(0, PIECES)
            written = live[:, None] & (piece < pieces)[None, :]
            own = at[:, None] * NP + piece[None, :]
            peak = tl.load(peaks + own, mask=written, other=float("-inf"))  # [vectors, PIECES]
            total = tl.load(sums + own, mask=written, other=0.0)
            peak_now = tl.maximum(m, tl.max(peak, 1))
            shift = tl.where(peak_now == float("-inf"), 0.0, peak_now)
            l = l * tl.exp2(m - shift) + tl.sum(total * tl.exp2(peak - shift[:, None]), 1)
            m = peak_now
        inside = live[None, :] & (key < stride_line)[:, None]  # whole lines, so that a load takes several
        x = tl.load(logits + at[None, :] * stride_line + key[:, None], mask=inside, other=float("-inf"))
        x = tl.where(live[None, :] & (key < n)[:, None], x, float("-inf"))
        weights += tl.exp2(x - log_sum(m, l, live)[None, :])
    means = tl.sum(weights, 1) / vectors_in(row, unit, FORM)
    at_scores = scores + line * stride_line + key
    if best is None:
        tl.store(at_scores, means, mask=key < n)
    else:
        blocks = tl.where(group // FORM.H % FORM.classes == 0, blocks_0, blocks_1)
        _n, low, high, room, _first_own, _overlapped = free_of(row, unit, NC, sink, local, blocks, FORM)
        free = (key >= low) & (key < high)
        tl.store(at_scores, means, mask=(key < n) & (free == 0))
        bits = bits_of(tl.where(free, means, -1.0))
        least = tl.min(tl.where(free, bits, 0x7FFFFFFF), 0)
        most = tl.max(bits, 0)
        cut = cut_of(scores, bits, least, most, low, high, room, KEPT, 0.0, 0.0, False, True, WIDTH)
        keep, _passed = kept_of(bits, cut, room, 0.0, tl.full((), 0, tl.int32), False)
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
        best_at = (line * tl.cdiv(NC, WIDTH) + stretch) * KEPT
        tl.store(best + best_at + place, bits.to(tl.float32, bitcast=True), mask=keep)
        tl.store(best_blocks + best_at + place, key, mask=keep)
        entry = tl.arange(0, KEPT)
        tl.store(best + best_at + entry, -1.0, mask=entry >= tl.sum(keep.to(tl.int32), 0))


def is_few(form: Form, tile: Tile, units: int) -> bool:
    """Whether tiles that walk all their candidates would be too small or too few; `units` over all batch entries."""
    return form.vectors < tile.rows or units * form.classes * form.H * form.parts < FEW_TILES


def stretch_of(choice: Choice, form: Form, most_blocks: int) -> tuple[int, int]:
    """Candidates of a stretch, and how many of them are kept: of a whole row about as many as a stretch has. Both are
    0 where rows are short, or too much of them would be kept.
    """
    kept = next_power_of_2(most_blocks)
    width = 1 << isqrt(choice.NC * kept).bit_length() >> 1
    width = min(width, WEIGHTS // form.counted)
    few = width >= 4 * kept and cdiv(choice.NC, width) * kept <= IN_REGISTERS
    return (width, kept) if few and max(LONG, 4 * width) <= choice.NC else (0, 0)


def fill_scores_of_few(
    scores: Tensor,
    q: Tensor,
    summaries: Tensor,
    choice: Choice,
    form: Form,
    bounds: Bounds,
    units: int,
    first_unit: int,
    scale_log2: float,
    blocks: list[int],
    sink_blocks: int,
    local_blocks: int,
) -> Best | None:
    """As `fill_scores`, with the parts of each row added up: `[chunk, C, H, rows, 1, ≥ NC]`. Of long rows only the
    forced candidates are there, and the others that `blocks`, the most of each class, have room for are returned.
    """
    tile = tile_sizes(form.D, q.dtype, arch_of(q.device), "logits")
    line = scores.shape[-1]
    tiles = scores.shape[0] * form.classes * form.H * form.parts
    # pieces as long as they can be, while there are enough of them
    span = 1
    while span < 8 and tiles * cdiv(choice.NC, 2 * span * tile.keys) >= MANY_PIECES:
        span *= 2
    pieces = cdiv(choice.NC, span * tile.keys)
    logits = scores.new_empty(tiles, form.vectors, line)
    peaks, sums = scores.new_empty(2, tiles, form.vectors, pieces)
    sizes = choice.T, choice.S, choice.NC, units, pieces, first_unit
    _logits_kernel[(tiles * pieces,)](
        q,
        summaries,
        logits,
        peaks,
        sums,
        bounds,
        *q.stride()[:3],
        *summaries.stride()[:3],
        line,
        *sizes,
        scale_log2,
        FORM=form,
        KEYS=tile.keys,
        SPAN=span,
        DP=max(16, next_power_of_2(form.D)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    rows = scores.shape[:4].numel()
    width, kept = stretch_of(choice, form, max(blocks))
    best = None
    if kept > 0:
        shape = rows, cdiv(choice.NC, width), kept
        best = Best(scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32), width)
    else:
        width = max(16, WEIGHTS // form.counted)
        while width > 64 and 2 * rows * cdiv(choice.NC, width) < MANY_PIECES:
            width //= 2
    _mean_kernel[(rows * cdiv(choice.NC, width),)](
        logits,
        peaks,
        sums,
        scores,
        None if best is None else best.scores,
        None if best is None else best.blocks,
        bounds,
        line,
        *sizes,
        rows,
        sink_blocks,
        local_blocks,
        blocks[0],
        blocks[-1],
        FORM=form,
        PIECE=span * tile.keys,
        PIECES=max(1, min(next_power_of_2(pieces), PARTIALS // form.counted)),
        WIDTH=width,
        KEPT=kept,
        num_warps=4,
        enable_fp_fusion=False,  # else threads that add up the same sum differ in its last bit, and race
    )
    return best
