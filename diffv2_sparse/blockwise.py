"""Backend "torch": attention that gathers only the selected key blocks, on any device.

Keys and values are laid out as pages, one page = one key block of one KV head (the layout of the shared cache). For a
chunk of query rows the pages on their lists are gathered, all heads of a group go through one matrix product, and the
pair is subtracted before anything is written. A sliding window and full causal attention are the same walk over lists
that are computed instead of given. The backward gathers again instead of keeping what the forward gathered, and needs
no saved output:

    dP = dO vᵀ (noise: −λ dO vᵀ),   dS = P ∘ (dP − Σ_j P ∘ dP),   d lam_logit = −λ (1 − λ) · Σ_j P_noise ∘ (dO vᵀ)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import BlockSelection, QueryRows, query_rows

_ALL, _SIGNAL, _NOISE = slice(None), slice(0, None, 2), slice(1, None, 2)  # heads of a group
_NOWHERE = 1 << 62  # a key position that no token sees
_CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}  # gathered pages and scores of one chunk of rows
_PLAN_BYTES = 16 << 20  # masks of the rows that are planned at once


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None,
    *,
    scale: float,
    window: int | None,
    return_lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments as `diff_attention`, already validated. Returns o `[B, T, HO, D]` and, where it was asked for, lse
    `[B, HQ, T]`; differentiable but for lse.
    """
    B, T, HQ, D = q.shape
    lists = _lists(q, k.shape[1], selection, window, cu_seqlens_q, cu_seqlens_k)
    rows = query_rows(
        B, T, k.shape[1], lists.block_m, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, device=q.device
    )
    paging = _Paging.of(k, lists.block_n, cu_seqlens_k)
    walk = _Walk(rows, lists, paging.page_table, scale, window)
    lam = None if lam_logit is None else lam_logit.flatten(0, 1)
    inputs = q.flatten(0, 1), paging.pages(k), paging.pages(v), lam
    differentiates = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, lse = _Blockwise.apply(*inputs, walk, return_lse or differentiates)
    return o.unflatten(0, (B, T)), lse.unflatten(1, (B, T)).movedim(1, 0) if return_lse else None


def blockwise_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    lam_logit: Tensor | None,
    selection: BlockSelection | None,
    *,
    scale: float,
) -> Tensor:
    """Arguments as `diff_attention_paged`, already validated. Returns o `[B, T, HO, D]`; no gradient."""
    B, T = q.shape[:2]
    block_n = k_pages.shape[1]
    lists = (
        _Given.of(selection) if selection is not None else _Computed(min(T, 128), block_n, None, page_table.shape[2])
    )
    rows = query_rows(B, T, lengths, lists.block_m, device=q.device)
    walk = _Walk(rows, lists, page_table.long(), scale, None)
    lam = None if lam_logit is None else lam_logit.flatten(0, 1)
    return walk.forward(q.flatten(0, 1), k_pages, v_pages, lam, False)[0].unflatten(0, (B, T))


@dataclass(frozen=True)
class _Given:
    """The lists of a BlockSelection, rows of all sequences in one dimension."""

    indices: Tensor  # int32 [C, H, R, NB]
    counts: Tensor  # int32 [C, H, R]
    block_m: int
    block_n: int

    @classmethod
    def of(cls, selection: BlockSelection) -> _Given:
        return cls(*selection.by_row(), selection.block_m, selection.block_n)

    @property
    def num_classes(self) -> int:
        return self.indices.shape[0]

    @property
    def longest(self) -> int:
        return self.indices.shape[-1]

    def blocks(self, c: int, chunk: slice, rows: QueryRows) -> tuple[Tensor, Tensor]:
        """Block numbers `[H, rows, NB]` and which of them are listed."""
        indices = self.indices[c, :, chunk].long()
        return indices, torch.arange(indices.shape[-1], device=indices.device) < self.counts[c, :, chunk, None]


