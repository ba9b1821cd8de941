"""Where the tokens of one call stand: which of a padded batch are real, and at which position of their sequence.

Padding never enters the layers. When every sequence has the same number of real tokens they stay `[B, T, ...]`;
otherwise they are **packed**, `[1, N, ...]`, one sequence after another, with `cu_seqlens` as flash-attn has it. So a
padded batch computes what each sequence would compute alone, wherever its padding is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..pages import sent


def spans(counts: Sequence[int], starts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequence and position of each token, int64 `[Σ counts]`: sequence b has `counts[b]` from position `starts[b]`."""
    first = [start - before for start, before in zip(starts, accumulate(counts, initial=0))]
    own, first = sent([counts, first], torch.long, device)
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=device), own, output_size=sum(counts))
    return sequence, torch.arange(sum(counts), device=device) + first[sequence]


def running_sum(counts: Sequence[int], device: torch.device) -> Tensor:
    """The bounds of packed sequences: int32 `[B + 1]`, from 0."""
    return sent(tuple(accumulate(counts, initial=0)), torch.int32, device)


@dataclass(frozen=True)
class WindowReach:
    """How rings of past keys and a call's new keys become the keys of windowed attention, and the next rings.

    A ring `[B, H, R, D]`, R ≥ window, holds the key of position s in slot `s % R`.

    Attributes:
        source: int64 `[Σ key_tokens]`, each key's place among the rings' `B · R` tokens and, after them, the new
            ones.
        key_tokens: of each sequence: the past keys that its first new token still sees, then the new ones.
        kept: int64 `[K]`, the new tokens that the next rings hold.
        slots: int64 `[K]`, their places among `B · R`.
    """

    source: Tensor
    key_tokens: tuple[int, ...]
    kept: Tensor
    slots: Tensor

    @classmethod
    def of(
        cls, counts: Sequence[int], starts: Sequence[int], window: int, ring: int, device: torch.device
    ) -> WindowReach:
        """For sequences with `counts[b]` new tokens after `starts[b]` others, and rings of `ring` slots."""
        B = len(counts)
        starts_, bounds = sent([starts, tuple(accumulate(counts, initial=0))[:-1]], torch.long, device)
        past = [min(start, window - 1) if count else 0 for start, count in zip(starts, counts)]
        key_tokens = tuple(map(int.__add__, past, counts))
        sequence, position = spans(key_tokens, [start - own for start, own in zip(starts, past)], device)
        since = position - starts_[sequence]
        source = torch.where(since < 0, sequence * ring + position % ring, B * ring + bounds[sequence] + since)
        held = [min(count, ring) for count in counts]
        sequence, position = spans(held, [s + c - h for s, c, h in zip(starts, counts, held)], device)
        kept, slots = bounds[sequence] + position - starts_[sequence], sequence * ring + position % ring
        return cls(source, key_tokens, kept, slots)

    def gather(self, ring: Tensor, new: Tensor) -> Tensor:
        """The keys `[Σ key_tokens, H, D]`, of the ring and the new ones `[N, H, D]`."""
        return torch.cat([ring.transpose(1, 2).flatten(0, 1), new])[self.source]

    def keep(self, ring: Tensor, new: Tensor) -> Tensor:
        """The next ring."""
        B, _, slots, _ = ring.shape
        out = ring.transpose(1, 2).flatten(0, 1).index_copy(0, self.slots, new[self.kept])
        return out.unflatten(0, (B, slots)).transpose(1, 2)


class RingPages(NamedTuple):
    """Rings `[B, H, R, D]` as pages: the keys of a page, a page table int32 `[B · T, H, pages]`, and how many keys each
    token sees, int32 `[B · T]`.
    """

    keys: int
    table: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Following:
    """T more tokens of each of B sequences, placed by the device's numbers alone, as a captured graph needs it.

    Attributes:
        positions: int64 `[B, T]`.
    """

    positions: Tensor

    @cached_property
    def sequence(self) -> Tensor:
        """int64 `[B, 1]`."""
        return torch.arange(len(self.positions), device=self.positions.device)[:, None]

    @cached_property
    def _rings(self) -> dict[tuple[int, int, int], RingPages]:
        return {}

    @cached_property
    def _places(self) -> dict[tuple[int, int, int], Tensor]:
        return {}

    def ring_places(self, kv_heads: int, ring: int, head_dim: int) -> Tensor:
        """Where each token goes in rings `[B, H, R, D]`, int64 `[B · T]`: its first head, in elements from the
        beginning. Worked out once for all layers.
        """
        if (kv_heads, ring, head_dim) not in self._places:
            slot = torch.add(self.positions % ring, self.sequence, alpha=kv_heads * ring)
            self._places[kv_heads, ring, head_dim] = (slot * head_dim).flatten()
        return self._places[kv_heads, ring, head_dim]

    def ring_pages(self, window: int, kv_heads: int, ring: int) -> RingPages:
        """The keys that each token sees in rings `[B, H, R, D]`, which hold these tokens, too. Worked out once for all
        layers.

        T ≤ R − window + 1: more would overwrite what the first of them sees.
        """
        if (window, kv_heads, ring) not in self._rings:
            B, T = self.positions.shape
            device = self.positions.device
            if ring == window:  # then T is 1, and a token sees all that its ring holds, in whatever order
                table = torch.arange(B * kv_heads, device=device, dtype=torch.int32).view(B, kv_heads, 1)
                pages = RingPages(ring, table, (self.positions[:, 0] + 1).clamp(max=ring).int())
            else:
                first = (self.positions - window + 1).clamp(min=0)
                slot = (first[..., None] + torch.arange(window, device=device)) % ring  # [B, T, window]
                before = torch.arange(B * kv_heads, device=device).view(B, 1, kv_heads, 1) * ring
                table = (before + slot[:, :, None]).flatten(0, 1).int()
                pages = RingPages(1, table, (self.positions - first + 1).flatten().int())
            self._rings[window, kv_heads, ring] = pages
        return self._rings[window, kv_heads, ring]


