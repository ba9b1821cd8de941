"""The choice of key blocks on a GPU: scores of a chunk of rows into a workspace, lists from those, and the next chunk.

Everything is laid out from shapes alone: nothing is read back from the device, and the workspace stays below a fixed
size, whatever the lengths. Rules and results are those of `select_blocks`.
"""

import torch
from torch import Tensor

from .candidates import Choice
from .pieces import fill_scores_of_few, is_few
from .primitives import LOG2E
from .ranking import rank
from .score import fill_scores
from .tiles import arch_of, cdiv, tile_sizes

WORKSPACE_BYTES = 256 << 20


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
    tile = tile_sizes(choice.D, q.dtype, arch_of(q.device), "score")
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
        best = None
        if choice.NC > 0:
            call = scores, q, summaries, choice, form, bounds, units, first_unit, scale * LOG2E.value
            if few:
                best = fill_scores_of_few(*call, [blocks for blocks, _ in budgets], sink_blocks, local_blocks)
            else:
                fill_scores(*call)
        rank(scores, best, indices, counts, choice, form, bounds, units, first_unit, budgets, sink_blocks, local_blocks)
    return indices, counts