@dataclass(frozen=True)
class _Computed:
    """Lists that follow from position: every block with a visible key, under a window or full causality."""

    block_m: int
    block_n: int
    window: int | None
    most: int  # blocks in the longest sequence

    num_classes = 1

    @property
    def longest(self) -> int:
        if self.window is None:
            return self.most
        return min(self.most, (self.block_m + self.window - 2) // self.block_n + 2)

    def blocks(self, c: int, chunk: slice, rows: QueryRows) -> tuple[Tensor, Tensor]:
        last = (rows.position + rows.tokens - 1) // self.block_n
        first = torch.zeros_like(last)
        if self.window is not None:
            first = (rows.position - self.window + 1).clamp(min=0) // self.block_n
        reach = self.longest if self.window is not None else min(self.longest, int(last.max()) + 1)
        blocks = first[None, :, None] + torch.arange(max(reach, 1), device=last.device)
        return blocks, blocks <= last[:, None]


def _lists(q, S, selection, window, cu_seqlens_q, cu_seqlens_k) -> _Given | _Computed:
    if selection is not None:
        return _Given.of(selection)
    T = q.shape[1]
    if cu_seqlens_q is not None:
        T, S = int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max())
    block_n = 32 if window is not None else 128
    return _Computed(max(1, min(T, 128)), block_n, window, -(-S // block_n))


@dataclass(frozen=True)
class _Paging:
    """Where the keys of contiguous or packed sequences go when they are cut into pages of one KV head each."""

    block_n: int
    lengths: tuple[int, ...]  # keys per sequence
    page_table: Tensor  # int64 [sequences, H, NP]

    @classmethod
    def of(cls, k: Tensor, block_n: int, cu_seqlens_k: Tensor | None) -> _Paging:
        B, S, H, _ = k.shape
        lengths = (S,) * B if cu_seqlens_k is None else tuple(cu_seqlens_k.diff().tolist())
        per_sequence = torch.tensor([-(-n // block_n) for n in lengths], device=k.device)
        total = sum(-(-n // block_n) for n in lengths)
        most = max(-(-n // block_n) for n in lengths)
        # page = h · total + first page of the sequence + block
        first = (per_sequence.cumsum(0) - per_sequence)[:, None, None]
        head = torch.arange(H, device=k.device)[:, None] * total
        return cls(block_n, lengths, first + head + torch.arange(max(most, 1), device=k.device))

    def pages(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` → `[P, block_n, D]`, zeros after each sequence's end; in the dtype that the products are
        computed in.
        """
        x = x.to(_compute_dtype(x))
        if len(set(self.lengths)) == 1:
            x = x.reshape(len(self.lengths), self.lengths[0], *x.shape[2:])
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -self.lengths[0] % self.block_n)).flatten(0, 1)
        else:
            parts = x[0].split(self.lengths)
            x = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, 0, 0, -len(p) % self.block_n)) for p in parts])
        return x.unflatten(0, (-1, self.block_n)).permute(2, 0, 1, 3).flatten(0, 1).contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Products of 16-bit operands are exact in float32; a CPU is faster at those, too."""
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype


@dataclass(frozen=True)
class _Plan:
    """What rows of one class read and see."""

    tokens: Tensor  # int64 [R, block_m], one past the last token where a row is shorter
    heads: slice  # of each group: all, signal or noise
    pages: Tensor  # int64 [R, H, blocks]
    clear: int  # so many keys at the front are seen by every token
    hidden: Tensor  # bool [R, H or 1, block_m, 1, L − clear], keys a token does not see

    def __getitem__(self, rows: slice) -> _Plan:
        return _Plan(self.tokens[rows], self.heads, self.pages[rows], self.clear, self.hidden[rows])


@dataclass(frozen=True)
class _Chunk:
    """Rows of one class with their pages gathered: M = block_m · heads query vectors against L keys."""

    plan: _Plan
    k: Tensor  # [R, H, L, D]
    v: Tensor  # [R, H, L, D]

    @property
    def tokens(self) -> Tensor:
        return self.plan.tokens

    @property
    def heads(self) -> slice:
        return self.plan.heads


class _Scratch:
    """Buffers that are used again by every chunk: fresh memory for each costs a CPU as much as the products."""

    def __init__(self, device: torch.device):
        self.device, self.buffers = device, {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffers[name][:size].view(shape)


@dataclass(frozen=True)
class _Walk:
    rows: QueryRows
    lists: _Given | _Computed
    page_table: Tensor  # int64 [sequences, H, NP]
    scale: float
    window: int | None

    def chunks(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scratch: _Scratch) -> Iterator[Iterator[_Chunk]]:
        """Chunks of rows in order; for each, one entry per class, good until the next is asked for."""
        N, HQ, D = q.shape
        H, block_m = self.page_table.shape[1], self.lists.block_m
        L = self.lists.longest * self.lists.block_n
        row_bytes = H * L * (2 * D * k_pages.element_size() + 16 * block_m * (HQ // H))
        step = max(1, _CHUNK_BYTES.get(q.device.type, 1 << 28) // max(row_bytes, 1))
        stretch = step * max(1, min(16, _PLAN_BYTES // max(step * H * block_m * L, 1)))
        for first in range(0, len(self.rows), stretch):
            rows = slice(first, min(first + stretch, len(self.rows)))
            plans = [self.plan(c, rows, N, k_pages.shape[0]) for c in range(self.lists.num_classes)]
            for r in range(0, rows.stop - first, step):
                yield (_gather(plan[r : r + step], k_pages, v_pages, scratch) for plan in plans)

    def plan(self, c: int, which: slice, N: int, P: int) -> _Plan:
        """Worked out for many rows at once; N tokens and P pages exist."""
        block_m, block_n = self.lists.block_m, self.lists.block_n
        rows = self.rows[which]
        offset = torch.arange(block_m, device=rows.token.device)
        tokens = torch.where(offset < rows.tokens[:, None], rows.token[:, None] + offset, N)
        blocks, listed = (x.movedim(0, 1) for x in self.lists.blocks(c, which, rows))  # [R, H or 1, blocks]
        table = self.page_table[rows.sequence]  # [R, H, NP]
        exists = listed & (blocks >= 0) & (blocks < table.shape[2])
        pages = table.gather(2, blocks.clamp(0, table.shape[2] - 1).expand(-1, table.shape[1], -1))
        exists = exists & (pages >= 0) & (pages < P)
        first_key = torch.where(exists, blocks * block_n, _NOWHERE)
        clear = 0
        if self.window is None:  # masking is a pass over all scores: lists ascend, so mostly their last blocks need it
            seen = (first_key + block_n - 1 <= rows.position[:, None, None]).all(1).all(0)
            clear = int(seen.int().cumprod(0).sum())
        key = (first_key[:, :, clear:, None] + torch.arange(block_n, device=offset.device)).flatten(2)[:, :, None]
        position = (rows.position[:, None] + offset)[:, None, :, None]
        hidden = key > position  # [R, H or 1, block_m, L − clear]
        if self.window is not None:
            hidden |= key <= position - self.window
        heads = _ALL if self.lists.num_classes == 1 else (_SIGNAL, _NOISE)[c]
        return _Plan(tokens, heads, pages.clamp(0, P - 1), clear * block_n, hidden[:, :, :, None])

    def queries(self, x: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        """Rows of a per-token tensor `[N, H·G, D]` as `[R, H, block_m · heads, D]`."""
        H = self.page_table.shape[1]
        x = x[chunk.tokens.clamp(max=x.shape[0] - 1)].unflatten(2, (H, -1))[:, :, :, chunk.heads]
        return x.movedim(2, 1).flatten(2, 3).to(dtype)  # from [R, block_m, H, heads, D]

    def logits(self, q: Tensor, chunk: _Chunk, scratch: _Scratch) -> Tensor:
        """`[R, H, M, L]` in float32 or wider, −inf where a token does not see a key."""
        R, H, M, _ = q.shape
        L = chunk.k.shape[2]
        logits = scratch.take("logits", (R * H, M, L), q.dtype)
        torch.bmm((q * self.scale).flatten(0, 1), chunk.k.flatten(0, 1).mT, out=logits)
        logits = logits.view(R, H, M, L).to(torch.promote_types(torch.float32, q.dtype))
        hidden_part = logits.unflatten(2, (self.lists.block_m, -1))[..., chunk.plan.clear :]
        hidden_part.masked_fill_(chunk.plan.hidden, float("-inf"))
        return logits

    def forward(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, lam_logit: Tensor | None, wants_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """o `[N, HO, D]` in q's dtype and lse `[HQ, N]`, which is left empty unless wanted."""
        N, HQ, D = q.shape
        H, dtype, scratch = self.page_table.shape[1], k_pages.dtype, _Scratch(q.device)
        # shorter rows write to one token more, which is cut off again
        o = q.new_empty(N + 1, HQ if lam_logit is None else HQ // 2, D)
        lse = q.new_empty((N + 1) * wants_lse, HQ, dtype=torch.promote_types(torch.float32, q.dtype))
        lam = None if lam_logit is None else torch.sigmoid(lam_logit.to(lse.dtype))
        for classes in self.chunks(q, k_pages, v_pages, scratch):
            parts = []
            for chunk in classes:
                logits = self.logits(self.queries(q, chunk, dtype), chunk, scratch)
                blinds = chunk.plan.clear == 0  # only then may a token see nothing
                peak = logits.amax(-1) if wants_lse or blinds else None
                weights = torch.softmax(logits, -1, out=logits)
                out = (weights.to(dtype) @ chunk.v).to(lse.dtype)
                if blinds:  # their softmax is no number
                    out.masked_fill_((peak == float("-inf"))[..., None], 0.0)
                parts.append(self.by_token(out))  # [R, block_m, H, heads, D]
                if wants_lse:
                    own_lse = (peak - weights.amax(-1).log()).masked_fill_(peak == float("-inf"), float("-inf"))
                    lse.unflatten(1, (H, -1))[:, :, chunk.heads].index_put_((chunk.tokens,), self.by_token(own_lse))
            if lam is None:
                combined = parts[0]
            else:
                signal, noise = parts if len(parts) == 2 else (parts[0][..., 0::2, :], parts[0][..., 1::2, :])
                row_lam = lam[chunk.tokens.clamp(max=N - 1)].unflatten(2, (H, -1))
                combined = signal - row_lam[..., None] * noise
            o[chunk.tokens] = combined.flatten(2, 3).to(o.dtype)
        return o[:N], lse[:N].T

    def backward(self, do, q, k_pages, v_pages, lam_logit, lse) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, of the pages of k and v, and of lam_logit."""
        N, HQ, D = q.shape
        H, dtype, wide, scratch = self.page_table.shape[1], k_pages.dtype, lse.dtype, _Scratch(q.device)
        dq = q.new_zeros(N + 1, H, HQ // H, D)
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k_pages, v_pages))
        # what dO is multiplied by before it reaches a head: 1, for noise −λ, and 0 for tokens past a row's end
        factor, dlam = lse.new_zeros(N + 1, HQ, 1), None
        factor[:N] = 1
        if lam_logit is not None:
            lam = torch.sigmoid(lam_logit.to(wide))
            factor[:N, 1::2, 0] = -lam
            dlam = lse.new_zeros(N + 1, H, lam.shape[1] // H)
        shift = lse.masked_fill(lse == float("-inf"), 0.0).T[..., None]  # [N, HQ, 1]
        for classes in self.chunks(q, k_pages, v_pages, scratch):
            for chunk in classes:
                queries = self.queries(q, chunk, dtype)
                weights = self.logits(queries, chunk, scratch).sub_(self.queries(shift, chunk, wide)).exp_()
                own_factor = self.queries(factor, chunk, wide)
                own_do = self.upstream(do, chunk, own_factor.shape[2])
                dweights = (own_do.to(dtype) @ chunk.v.mT).to(wide)
                if dlam is not None and chunk.heads != _SIGNAL:
                    each = self.by_token((weights * dweights).sum(-1))  # [R, block_m, H, heads]
                    dlam[chunk.tokens] = each if chunk.heads == _NOISE else each[..., 1::2]
                dweights *= own_factor
                dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * self.scale
                dscores, weights = dscores.to(dtype), weights.to(dtype)
                dq[:, :, chunk.heads].index_put_((chunk.tokens,), self.by_token(dscores @ chunk.k).to(dq.dtype))
                own_do, at = (own_do * own_factor).to(dtype), chunk.plan.pages.flatten()
                for gradient, product in ((dk, dscores.mT @ queries), (dv, weights.mT @ own_do)):
                    gradient.index_add_(0, at, product.reshape(len(at), -1, D).to(gradient.dtype))
        if dlam is not None:
            dlam = (dlam[:N].flatten(1) * -lam * (1 - lam)).to(lam_logit.dtype)
        return dq[:N].flatten(1, 2), dk.to(k_pages.dtype), dv.to(v_pages.dtype), dlam

    def upstream(self, do: Tensor, chunk: _Chunk, M: int) -> Tensor:
        """dO of the pair that each head belongs to, `[R, H, M, D]`."""
        do = do[chunk.tokens.clamp(max=do.shape[0] - 1)].unflatten(2, (self.page_table.shape[1], -1))
        heads = M // self.lists.block_m
        return do.repeat_interleave(heads // do.shape[3], 3).movedim(2, 1).flatten(2, 3)

    def by_token(self, x: Tensor) -> Tensor:
        """`[R, H, block_m · heads, …]` → `[R, block_m, H, heads, …]`."""
        return x.unflatten(2, (self.lists.block_m, -1)).movedim(1, 2)


def _gather(plan: _Plan, k_pages: Tensor, v_pages: Tensor, scratch: _Scratch) -> _Chunk:
    at = plan.pages.flatten()
    gathered = []
    for name, x in (("k", k_pages), ("v", v_pages)):
        out = scratch.take(name, (len(at), *x.shape[1:]), x.dtype)
        gathered.append(torch.index_select(x, 0, at, out=out).view(*plan.pages.shape[:2], -1, x.shape[-1]))
    return _Chunk(plan, *gathered)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_pages, v_pages, lam_logit, walk: _Walk, wants_lse: bool):
        with torch.autocast(q.device.type, enabled=False):  # the dtypes of the inputs decide
            o, lse = walk.forward(q, k_pages, v_pages, lam_logit, wants_lse)
        ctx.walk = walk
        ctx.save_for_backward(q, k_pages, v_pages, lam_logit, lse)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor, _):
        q, k_pages, v_pages, lam_logit, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return *ctx.walk.backward(do, q, k_pages, v_pages, lam_logit, lse), None, None