@dataclass(frozen=True)
class Layout:
    """The tokens of one call.

    Attributes:
        width: columns T of the padded batch.
        counts: real tokens of each sequence in this call, on the host.
        starts: tokens of each sequence before this call, on the host.
        index: int64 `[N]`, the real tokens' places in the flattened `[B · T]` batch; None when there is no padding.
        device: of the tensors made here.
    """

    width: int
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    index: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, tokens: Tensor, attention_mask: Tensor | None = None, starts: tuple[int, ...] | None = None) -> Layout:
        """The layout of `tokens` `[B, T, ...]`.

        Args:
            attention_mask: `[B, T]`, or wider when it also covers columns before these; nonzero where a token is real.
                Reading it waits for the device.
            starts: tokens of each sequence before this call; none by default.

        Raises:
            ValueError: the mask is no `[B, ≥ T]`.
        """
        B, T = tokens.shape[:2]
        starts = starts or (0,) * B
        if attention_mask is None:
            return cls(T, (T,) * B, starts, None, tokens.device)
        if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
            raise ValueError(f"attention_mask: expected [{B}, {T}] or wider, got {tuple(attention_mask.shape)}")
        real = attention_mask[:, attention_mask.shape[1] - T :].to(tokens.device).bool()
        counts = tuple(real.sum(1).tolist())
        if sum(counts) == B * T:
            return cls(T, counts, starts, None, tokens.device)
        return cls(T, counts, starts, real.flatten().nonzero().squeeze(1), tokens.device)

    @property
    def packed(self) -> bool:
        return len(set(self.counts)) > 1

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` → the real tokens, `[B, n, ...]` or packed `[1, N, ...]`."""
        if self.index is None:
            return x
        return x.flatten(0, 1)[self.index].unflatten(0, (1, -1) if self.packed else (len(self.counts), self.counts[0]))

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros for padding."""
        if self.index is None:
            return x
        B = len(self.counts)
        out = x.new_zeros(B * self.width, *x.shape[2:]).index_copy(0, self.index, x.flatten(0, 1))
        return out.unflatten(0, (B, self.width))

    def pad(self, x: Tensor, at_end: bool = False) -> Tensor:
        """Packed `[1, N, ...]` → `[B, longest, ...]`, every sequence followed by zeros; `at_end`: after them."""
        B, longest = len(self.counts), max(self.counts)
        return (
            x.new_zeros(B * longest, *x.shape[2:]).index_copy(0, self._padded[at_end], x[0]).unflatten(0, (B, longest))
        )

    def unpad(self, x: Tensor, at_end: bool = False) -> Tensor:
        """The inverse of `pad`."""
        return x.flatten(0, 1)[self._padded[at_end]][None]

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        longest = max(self.counts)
        firsts = [b * longest for b in range(len(self.counts))]
        ends = [first + longest - count for first, count in zip(firsts, self.counts)]
        return tuple(spans(self.counts, places, self.device)[1] for places in (firsts, ends))

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each sequence begins among the real tokens, and N."""
        return tuple(accumulate(self.counts, initial=0))

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """`bounds` as int32 `[B + 1]` when packed, else None."""
        return running_sum(self.counts, self.device) if self.packed else None

    @cached_property
    def located(self) -> tuple[Tensor, Tensor]:
        """Sequence and position of every real token, int64 `[N]` each."""
        return spans(self.counts, self.starts, self.device)

    @property
    def positions(self) -> Tensor:
        """The positions in the layers' shape: `[B, n]`, or `[1, N]` when packed."""
        return self.located[1].unflatten(0, (1, -1) if self.packed else (len(self.counts), -1))

    def reach(self, window: int, ring: int) -> WindowReach:
        """The keys of windowed attention for these tokens and rings of `ring` slots; worked out once for all layers."""
        if (window, ring) not in self._reaches:
            self._reaches[window, ring] = WindowReach.of(self.counts, self.starts, window, ring, self.device)
        return self._reaches[window, ring]

    @cached_property
    def _reaches(self) -> dict[tuple[int, int], WindowReach]:
        return {}
