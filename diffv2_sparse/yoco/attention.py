"""DIFF V2 attention as modules: over the tokens themselves, dense or windowed, and over the shared keys and values.

    o[p] = softmax(q_2p kᵀ / √D) v − sigmoid(x W_lambda)[p] · softmax(q_2p+1 kᵀ / √D) v

The parameter names and the interleaved rotary form are those of microsoft/unilm, Diff-Transformer-V2, so that its
checkpoints load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import diff_attention, diff_attention_paged
from ..cache import PagedKV, RowLists, SharedKVCache, WindowState
from ..selection import BlockSelection
from ..selectors import select_blocks
from .configuration import DiffV2YocoConfig
from .few_tokens import Projection, add_projection, project
from .layers import RMSNorm, Rotary, apply_rotary
from .layout import Following, Layout, running_sum
from .reading import FOLDED_TOKENS, Group, Reading, Rows


class DiffV2Attention(nn.Module):
    """DIFF V2 self-attention.

    Args:
        config: sizes (`hidden_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim`) and `attn_backend`.
        window: tokens a query sees, itself included; None is full causal attention, the reference implementation's
            module.
    """

    def __init__(self, config: DiffV2YocoConfig, window: int | None = None):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.window = window
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, 2 * heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.lambda_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def forward(self, hidden: Tensor, rotary: Rotary, layout: Layout | None = None) -> Tensor:
        """Over whole sequences.

        Args:
            hidden: `[B, T, hidden_size]`, or packed as `layout` says.
            rotary: cos and sin of the same tokens, each `[B, T, D / 2]`.
        """
        q, k, v = self._project(hidden, rotary)
        bounds = None if layout is None else layout.cu_seqlens
        o = diff_attention(
            q,
            k,
            v,
            self.lambda_proj(hidden),
            window=self.window,
            backend=self.config.attn_backend,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
        )
        return self.o_proj(o.flatten(-2))

    def extend(self, hidden: Tensor, rotary: Rotary, layout: Layout, state: WindowState) -> tuple[Tensor, WindowState]:
        """`forward` for tokens that follow those in `state`; returns the output and the state after these tokens."""
        q, k, v = (x.flatten(0, 1).to(state.k.dtype) for x in self._project(hidden, rotary))  # [N, heads, D]
        lam_logit = self.lambda_proj(hidden).flatten(0, 1)
        reach = layout.reach(self.window, state.k.shape[2])
        keys, values = reach.gather(state.k, k), reach.gather(state.v, v)
        alike = not layout.packed and len(set(reach.key_tokens)) == 1
        shape = (len(layout.counts), -1) if alike else (1, -1)
        o = diff_attention(
            *(x.unflatten(0, shape) for x in (q, keys, values, lam_logit)),
            window=self.window if max(reach.key_tokens) > self.window else None,
            backend=self.config.attn_backend,
            cu_seqlens_q=None if alike else running_sum(layout.counts, hidden.device),
            cu_seqlens_k=None if alike else running_sum(reach.key_tokens, hidden.device),
        )
        out = self.o_proj(o.flatten(-2)).view(hidden.shape)
        return out, WindowState(reach.keep(state.k, k), reach.keep(state.v, v))

    def step(self, x: Tensor, norm: RMSNorm, rotary: Rotary, following: Following, state: WindowState) -> Tensor:
        """x + `extend`(norm(x)) for few tokens `[B, T, hidden_size]`, T ≤ max_rollback + 1, which changes `state` in
        place; its tensors are contiguous.
        """
        own = Projection(self.q_proj, turned=True), Projection(self.lambda_proj)
        kept = Projection(self.k_proj, turned=True, ring=state.k), Projection(self.v_proj, ring=state.v)
        q, lam_logit = project(x, norm, (*own, *kept), self.head_dim, rotary, following)
        _, H, R, D = state.k.shape
        keys, table, lengths = following.ring_pages(self.window, H, R)
        pages = PagedKV(*(ring.view(-1, keys, D) for ring in state), table, lengths)
        q = q.to(state.k.dtype).view(pages.lengths.shape[0], 1, -1, D)
        o = diff_attention_paged(q, lam_logit.flatten(0, 1)[:, None], pages, backend=self.config.paged_backend)
        return add_projection(x, o.view(*x.shape[:2], -1), self.o_proj)

    def _project(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, 2·HO, D]` and k `[B, T, H, D]`, turned by their positions, and v `[B, T, H, D]`."""
        q, k, v = (p(hidden).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v


class CrossAttention(nn.Module):
    """A cross-decoder layer's attention: queries, λ and an output projection; keys and values are the shared ones."""

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, 2 * heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.lambda_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def forward(
        self,
        hidden: Tensor,
        k: Tensor,
        v: Tensor,
        summaries: Tensor | None,
        rotary: Rotary,
        layout: Layout,
        chosen: BlockSelection | None = None,
    ) -> tuple[Tensor, BlockSelection | None]:
        """All tokens of all sequences at once, for training.

        Args:
            hidden: `[B, T, hidden_size]`, or packed as `layout` says.
            k, v: the shared keys and values of the same tokens, `[B, T, H, D]`.
            summaries: of k, from `block_summaries`; None when the configuration is dense.
            rotary: angles of the tokens; unused when `cross_position` is "none".
            chosen: the key blocks, where an earlier layer has chosen them.

        Returns:
            The output, and the key blocks; None when the configuration is dense.
        """
        q = self._queries(hidden, rotary)
        if chosen is None and summaries is not None:
            chosen = select_for_tokens(self.config, q, summaries, layout)
        o = diff_attention(
            q,
            k,
            v,
            self.lambda_proj(hidden),
            chosen,
            backend=self.config.attn_backend,
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens,
        )
        return self.o_proj(o.flatten(-2)), chosen

    def read(
        self,
        x: Tensor,
        norm: RMSNorm,
        rotary: Rotary,
        cache: SharedKVCache,
        reading: Reading,
        held: RowLists | None,
        chosen: Choice | None = None,
    ) -> tuple[Tensor, Choice]:
        """x + attention(norm(x)) for the tokens of `reading` over the shared cache, without gradients.

        Args:
            x: `[1, M, hidden_size]`.
            held: this layer's lists of the rows that were open when the call began.
            chosen: what to read, where an earlier layer has chosen it.
        """
        own = Projection(self.q_proj, turned=self.config.cross_position == "rope"), Projection(self.lambda_proj)
        (q,), (lam_logit,) = project(x, norm, own, self.head_dim, rotary)
        q = q.to(cache.spec.dtype).unflatten(-1, (-1, self.head_dim))
        chosen, out = chosen or Choice.of(self.config, q, cache, reading, held), []
        for group, selection in zip(reading.groups, chosen.selections):
            own_q, own_lam_logit = (each[group.tokens].unflatten(0, (-1, group.T)) for each in (q, lam_logit))
            pages = cache.pages(group.sequence, group.lengths, selection)
            o = diff_attention_paged(own_q, own_lam_logit, pages, selection, backend=self.config.paged_backend)
            out.append(o.flatten(0, 1))
        o = torch.cat(out) if len(out) > 1 else out[0]
        return add_projection(x, o.flatten(-2)[None], self.o_proj), chosen

    def _queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        q = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        return apply_rotary(q, rotary) if self.config.cross_position == "rope" else q


@dataclass(frozen=True)
class Choice:
    """What the tokens of a reading attend to, by one layer's queries.

    Attributes:
        selections: of each of the reading's groups; None is everything.
        open: the lists of the rows that are open at the end; None where rows have one token.
    """

    selections: tuple[BlockSelection | None, ...]
    open: RowLists | None

    @classmethod
    def of(
        cls, config: DiffV2YocoConfig, q: Tensor, cache: SharedKVCache, reading: Reading, held: RowLists | None
    ) -> Choice:
        """By q `[M, 2·HO, D]`; `held` as in `CrossAttention.read`."""
        if config.sparse_mode == "dense":
            return cls((None,) * len(reading.groups), held)
        if reading.rows is None:
            return cls(tuple(_select_for_group(config, q, cache, group) for group in reading.groups), held)
        lists, held = select_for_rows(config, q, cache, reading.rows, held)
        selections = []
        for group in reading.groups:  # each token with the list of its row; T is 1
            own = (x[group.tokens].unsqueeze(3) for x in lists)
            selections.append(BlockSelection(*own, block_m=1, block_n=config.sparse_block_n))
        return cls(tuple(selections), held)


def _select_for_group(config: DiffV2YocoConfig, q: Tensor, cache: SharedKVCache, group: Group) -> BlockSelection:
    own, summaries = q[group.tokens].unflatten(0, (-1, group.T)), cache.full_summaries(group.sequence)
    return select_blocks(own, summaries=summaries, key_tokens=group.lengths, **config.selection_options())


def select_for_tokens(config: DiffV2YocoConfig, q: Tensor, summaries: Tensor, layout: Layout) -> BlockSelection:
    """Key blocks for every row of whole sequences: q `[B, T, 2·HO, D]` or packed, summaries of the same tokens' keys.

    A row at a sequence's end is chosen for as if it were whole, so that its list does not depend on how many tokens
    follow.
    """
    block_m, block_n = config.sparse_block_m, config.sparse_block_n

    def select(q: Tensor, summaries: Tensor) -> BlockSelection:
        missing = -q.shape[1] % block_m
        tokens = q.shape[1] + missing
        q = F.pad(q.detach(), (0, 0, 0, 0, 0, missing)) if missing else q
        short = tokens // block_n - summaries.shape[1]  # no candidates: they do not end before the last row begins
        summaries = F.pad(summaries, (0, 0, 0, 0, 0, short)) if short > 0 else summaries
        return select_blocks(q, summaries=summaries, key_tokens=tokens, **config.selection_options())

    if not layout.packed:
        return select(q, summaries)
    own_summaries = summaries.split([count // block_n for count in layout.counts], 1)
    parts = [select(*own) for own in zip(q.split(layout.counts, 1), own_summaries) if own[0].shape[1]]
    indices, counts = (torch.cat([getattr(part, name) for part in parts], 3) for name in ("indices", "counts"))
    return BlockSelection(indices, counts, block_m, block_n)


def select_for_rows(
    config: DiffV2YocoConfig, q: Tensor, cache: SharedKVCache, rows: Rows, held: RowLists | None
) -> tuple[RowLists, RowLists]:
    """The list of each of the M tokens of a reading, and those of the rows that are open at its end; q `[M, 2·HO, D]`.

    A row that begins among the tokens is chosen for by its first one, as if the row were whole.
    """
    block_m, options, parts = config.sparse_block_m, config.selection_options(), []
    missing = -(-(block_m - 1) // config.sparse_block_n)  # blocks of a whole row that are not there yet, no candidates
    for start in range(0, len(rows.firsts), FOLDED_TOKENS):
        cut = slice(start, start + FOLDED_TOKENS)
        first = q[rows.firsts[cut], None].expand(-1, block_m, -1, -1)  # only the first token of a row scores
        summaries = F.pad(cache.full_summaries(rows.sequence[cut]), (0, 0, 0, 0, 0, missing))
        chosen = select_blocks(first, summaries=summaries, key_tokens=rows.position[cut] + block_m, **options)
        parts.append(RowLists(chosen.indices[:, :, :, 0], chosen.counts[:, :, :, 0]))
    if held is None:  # no row was open: nothing points at these
        held = RowLists(*(x.new_zeros(cache.batch_size, *x.shape[1:]) for x in parts[0]))
    lists = RowLists(*(torch.cat(x) for x in zip(held, *parts)))
    return RowLists(*(x[rows.owner] for x in lists)), RowLists(*(x[rows.open] for x in lists))
