"""Which tokens the cross-decoder runs for when it reads the shared cache, and how their attention is batched.

With rows of one token, those are the tokens whose outputs are asked for. With longer rows (`sparse_block_m` > 1) a
token attends through its row's list, which the row's first token chooses: so the first token of each row that is needed
runs too, unless the row was open when the call began; then its list is held in the cache. The list of the row that is
open when the call ends is held in turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import sent
from .layout import Layout, spans

FOLDED_TOKENS = 256  # tokens that attend as a batch of their own; each brings a copy of its sequence's summaries


def locate(layout: Layout, runs: list[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the positions in `runs`: place among the call's real tokens `[M]`, position `[1, M]`, sequence `[M]`."""
    counts = [len(run) for run in runs]
    sequence, position = spans(counts, [run[0] if len(run) else 0 for run in runs], layout.device)
    if not all(map(_contiguous, runs)):
        position = sent([p for run in runs for p in run], torch.long, layout.device)
    first = sent([bound - start for bound, start in zip(layout.bounds, layout.starts)], torch.long, layout.device)
    return position + first[sequence], position[None], sequence


@dataclass(frozen=True)
class Kept:
    """The positions of each sequence whose outputs the caller wants, and where each goes in the result.

    Attributes:
        width: columns K of the result.
        positions: of each sequence, ascending.
        places: of each sequence, the result's column of every position.
    """

    width: int
    positions: tuple[Sequence[int], ...]
    places: tuple[Sequence[int], ...]

    @classmethod
    def of(cls, layout: Layout, logits_to_keep: int | Tensor) -> Kept:
        """What `logits_to_keep` means for the tokens of a call.

        Args:
            logits_to_keep: 0 keeps every column; n > 0 each sequence's last n real tokens, in the last of the n
                columns; an integer tensor `[K]` those columns of the padded batch. Padding comes out as zeros.

        Raises:
            ValueError: negative, a bool, a tensor that is no integer `[K]`, or columns outside the batch.
        """
        T = layout.width
        if isinstance(logits_to_keep, bool) or getattr(logits_to_keep, "dtype", None) == torch.bool:
            raise ValueError(
                f"logits_to_keep: expected an int or an integer tensor [K], no mask, got {logits_to_keep!r}"
            )
        ends = [start + count for start, count in zip(layout.starts, layout.counts)]
        if isinstance(logits_to_keep, int) and logits_to_keep > 0:
            K = min(logits_to_keep, T)
            positions = tuple(range(max(start, end - K), end) for start, end in zip(layout.starts, ends))
            return cls(K, positions, tuple(range(K - len(own), K) for own in positions))
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            columns = range(T)
        elif isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1 and not logits_to_keep.is_floating_point():
            columns = [int(c) + T if c < 0 else int(c) for c in logits_to_keep.tolist()]
        else:
            raise ValueError(f"logits_to_keep: expected an int ≥ 0 or an integer tensor [K], got {logits_to_keep!r}")
        if any(not 0 <= c < T for c in columns):
            raise ValueError(f"logits_to_keep: expected columns of a batch of {T}, got {logits_to_keep!r}")
        if layout.index is None:
            order = sorted(range(len(columns)), key=columns.__getitem__)
            positions = tuple([start + columns[i] for i in order] for start in layout.starts)
            return cls(len(columns), positions, (order,) * len(positions))
        positions, places = [], []
        position = torch.full((len(ends) * T,), -1, device=layout.device)
        position[layout.index] = layout.located[1]
        for own in position.unflatten(0, (-1, T)).tolist():
            pairs = sorted((own[c], place) for place, c in enumerate(columns) if own[c] >= 0)
            positions.append([position for position, _ in pairs])
            places.append([place for _, place in pairs])
        return cls(len(columns), tuple(positions), tuple(places))

    def within(self, layout: Layout) -> tuple[list[Sequence[int]], list[int]]:
        """What of it `layout` covers: positions of each sequence, and places in the flattened `[B · K]` result."""
        positions, places = [], []
        for b, own in enumerate(self.positions):
            start = layout.starts[b]
            cut = slice(bisect_left(own, start), bisect_left(own, start + layout.counts[b]))
            positions.append(own[cut])
            places.extend(b * self.width + place for place in self.places[b][cut])
        return positions, places


