"""Choosing the key blocks: score block summaries per GQA group, keep the best within a budget.

    summary[j] = mean of the keys of block j
    score[j]   = mean over the row's tokens and the group's heads of softmax_j(q · summary[j] · scale)

The candidates of a row are the complete blocks that end before its first token; the blocks that the row overlaps, its
nearest past and the first blocks of the sequence are forced. `pair_mean` averages the logits of a differential pair,
`per_class` scores signal and noise heads apart, `per_head` scores every head (ordinary attention). The choice passes
no gradient. Rows are scored in chunks, so that nothing of the size T × S / block_n is ever held. What follows is plain
torch, for any device; on a GPU the fused kernels of `ops.py` follow the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .ops import obstacle, triton_select, triton_summaries
from .selection import BlockSelection, check_cu_seqlens, query_rows

BACKENDS = ("auto", "triton", "torch")

_SCORE_BYTES = {"cpu": 16 << 20, "cuda": 48 << 20}  # of one chunk's logits; about four such buffers live at once

Mode = Literal["pair_mean", "per_class", "per_head"]


@dataclass(frozen=True)
class TopK:
    """The `blocks` best-scored blocks, forced ones included."""

    blocks: int

    def __post_init__(self):
        if type(self.blocks) is not int or self.blocks < 1:
            raise ValueError(f"blocks: expected a positive int, got {self.blocks!r}")

    @property
    def max_blocks(self) -> int:
        return self.blocks


@dataclass(frozen=True)
class TopP:
    """Forced blocks, then blocks in falling score until their softmax mass reaches `mass`; at most `max_blocks` in
    all.
    """

    mass: float
    max_blocks: int

    def __post_init__(self):
        if not isinstance(self.mass, int | float) or not 0 < self.mass <= 1:
            raise ValueError(f"mass: expected in (0, 1], got {self.mass!r}")
        if type(self.max_blocks) is not int or self.max_blocks < 1:
            raise ValueError(f"max_blocks: expected a positive int, got {self.max_blocks!r}")


Budget = TopK | TopP


def block_mean(blocks: Tensor, dim: int) -> Tensor:
    """The mean over `dim`, added as a fixed binary tree in float32 (float64 for float64), in the input's dtype.

    Elementwise additions in one fixed order: the bits do not depend on layout, batch, chunking or device.
    """
    total = blocks.movedim(dim, 0)
    n = total.shape[0]
    if total.dtype != torch.float64:
        total = total.float()
    while total.shape[0] > 1:
        half = total.shape[0] // 2
        folded = total[:half] + total[half : 2 * half]
        total = torch.cat([folded, total[2 * half :]]) if total.shape[0] % 2 else folded
    # by a tensor: on a GPU a division by a number is a product with its rounded inverse
    return (total[0] / total.new_full((), n)).to(blocks.dtype)


def block_summaries(k: Tensor, block_n: int, cu_seqlens_k: Tensor | None = None) -> Tensor:
    """The mean key of every complete block.

    Args:
        k: `[B, S, H, D]`; packed `[1, ΣS, H, D]` with `cu_seqlens_k` int32 `[N + 1]`.
        block_n: tokens per block.

    Returns:
        `[B, S // block_n, H, D]` in k's dtype; packed: the complete blocks of all sequences one after another.
    """
    if cu_seqlens_k is not None:
        bounds = cu_seqlens_k.tolist()
        return torch.cat([block_summaries(k[:, a:b], block_n) for a, b in pairwise(bounds)], 1)
    if k.is_cuda and not (k.requires_grad and torch.is_grad_enabled()) and obstacle(k) is None:
        return triton_summaries(k, block_n, None)  # the same bits, faster
    blocks = k.shape[1] // block_n
    return block_mean(k[:, : blocks * block_n].unflatten(1, (blocks, block_n)), 2)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor | None = None,
    *,
    mode: Mode = "pair_mean",
    budget: Budget | tuple[Budget, Budget] = TopK(64),
    block_m: int = 64,
    block_n: int = 64,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    row_queries: Literal["all", "first"] = "all",
    scale: float | None = None,
    summaries: Tensor | None = None,
    key_tokens: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> BlockSelection:
    """Selects key blocks for every row of queries and GQA group.

    Args:
        q: `[B, T, HQ, D]`; packed `[1, ΣT, HQ, D]`. Even heads are signal, odd heads the noise of the same pair.
        k: `[B, S, H, D]`; its summaries are computed here. None when `summaries` is given.
        mode: which logits are scored. "pair_mean": those of a pair averaged, one list (C = 1). "per_class": signal and
            noise apart (C = 2). "per_head": every head, one list; for ordinary attention.
        budget: `TopK` or `TopP`, forced blocks included; for "per_class" one for both classes or a pair (signal,
            noise).
        block_m, block_n: tokens per row of queries and per key block.
        sink_blocks: the first blocks of the sequence, always kept.
        local_blocks: blocks always kept, counted back from the block of the row's first token; at least 1.
        row_queries: "all" scores with the mean over the row's tokens, for prompts that are given; "first" with the
            row's first token alone, which is strictly causal: the form for training and perplexity. The same for
            block_m = 1.
        scale: of the logits; D ** -0.5 by default.
        summaries: `[B, NC, H, D]` from `block_summaries` or a cache, NC ≥ key_tokens // block_n; packed, those of each
            sequence's complete blocks one after another.
        key_tokens: S when `summaries` is given: an int, or integers `[B]` on q's device. Query t stands at key
            position S − T + t.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, the bounds of packed sequences.
        backend: "triton" (fused, CUDA; nothing is read back from the device), "torch" (any device; reads the bounds of
            packed sequences) or "auto": on CUDA "triton" where it takes the dtype and head size, else "torch".

    Returns:
        BlockSelection with NB = the (larger) budget. A row before its sequence's first key, where T exceeds a length in
        `key_tokens`, gets an empty list. Packed rows of `block_m` > 1 may be followed by empty lists: "triton" knows
        how many rows there are at most, not how many.

    Raises:
        ValueError: shapes, dtypes or devices disagree, T > S, an unknown mode, an odd group where a mode needs pairs,
            a budget below sink_blocks + local_blocks + ⌈(block_m − 1) / block_n⌉, or a backend that cannot do what is
            asked.
    """
    _check_sizes(block_m, block_n, sink_blocks, local_blocks, mode, row_queries)
    budgets = _check_budget(budget, mode, sink_blocks + local_blocks + -(-(block_m - 1) // block_n))
    S = _check_tensors(q, k, summaries, key_tokens, mode, block_n, cu_seqlens_q, cu_seqlens_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _backend(backend, q) == "triton":
        if summaries is None:
            summaries = triton_summaries(k.detach(), block_n, cu_seqlens_k)
        lists = triton_select(
            q.detach(),
            summaries.detach(),
            S,
            mode=mode,
            budgets=[(b.max_blocks, b.mass if isinstance(b, TopP) else float("inf")) for b in budgets],
            block_m=block_m,
            block_n=block_n,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
            row_queries=row_queries,
            scale=scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        return BlockSelection(*lists, block_m, block_n)
    if summaries is None:
        summaries = block_summaries(k.detach(), block_n, cu_seqlens_k)
    choose = _Chooser(mode, budgets, block_m, block_n, sink_blocks, local_blocks, row_queries, scale)
    with torch.autocast(q.device.type, enabled=False):  # scores stay in float32
        return BlockSelection(*_choose_all(choose, q, summaries, S, cu_seqlens_q, cu_seqlens_k), block_m, block_n)


def _backend(name: str, q: Tensor) -> str:
    """The backend that is used: a named one, or none at all."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "auto":
        return "triton" if q.is_cuda and obstacle(q) is None else "torch"
    if name == "triton" and (reason := obstacle(q)):
        raise ValueError(f'backend: "triton": {reason}; "torch" would do')
    return name


