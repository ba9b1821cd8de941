"""Block scores per GQA group, for tiles of query vectors that walk all their candidates.

    score[j] = mean over the row's tokens and the group's heads of softmax_j(q · summary[j] · scale), j a candidate

Two passes over the summaries: the first takes the log-sum-exp of each vector, the second adds up exp(logit − lse) over
the vectors of each row, always in the same order. A row's scores are a line of float32; a row that has several tiles
has a line for each, its parts, and their sum is the score.
"""

import triton
import triton.language as tl
from torch import Tensor

from .candidates import Bounds, Choice, Form, candidates_of, reach, unit_of
from .primitives import product, softmax_step
from .tiles import arch_of, next_power_of_2, tile_sizes


@triton.jit
def load_queries(q, unit, part, i_h, i_c, stride_b, stride_t, stride_h, dims, FORM: tl.constexpr):
    """The vectors of a tile `[vectors, DP]`, the row of each, and which of them count."""
    row, t, head, live = vectors_of(tl.arange(0, FORM.vectors), unit, part, FORM)
    at = q + unit.batch * stride_b + (unit.q0 + t)[:, None] * stride_t
    at += ((i_h * FORM.heads + head) * FORM.step + i_c)[:, None] * stride_h + dims[None, :]
    inside = live[:, None] & (dims < FORM.D)[None, :]
    tile = tl.load(at, mask=inside, other=0.0)
    if FORM.averages:
        noise = tl.load(at + stride_h, mask=inside, other=0.0)
        tile = ((tile.to(tl.float32) + noise.to(tl.float32)) * 0.5).to(tile.dtype)
    return tile, row, live


@triton.jit
def vectors_of(vector, unit, part, FORM: tl.constexpr):
    """Row, token and scored head of vectors of a tile, and which of them count."""
    row = unit.own * FORM.rows + vector // FORM.row_vectors
    token = part // FORM.head_chunks * FORM.tile_tokens + vector // FORM.tile_heads % FORM.tile_tokens
    head = part % FORM.head_chunks * FORM.tile_heads + vector % FORM.tile_heads
    t = row * FORM.block_m + token
    return row, t, head, (token < FORM.tokens) & (t < unit.Tq) & (head < FORM.heads)


@triton.jit
def first_summary(summaries, unit, i_h, bounds, stride_b, stride_n, stride_h):
    at = summaries + unit.batch * stride_b + i_h * stride_h
    if bounds.summary_starts is not None:
        at += tl.load(bounds.summary_starts + unit.sequence).to(tl.int64) * stride_n
    return at


@triton.jit
def load_summaries(at, stride_n, key, n, dims, FORM: tl.constexpr):
    """A tile of summaries `[KEYS, DP]`, 0 from `n` on."""
    inside = (key < n)[:, None] & (dims < FORM.D)[None, :]
    return tl.load(at + key.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=inside, other=0.0)


@triton.jit
def log_sum(m, l, live):
    """In base 2, of sums `l` relative to maxima `m`; +∞, so that weights are 0, where nothing was seen."""
    seen = live & (l != 0.0)
    return tl.where(seen, m + tl.log2(tl.where(seen, l, 1.0)), float("inf"))


@triton.jit
def row_means(weights, row, unit, FORM: tl.constexpr, KEYS: tl.constexpr):
    """`[KEYS, vectors]` → `[KEYS, rows]`, the sum of each row over the number of its vectors, in all its parts."""
    if FORM.rows == 1:
        total = tl.sum(weights, 1)[:, None]
    else:
        total = tl.sum(tl.reshape(weights, [KEYS, FORM.rows, FORM.row_vectors]), 2)
    return total / vectors_in(row, unit, FORM)[None, :]


@triton.jit
def vectors_in(row, unit, FORM: tl.constexpr):
    """How many vectors of a row count, in all its parts; at least 1."""
    tokens = tl.maximum(tl.minimum(unit.Tq - row * FORM.block_m, FORM.tokens), 1)
    return (tokens * FORM.heads).to(tl.float32)


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
    q_tile, row, live = load_queries(q, unit, part, i_h, i_c, stride_qb, stride_qt, stride_qh, dims, FORM)
    s_at = first_summary(summaries, unit, i_h, bounds, stride_sb, stride_sn, stride_sh)

    n = candidates_of(row, unit, NC, FORM)
    m = tl.full([VECTORS], float("-inf"), tl.float32)
    l = tl.zeros([VECTORS], tl.float32)
    for MASKED in tl.static_range(2):  # first the tiles that are candidates of every row
        for j in range(n_all // KEYS if MASKED else 0, tl.cdiv(n_any, KEYS) if MASKED else n_all // KEYS):
            key = j * KEYS + offs
            s_tile = load_summaries(s_at, stride_sn, key, n_any, dims, FORM)
            logits = product(q_tile, tl.trans(s_tile))  # [vectors, KEYS]
            if MASKED:
                logits = tl.where(key[None, :] < n[:, None], logits, float("-inf"))
            _weights, _decay, m, l = softmax_step(logits, m, l, scale_log2, live, False)
    lse = log_sum(m, l, live)

    r = tl.arange(0, FORM.rows)
    row = unit.own * FORM.rows + r
    n = candidates_of(row, unit, NC, FORM)
    line = scores + ((((i_unit * FORM.classes + i_c) * FORM.H + i_h) * FORM.rows + r) * FORM.parts + part) * stride_line
    for j in range(0, tl.cdiv(n_any, KEYS)):
        key = j * KEYS + offs
        s_tile = load_summaries(s_at, stride_sn, key, n_any, dims, FORM)
        weights = tl.exp2(product(s_tile, tl.trans(q_tile)) * scale_log2 - lse[None, :])  # [KEYS, vectors]
        means = row_means(weights, row, unit, FORM, KEYS)
        tl.store(line[None, :] + key[:, None], means, mask=key[:, None] < n[None, :])


def fill_scores(
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
    """Writes the scores of a chunk of units, float32 `[chunk, C, H, rows, parts, ≥ NC]`; `units` are those of a batch
    entry, and the chunk begins at `first_unit`, counted over all.
    """
    tile = tile_sizes(form.D, q.dtype, arch_of(q.device), "score")
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