@dataclass(frozen=True)
class Group:
    """Tokens that attend together: the last T before `lengths` of each of some sequences."""

    tokens: slice
    T: int
    sequence: slice | Tensor
    lengths: Tensor  # int32 [sequences]


@dataclass(frozen=True)
class Rows:
    """Who chooses for whom, where rows have more than one token.

    The lists in question are those held for each of the B sequences, then those of the `firsts`; `owner` and `open`
    count among them.
    """

    firsts: Tensor  # int64 [R], tokens that begin a row
    sequence: Tensor  # int64 [R]
    position: Tensor  # int64 [R]
    owner: Tensor  # int64 [M], the list of each token
    open: Tensor  # int64 [B], the list of each sequence's last row


@dataclass(frozen=True)
class Reading:
    """The tokens that run.

    Attributes:
        tokens: int64 `[M]`, their places among the real tokens of the call.
        positions: int64 `[1, M]`.
        asked: int64 `[K]`, which of the M were asked for; None is all.
        groups: how their attention is batched.
        rows: None where every token chooses for itself.
    """

    tokens: Tensor
    positions: Tensor
    asked: Tensor | None
    groups: tuple[Group, ...]
    rows: Rows | None

    @classmethod
    def of(cls, layout: Layout, asked: list[Sequence[int]], block_m: int) -> Reading:
        """Plans the reading of the positions `asked`, an ascending list per sequence, all within `layout`."""
        if block_m == 1:
            return cls(*locate(layout, asked)[:2], None, _groups(layout, asked), None)
        runs, firsts, owner, open_ = [], [], [], []
        B, before = len(asked), 0
        for b, (own, start, count) in enumerate(zip(asked, layout.starts, layout.counts)):
            end = start + count
            needed = {position // block_m * block_m for position in own}
            if count and end % block_m:
                needed.add(end // block_m * block_m)
            begun = sorted(first for first in needed if first >= start)
            run = sorted({*own, *begun})
            list_of = {first: B + len(firsts) + i for i, first in enumerate(begun)}
            owner.extend(list_of.get(position // block_m * block_m, b) for position in run)
            open_.append(list_of.get(end // block_m * block_m, b))
            firsts.extend(before + bisect_left(run, first) for first in begun)
            runs.append(run)
            before += len(run)
        tokens, positions, sequence = locate(layout, runs)
        firsts, owner, open_ = (sent(x, torch.long, layout.device) for x in (firsts, owner, open_))
        rows = Rows(firsts, sequence[firsts], positions[0, firsts], owner, open_)
        kept, before = [], 0
        for own, run in zip(asked, runs):
            kept.extend(before + bisect_left(run, position) for position in own)
            before += len(run)
        kept = sent(kept, torch.long, layout.device)
        return cls(tokens, positions, kept, _folded(sequence, positions[0]), rows)


def _contiguous(run: Sequence[int]) -> bool:
    return len(run) == 0 or (run[-1] - run[0] + 1 == len(run) and len(set(run)) == len(run))


def _groups(layout: Layout, runs: list[Sequence[int]]) -> tuple[Group, ...]:
    """Contiguous runs of one length attend as a batch, those of different lengths one by one; other tokens alone."""
    counts = [len(run) for run in runs]
    if (min(counts) == 0 and max(counts) == 1) or not all(map(_contiguous, runs)):
        _, position, sequence = locate(layout, runs)
        return _folded(sequence, position[0])
    ends = sent([run[-1] + 1 if len(run) else 0 for run in runs], torch.int32, layout.device)
    if len(set(counts)) == 1:
        return (Group(slice(None), counts[0], slice(None), ends),) if counts[0] else ()
    groups, before = [], 0
    for b, count in enumerate(counts):
        if count:
            groups.append(Group(slice(before, before + count), count, slice(b, b + 1), ends[b : b + 1]))
        before += count
    return tuple(groups)


def _folded(sequence: Tensor, position: Tensor) -> tuple[Group, ...]:
    """Every token a sequence of its own, which ends with it."""
    cuts = [slice(start, start + FOLDED_TOKENS) for start in range(0, len(sequence), FOLDED_TOKENS)]
    return tuple(Group(cut, 1, sequence[cut], position[cut].int() + 1) for cut in cuts)