def _choose_all(choose, q, summaries, S, cu_seqlens_q, cu_seqlens_k) -> tuple[Tensor, Tensor]:
    """The lists of one batch, or of packed sequences one after another."""
    if cu_seqlens_q is None:
        return choose(q, summaries, S)
    parts, first_summary = [], 0
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())):
        own = slice(first_summary, first_summary + (k1 - k0) // choose.block_n)
        first_summary = own.stop
        parts.append(choose(q[:, q0:q1], summaries[:, own], k1 - k0))  # no rows where a sequence has no queries
    return tuple(torch.cat(x, dim=3) for x in zip(*parts))


@dataclass(frozen=True)
class _Chooser:
    """One batch of equally many queries per sequence: chunks of rows are scored, then cut to the budget."""

    mode: Mode
    budgets: tuple[Budget, ...]  # one per class
    block_m: int
    block_n: int
    sink_blocks: int
    local_blocks: int
    row_queries: str
    scale: float

    def __call__(self, q: Tensor, summaries: Tensor, S: int | Tensor) -> tuple[Tensor, Tensor]:
        """Returns indices int32 `[B, C, H, NM, NB]` and counts int32 `[B, C, H, NM]`."""
        B, T, HQ, D = q.shape
        NC, H = summaries.shape[1:3]
        rows = query_rows(B, T, S, self.block_m, device=q.device)
        position, tokens = rows.position.view(B, -1), rows.tokens.view(B, -1)
        NM = position.shape[1]
        C, NB = len(self.budgets), max(b.max_blocks for b in self.budgets)
        indices = torch.empty(B, C, H, NM, NB, dtype=torch.int32, device=q.device)
        counts = torch.empty(B, C, H, NM, dtype=torch.int32, device=q.device)
        row_logits = B * (HQ if self.mode != "pair_mean" else HQ // 2) * max(NC, 1)
        row_logits *= self.block_m if self.row_queries == "all" else 1
        chunk = max(1, _SCORE_BYTES.get(q.device.type, 16 << 20) // (4 * row_logits))
        by_block = summaries.permute(0, 2, 3, 1)[:, None]  # [B, 1, H, D, NC]
        by_block = by_block.contiguous() if by_block.dtype == torch.float64 else by_block.float().contiguous()
        for r in range(0, NM, chunk):
            chosen = slice(r, min(r + chunk, NM))
            candidates = NC
            if not isinstance(S, Tensor):  # the last row of the chunk has the most
                candidates = min(NC, max(0, S - T + (chosen.stop - 1) * self.block_m) // self.block_n)
            where = position[:, chosen], tokens[:, chosen]
            queries = self._row_queries(q[:, r * self.block_m : chosen.stop * self.block_m], H)
            scores = self._scores(queries, by_block[..., :candidates], *where)
            self._keep_best(scores, *where, indices[:, :, :, chosen], counts[:, :, :, chosen])
        return indices, counts

    def _row_queries(self, q: Tensor, H: int) -> Tensor:
        """The queries that score: `[B, C, H, rows, tokens, heads, D]`, in q's dtype. A last, shorter row is filled
        with zeros.
        """
        B, T, HQ, D = q.shape
        if self.row_queries == "first":
            q = q[:, :: self.block_m, None]
        else:
            q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, -T % self.block_m)).unflatten(1, (-1, self.block_m))
        q = q.unflatten(3, (H, HQ // H))  # [B, rows, tokens, H, G, D]
        if self.mode == "per_head":
            q = q[:, None]
        elif self.mode == "pair_mean":
            pairs = q.unflatten(4, (-1, 2))
            if q.dtype == torch.float64:
                q = pairs.mean(5)[:, None]
            else:
                q = ((pairs[..., 0, :].float() + pairs[..., 1, :].float()) / 2).to(q.dtype)[:, None]
        else:
            q = q.unflatten(4, (-1, 2)).movedim(5, 1)
        return q.permute(0, 1, 4, 2, 3, 5, 6)  # from [B, C, rows, tokens, H, heads, D]

    def _scores(self, queries: Tensor, by_block: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
        """Mean softmax over the candidates, `[B, C, H, rows, candidates]`; 0 where a block is no candidate of its
        row.
        """
        rows, per_row, heads = queries.shape[3:6]
        wide = by_block.dtype
        logits = (queries.to(wide) * self.scale).flatten(3, 5) @ by_block  # [B, C, H, rows·tokens·heads, candidates]
        logits = logits.unflatten(3, (rows, per_row * heads))
        NC = logits.shape[-1]
        if NC == 0:
            return logits.sum(4)
        block = torch.arange(NC, device=logits.device)
        excluded = block >= (position // self.block_n)[:, None, None, :, None, None]
        logits.masked_fill_(excluded, float("-inf"))
        peak = logits.amax(-1, keepdim=True)
        weights = logits.sub_(peak.masked_fill_(peak == float("-inf"), 0.0)).exp_()
        mass = weights.sum(-1, keepdim=True)
        share = mass.masked_fill_(mass == 0, 1.0).reciprocal_().unflatten(4, (per_row, heads))
        if per_row > 1:  # the tokens that fill a last, shorter row do not count
            counted = torch.arange(per_row, device=tokens.device) < tokens[..., None]
            share = share * counted[:, None, None, :, :, None, None]
            share = share / (tokens[:, None, None, :, None, None, None] * heads)
        else:
            share = share / heads
        return (share.flatten(4, 5).mT @ weights).squeeze(-2)

    def _keep_best(self, scores: Tensor, position: Tensor, tokens: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Writes the lists of one chunk: the forced blocks and, of the other candidates, the best that the budget
        allows.
        """
        NC, NB = scores.shape[-1], indices.shape[-1]
        # blocks that the row overlaps; none where it ends before its sequence's first key, in one shorter than T
        first_own = (position // self.block_n).clamp(min=0)  # also the number of candidates
        own = ((position + tokens - 1) // self.block_n - first_own + 1).clamp(min=0)
        first_own, own = (x[:, None, None, :, None] for x in (first_own, own))  # [B, 1, 1, rows, 1]
        block = torch.arange(NC, device=scores.device)
        forced = (block < self.sink_blocks) | (block > first_own - self.local_blocks)
        candidate = block < first_own
        # scores lie in [0, 1]: forced candidates come before all others, blocks that are no candidates after them
        rank = torch.where(forced, scores.new_tensor(2.0), scores).where(candidate, scores.new_tensor(-1.0))
        rank = torch.nan_to_num(rank, nan=0.0)  # NaN in q: some list of existing blocks, never an invalid one
        for c, budget in enumerate(self.budgets):
            room = (
                torch.minimum(budget.max_blocks - own, first_own.clamp(max=NC)).expand(*counts[:, :1].shape, 1).clone()
            )
            most = min(budget.max_blocks - 1, NC)
            keep = torch.zeros_like(rank[:, c : c + 1], dtype=torch.bool)
            if most > 0:
                best, at = rank[:, c : c + 1].topk(most, dim=-1)
                if isinstance(budget, TopP):
                    mass = scores[:, c : c + 1].gather(-1, at) * (best >= 0)
                    before = mass.cumsum(-1) - mass
                    wanted = ((best > 1) | ((best >= 0) & (before < budget.mass))).sum(-1, keepdim=True)
                    room = torch.minimum(room, wanted)
                keep = _best_of(rank[:, c : c + 1], best, room)
            kept = keep.sum(-1, keepdim=True)
            # ascending lists, packed left: each kept block goes to the place that its running count names
            lists = torch.zeros(*keep.shape[:-1], NB + 1, dtype=torch.int32, device=scores.device)
            place = torch.where(keep, keep.cumsum(-1) - 1, NB)
            lists.scatter_(-1, place, block.int().expand_as(place))
            at = torch.arange(NB, device=scores.device)
            is_own = (at >= kept) & (at < kept + own)
            lists = torch.where(is_own, first_own + at - kept, lists[..., :NB].long())
            indices[:, c : c + 1] = torch.where(at < kept + own, lists, 0).int()
            counts[:, c : c + 1] = (kept + own).squeeze(-1).int()


def _best_of(rank: Tensor, best: Tensor, room: Tensor) -> Tensor:
    """Which entries are among the `room` largest of their row, ties going to the lower index; `best` holds the
    largest, falling.
    """
    last = best.gather(-1, (room - 1).clamp(min=0))
    above = rank > last
    ties = rank == last
    ties &= ties.cumsum(-1) <= room - above.sum(-1, keepdim=True)
    return (above | ties) & (room > 0)


def _check_sizes(block_m, block_n, sink_blocks, local_blocks, mode, row_queries) -> None:
    for name, value, least in (
        ("block_m", block_m, 1),
        ("block_n", block_n, 1),
        ("sink_blocks", sink_blocks, 0),
        ("local_blocks", local_blocks, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected an int ≥ {least}, got {value!r}")
    if mode not in ("pair_mean", "per_class", "per_head"):
        raise ValueError(f'mode: expected "pair_mean", "per_class" or "per_head", got {mode!r}')
    if row_queries not in ("all", "first"):
        raise ValueError(f'row_queries: expected "all" or "first", got {row_queries!r}')


def _check_budget(budget, mode, forced: int) -> tuple[Budget, ...]:
    """One budget per class."""
    budgets = budget if isinstance(budget, tuple) else (budget,) * (2 if mode == "per_class" else 1)
    if len(budgets) != (2 if mode == "per_class" else 1):
        raise ValueError(
            f'budget: expected a pair (signal, noise) only with mode "per_class", got {budget!r} for {mode!r}'
        )
    for one in budgets:
        if not isinstance(one, TopK | TopP):
            raise ValueError(f"budget: expected TopK or TopP, got {one!r}")
        if one.max_blocks < forced:
            raise ValueError(
                f"budget: expected at least the {forced} forced blocks (sink_blocks + local_blocks + "
                f"⌈(block_m − 1) / block_n⌉), got {one.max_blocks}"
            )
    return budgets


def _check_tensors(q, k, summaries, key_tokens, mode, block_n, cu_seqlens_q, cu_seqlens_k) -> int | Tensor:
    """Returns S: an int, or one per sequence."""
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: expected floating point [B, T, HQ, D], got {q.dtype} {tuple(q.shape)}")
    if (k is None) == (summaries is None):
        raise ValueError("k, summaries: expected exactly one of the two")
    name, keys = ("k", k) if summaries is None else ("summaries", summaries)
    B, T, HQ, D = q.shape
    if 0 in q.shape:
        raise ValueError(f"q: expected no empty dimension, got shape {tuple(q.shape)}")
    if keys.ndim != 4 or keys.shape[0] != B or keys.shape[3] != D:
        raise ValueError(f"{name}: expected [{B}, tokens or blocks, H, {D}] to go with q, got {tuple(keys.shape)}")
    if keys.dtype != q.dtype or keys.device != q.device:
        raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {keys.dtype} on {keys.device}")
    H = keys.shape[2]
    if H == 0 or HQ % H:
        raise ValueError(f"q: expected HQ a multiple of the {H} KV heads, got HQ = {HQ}")
    if mode != "per_head" and (HQ // H) % 2:
        raise ValueError(f"q: mode {mode!r} needs whole pairs in each group, got HQ / H = {HQ // H} (odd)")
    if check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, B, T, None if k is None else k.shape[1], q.device):
        if key_tokens is not None:
            raise ValueError("key_tokens: packed sequences take their lengths from cu_seqlens_k")
        if summaries is not None and q.device.type == "cpu":
            _check_number(summaries, int((cu_seqlens_k.diff() // block_n).sum()), "the packed keys")
        return 0
    if summaries is None:
        if key_tokens is not None:
            raise ValueError("key_tokens: goes with summaries; with k the number of keys is known")
        S = k.shape[1]
    elif key_tokens is None:
        raise ValueError("key_tokens: expected the number of keys that the summaries stand for")
    elif isinstance(key_tokens, Tensor):
        if key_tokens.shape != (B,) or key_tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"key_tokens: expected integers [{B}], got {key_tokens.dtype} {tuple(key_tokens.shape)}")
        if key_tokens.device != q.device:
            raise ValueError(f"key_tokens: expected on {q.device} like q, got {key_tokens.device}")
        if q.device.type == "cpu":
            _check_number(summaries, int(key_tokens.max()) // block_n, f"{int(key_tokens.max())} keys")
        return key_tokens
    elif type(key_tokens) is not int:
        raise ValueError(f"key_tokens: expected an int or an integer tensor, got {key_tokens!r}")
    else:
        S = key_tokens
        _check_number(summaries, S // block_n, f"{S} keys")
    if T > S:
        raise ValueError(f"q: expected at most as many queries as keys under causality, got T = {T} > S = {S}")
    return S


def _check_number(summaries: Tensor, needed: int, keys: str) -> None:
    if summaries.shape[1] < needed:
        raise ValueError(f"summaries: expected at least {needed} for {keys}, got {summaries.shape[1]}")
