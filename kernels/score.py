"""Block scores per GQA group, and the choice of blocks from them.

    score[j] = mean over the row's tokens and the group's heads of softmax_j(q · summary[j] · scale), j a candidate

Two passes over the summaries: the first takes the log-sum-exp of each query vector, the second adds up
exp(logit − lse) over the vectors of each row, always in the same order, and writes a line of scores; `ranking.py` makes
lists of the lines. Units of rows go in chunks, so that the lines stay below a fixed size. A few tiles alone (decoding)
would leave a GPU idle: there the first pass is cut along the candidates, too, and keeps its logits for the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .candidates import Bounds, Choice, Form, candidates_of, reach, unit_of
from .primitives import LOG2E, product, softmax_step
from .ranking import rank
from .tiles import Tile, arch_of, cdiv, next_power_of_2, processors_of, tile_sizes

WORKSPACE_BYTES = 256 << 20
FEW_TILES = 48  # of full tiles; fewer are cut along the candidates, too
MANY_PIECES = 256  # keep a GPU busy


@triton.jit
def _queries(q, unit, part, i_h, i_c, stride_b, stride_t, stride_h, dims, FORM: tl.constexpr):
    """The vectors of a tile `[vectors, DP]`, the row of each, and which of them count."""
    row, t, head, live = _vectors(unit, part, FORM)
    at = q + unit.batch * stride_b + (unit.q0 + t)[:, None] * stride_t
    at += ((i_h * FORM.heads + head) * FORM.step + i_c)[:, None] * stride_h + dims[None, :]
    inside = live[:, None] & (dims < FORM.D)[None, :]
    tile = tl.load(at, mask=inside, other=0.0)
    if FORM.averages:
        noise = tl.load(at + stride_h, mask=inside, other=0.0)
        tile = ((tile.to(tl.float32) + noise.to(tl.float32)) * 0.5).to(tile.dtype)
    return tile, row, live


@triton.jit
def _vectors(unit, part, FORM: tl.constexpr):
    """Row, token and scored head of each vector of a tile, and which of them count."""
    vector = tl.arange(0, FORM.vectors)
    row = unit.own * FORM.rows + vector // FORM.row_vectors
    token = part // FORM.head_chunks * FORM.tile_tokens + vector // FORM.tile_heads % FORM.tile_tokens
    head = part % FORM.head_chunks * FORM.tile_heads + vector % FORM.tile_heads
    t = row * FORM.block_m + token
    return row, t, head, (token < FORM.tokens) & (t < unit.Tq) & (head < FORM.heads)


@triton.jit
def _first_summary(summaries, unit, i_h, bounds, stride_b, stride_n, stride_h):
    at = summaries + unit.batch * stride_b + i_h * stride_h
    if bounds.summary_starts is not None:
        at += tl.load(bounds.summary_starts + unit.sequence).to(tl.int64) * stride_n
    return at


@triton.jit
def _summaries(at, stride_n, key, n, dims, FORM: tl.constexpr):
    """A tile of summaries `[KEYS, DP]`, 0 from `n` on."""
    inside = (key < n)[:, None] & (dims < FORM.D)[None, :]
    return tl.load(at + key.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _log_sum(m, l, live):
    """In base 2, of sums `l` relative to maxima `m`; +∞, so that weights are 0, where nothing was seen."""
    seen = live & (l != 0.0)
    return tl.where(seen, m + tl.log2(tl.where(seen, l, 1.0)), float("inf"))


@triton.jit
def _row_means(weights, row, unit, FORM: tl.constexpr, KEYS: tl.constexpr):
    """`[KEYS, vectors]` → `[KEYS, rows]`, the sum of each row over the number of its vectors, in all its parts."""
    if FORM.rows == 1:
        total = tl.sum(weights, 1)[:, None]
    else:
        total = tl.sum(tl.reshape(weights, [KEYS, FORM.rows, FORM.row_vectors]), 2)
    tokens = tl.maximum(tl.minimum(unit.Tq - row * FORM.block_m, FORM.tokens), 1)
    return total / (tokens * FORM.heads).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T", "S", "NC", "NL", "first_unit", "chunk"])
def _score_kernel(
    q,
    summaries,
    scores,
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
    first_unit,
    chunk,
    scale_log2,
    FORM: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    """One program: one tile of vectors against all its candidates, twice."""
    VECTORS: tl.constexpr = FORM.vectors
    pid = tl.program_id(0).to(tl.int64)  # one KV head after another, most candidates first
    i_unit = chunk - 1 - pid % chunk
    part = (pid // chunk % FORM.parts).to(tl.int32)
    i_h = pid // chunk // FORM.parts % FORM.H
    i_c = pid // chunk // FORM.parts // FORM.H
    unit = unit_of(first_unit + i_unit, bounds, T, S, NL)
    n_all, n_any = reach(unit, NC, FORM)
    if n_any == 0:
        return
    dims = tl.arange(0, DP)
    offs = tl.arange(0, KEYS)
    q_tile, row, live = _queries(q, unit, part, i_h, i_c, stride_qb, stride_qt, stride_qh, dims, FORM)
    s_at = _first_summary(summaries, unit, i_h, bounds, stride_sb, stride_sn, stride_sh)

    n = candidates_of(row, unit, NC, FORM)
    m = tl.full([VECTORS], float("-inf"), tl.float32)
    l = tl.zeros([VECTORS], tl.float32)
    for MASKED in tl.static_range(2):  # first the tiles that are candidates of every row
        for j in range(n_all // KEYS if MASKED else 0, tl.cdiv(n_any, KEYS) if MASKED else n_all // KEYS):
            key = j * KEYS + offs
            s_tile = _summaries(s_at, stride_sn, key, n_any, dims, FORM)
            logits = product(q_tile, tl.trans(s_tile))  # [vectors, KEYS]
            if MASKED:
                logits = tl.where(key[None, :] < n[:, None], logits, float("-inf"))
            _weights, _decay, m, l = softmax_step(logits, m, l, scale_log2, live, False)
    lse = _log_sum(m, l, live)

    r = tl.arange(0, FORM.rows)
    row = unit.own * FORM.rows + r
    n = candidates_of(row, unit, NC, FORM)
    line = scores + ((((i_unit * FORM.classes + i_c) * FORM.H + i_h) * FORM.rows + r) * FORM.parts + part) * stride_line
    for j in range(0, tl.cdiv(n_any, KEYS)):
        key = j * KEYS + offs
        s_tile = _summaries(s_at, stride_sn, key, n_any, dims, FORM)
        weights = tl.exp2(product(s_tile, tl.trans(q_tile)) * scale_log2 - lse[None, :])  # [KEYS, vectors]
        means = _row_means(weights, row, unit, FORM, KEYS)
        tl.store(line[None, :] + key[:, None], means, mask=key[:, None] < n[None, :])


@triton.jit(do_not_specialize=["T", "S", "NC", "NL", "NP", "first_unit", "chunk"])
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
    chunk,
    scale_log2,
    FORM: tl.constexpr,
    STEPS: tl.constexpr,
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
    s_at = _first_summary(summaries, unit, i_h, bounds, stride_sb, stride_sn, stride_sh)
    q_tile, row, live = _queries(q, unit, part, i_h, i_c, stride_qb, stride_qt, stride_qh, dims, FORM)
    n = candidates_of(row, unit, NC, FORM)
    line = tile * VECTORS + tl.arange(0, VECTORS)
    m = tl.full([VECTORS], float("-inf"), tl.float32)
    l = tl.zeros([VECTORS], tl.float32)
    for j in range(piece * SPAN, tl.minimum(piece * SPAN + SPAN, tl.cdiv(n_any, KEYS))):
        key = j * KEYS + tl.arange(0, KEYS)
        s_tile = _summaries(s_at, stride_sn, key, n_any, dims, FORM)
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
        row, _t, _head, live = _vectors(unit, part, FORM)
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
        weights += tl.exp2(x - _log_sum(m, l, live)[None, :])
    r = tl.arange(0, FORM.rows)
    row = unit.own * FORM.rows + r
    means = _row_means(weights, row, unit, FORM, WIDTH)
    seen = key[:, None] < candidates_of(row, unit, NC, FORM)[None, :]
    tl.store(scores + (line * FORM.rows + r)[None, :] * stride_line + key[:, None], means, mask=seen)


def is_few(form: Form, tile: Tile, units: int) -> bool:
    """Whether the tiles are too small or too few to fill a GPU; `units` over all batch entries."""
    return form.vectors < tile.rows or units * form.classes * form.H * form.parts < FEW_TILES


def select(
    q: Tensor,
    summaries: Tensor,
    choice: Choice,
    budgets: list[tuple[int, float]],
    sink_blocks: int,
    local_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The lists of every row.

    Args:
        q: `[B, T, HQ, D]`; summaries `[B, NC, H, D]`; each with D contiguous.
        budgets: of each class, most blocks and mass; the mass is infinite for TopK.
        scale: of the logits, > 0.

    Returns:
        indices int32 `[B, C, H, NM, NB]` and counts int32 `[B, C, H, NM]`, with `choice.NM` rows.
    """
    arch = arch_of(q.device)
    tile = tile_sizes(choice.D, q.dtype, arch, "score")
    form = choice.form(tile.rows, WORKSPACE_BYTES)
    units, bounds = choice.units(form.rows)
    shape = choice.B, form.classes, choice.H, choice.NM, max(blocks for blocks, _ in budgets)
    # rows past the last packed sequence are written by no program
    make = torch.empty if choice.cu_q is None else torch.zeros
    indices = make(shape, dtype=torch.int32, device=q.device)
    counts = make(shape[:-1], dtype=torch.int32, device=q.device)

    few = is_few(form, tile, choice.B * units)
    line = cdiv(max(choice.NC, 1), 16) * 16  # so that lines are aligned
    lines = form.classes * choice.H * form.rows
    kept = form.classes * choice.H * form.parts * form.vectors if few else lines * (form.parts - 1)
    chunk = max(1, WORKSPACE_BYTES // (4 * line * (lines + kept)))
    for first_unit in range(0, choice.B * units, chunk):
        chunk = min(chunk, choice.B * units - first_unit)
        shape = chunk, form.classes, choice.H, form.rows, 1 if few else form.parts, line
        scores = torch.empty(shape, dtype=torch.float32, device=q.device)
        if choice.NC > 0:
            fill = _fill_few if few else _fill
            fill(scores, q, summaries, choice, form, bounds, units, first_unit, scale * LOG2E.value, arch)
        rank(scores, indices, counts, choice, form, bounds, units, first_unit, budgets, sink_blocks, local_blocks)
    return indices, counts


def _fill(scores, q, summaries, choice, form: Form, bounds: Bounds, units, first_unit, scale_log2, arch) -> None:
    """Writes the scores of a chunk of units, `[chunk, C, H, rows, parts, ≥ NC]`."""
    tile = tile_sizes(form.D, q.dtype, arch, "score")
    chunk, line = scores.shape[0], scores.shape[-1]
    _score_kernel[(chunk * form.classes * form.H * form.parts,)](
        q,
        summaries,
        scores,
        bounds,
        *q.stride()[:3],
        *summaries.stride()[:3],
        line,
        choice.T,
        choice.S,
        choice.NC,
        units,
        first_unit,
        chunk,
        scale_log2,
        FORM=form,
        KEYS=tile.keys,
        DP=max(16, next_power_of_2(form.D)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _fill_few(scores, q, summaries, choice, form: Form, bounds: Bounds, units, first_unit, scale_log2, arch) -> None:
    """Writes the scores of a chunk of few units, `[chunk, C, H, rows, 1, ≥ NC]`."""
    tile = tile_sizes(form.D, q.dtype, arch, "logits")
    chunk, line = scores.shape[0], scores.shape[-1]
    tiles = chunk * form.classes * form.H * form.parts
    # pieces as long as they can be, while there are enough of them
    span = 1
    while span < 8 and tiles * triton.cdiv(choice.NC, 2 * span * tile.keys) >= MANY_PIECES:
        span *= 2
    pieces = triton.cdiv(choice.NC, span * tile.keys)
    logits = scores.new_empty(tiles, form.vectors, line)
    peaks, sums = (scores.new_empty(tiles, form.vectors, pieces) for _ in range(2))
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
        chunk,
        scale_log2,
        FORM=form,
        STEPS=steps,
        KEYS=tile.keys,
        SPAN=span,
        DP=max(16, triton.next_power_of_2(form.D)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    lines = tiles // form.parts
    width = max(16, 8192 // form.vectors)
    while width > 64 and 2 * lines * triton.cdiv(choice.NC, width) < MANY_PIECES:
        width //= 2
    _mean_kernel[(lines * triton.cdiv(choice.NC, width),)](
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
        PIECES=max(1, min(next_power_of_2(pieces), 4096 // form.vectors)),
        num_warps=4,
    )
