"""Block scores for few query vectors, such as in decoding: the candidates are cut into pieces.

Tiles that walk all their candidates, as in `score.py`, would be too few to keep a GPU busy, and would read the
summaries twice. Here one kernel takes the logits of each piece, with the maximum and the sum of their exponentials, and
a second one the scores from the logits of all heads. Formula and layout are those of `score.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .candidates import Bounds, Choice, Form, candidates_of, reach, unit_of
from .primitives import product
from .score import first_summary, load_queries, load_summaries, log_sum, row_means, vectors_of
from .tiles import Tile, arch_of, cdiv, next_power_of_2, tile_sizes

FEW_TILES = 48  # of full tiles; fewer are cut into pieces
MANY_PIECES = 256  # keep a GPU busy
PARTIALS = 4096  # maxima of pieces that a program holds at once


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


@triton.jit(do_not_specialize=["T", "S", "NC", "NL", "NP", "first_unit", "lines"])
def _mean_kernel(
    logits,
    peaks,
    sums,
    scores,
    bounds,
    stride_line,
    T,
    S,
    NC,
    NL,
    NP,
    first_unit,
    lines,
    FORM: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program: WIDTH candidates of one unit, class and group, from the logits of all its parts. PIECES of PIECE
    candidates are looked at together.
    """
    VECTORS: tl.constexpr = FORM.vectors
    pid = tl.program_id(0).to(tl.int64)
    line = pid % lines  # [chunk, C, H]
    key = (pid // lines).to(tl.int32) * WIDTH + tl.arange(0, WIDTH)
    unit = unit_of(first_unit + line // FORM.H // FORM.classes, bounds, T, S, NL)
    _n_all, n_any = reach(unit, NC, FORM)
    if tl.min(key, 0) >= n_any:
        return
    pieces = tl.cdiv(n_any, PIECE)
    weights = tl.zeros([WIDTH, VECTORS], tl.float32)
    for part in range(0, FORM.parts):
        row, _t, _head, live = vectors_of(unit, part, FORM)
        at = (line * FORM.parts + part) * FORM.vectors + tl.arange(0, FORM.vectors)
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
        seen = live[None, :] & (key[:, None] < candidates_of(row, unit, NC, FORM)[None, :])
        x = tl.load(logits + at[None, :] * stride_line + key[:, None], mask=seen, other=float("-inf"))
        weights += tl.exp2(x - log_sum(m, l, live)[None, :])
    r = tl.arange(0, FORM.rows)
    row = unit.own * FORM.rows + r
    means = row_means(weights, row, unit, FORM, WIDTH)
    seen = key[:, None] < candidates_of(row, unit, NC, FORM)[None, :]
    tl.store(scores + (line * FORM.rows + r)[None, :] * stride_line + key[:, None], means, mask=seen)


def is_few(form: Form, tile: Tile, units: int) -> bool:
    """Whether tiles that walk all their candidates would be too small or too few; `units` over all batch entries."""
    return form.vectors < tile.rows or units * form.classes * form.H * form.parts < FEW_TILES


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
) -> None:
    """As `fill_scores`, with the parts of each row added up: `[chunk, C, H, rows, 1, ≥ NC]`."""
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
    lines = tiles // form.parts
    width = max(16, 8192 // form.vectors)
    while width > 64 and 2 * lines * cdiv(choice.NC, width) < MANY_PIECES:
        width //= 2
    _mean_kernel[(lines * cdiv(choice.NC, width),)](
        logits,
        peaks,
        sums,
        scores,
        bounds,
        line,
        *sizes,
        lines,
        FORM=form,
        PIECE=span * tile.keys,
        WIDTH=width,
        PIECES=max(1, min(next_power_of_2(pieces), PARTIALS // form.vectors)),
        num_warps=4,
    )
