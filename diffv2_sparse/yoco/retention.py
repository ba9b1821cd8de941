"""Gated retention: linear attention whose memory fades by a gate that each token sets for itself, one per head.

    S_t = γ_t S_{t−1} + k_tᵀ v_t          o_t = q_t S_t / √D          log γ_t = logsigmoid(x_t W_decay) / 16

q and k carry rotary positions; o is RMS-normalised per head without a weight, gated by silu(x W_gate) and projected.
The state S is `[D, D]` per head in float32, whatever the length of the past. Tokens are processed in chunks: inside a
chunk as a masked, decayed product, from chunk to chunk through S; a chunk of one token is the recurrence itself.
Source: YOCO, arXiv 2405.05254.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import RetentionState
from ..pages import sent
from .configuration import DiffV2YocoConfig
from .layers import RMSNorm, Rotary, apply_rotary
from .layout import Following, Layout

DECAY_TEMPERATURE = 16  # of the gate: a fresh head keeps about 96 % of its memory per token
CHUNK_TOKENS = 64


def chunked_retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Retention over a batch, computed in float32 (float64 for float64 inputs).

    Args:
        q, k, v: `[B, T, heads, D]`.
        log_decay: `[B, T, heads]`, log γ ≤ 0. A token with log γ = 0 and k = 0 leaves the state as it is.
        state: `[B, heads, D, D]` before the first token; None is zero.
        chunk_tokens: tokens that are processed at once; the result is the same for all values but for rounding.

    Returns:
        o `[B, T, heads, D]` and the state after the last token, both in the dtype of the computation.
    """
    B, T, heads, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    C = min(chunk_tokens, T)

    def chunks(x: Tensor) -> Tensor:  # [B, heads, chunks, C, ...]; the filling has k = 0 and log γ = 0
        filled = torch.cat([x.to(wide), x.new_zeros(B, -T % C, *x.shape[2:], dtype=wide)], 1)
        return filled.unflatten(1, (-1, C)).movedim(3, 1)

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, since = chunks(q) * D**-0.5, chunks(k), chunks(v), chunks(log_decay).cumsum(-1)
        total = since[..., -1:]  # [B, heads, chunks, 1]
        later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
        fade = (since[..., :, None] - since[..., None, :]).masked_fill(later, float("-inf")).exp()
        inside = ((q @ k.mT) * fade) @ v
        added = (k * (total - since).exp()[..., None]).mT @ v  # [B, heads, chunks, D, D]
        kept = total.exp()[..., None]
        state = q.new_zeros(B, heads, D, D) if state is None else state.to(wide)
        before = []
        for chunk in range(added.shape[2]):
            before.append(state)
            state = kept[:, :, chunk] * state + added[:, :, chunk]
        o = inside + (q * since.exp()[..., None]) @ torch.stack(before, 2)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], state


@functools.cache
def _fla_kernels():
    """fla's chunked and recurrent kernels for scalar decay, or None when the package is not installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
    except ImportError:
        return None
    return chunk_simple_gla, fused_recurrent_simple_gla


@dataclass(frozen=True)
class Trail:
    """Where the memories after a call's last tokens go: after n tokens it is in slot `n % slots`.

    Attributes:
        sequences, current: int64 `[B]`, all sequences and the slots in which their memories are now.
        sequence, column, slot: int64 `[K]`, what is kept: of the memories `[B, 1 + single]` before and after each of
            the last `single` columns, which go to which slots.
    """

    sequences: Tensor
    current: Tensor
    sequence: Tensor
    column: Tensor
    slot: Tensor

    @classmethod
    def of(cls, layout: Layout, slots: int, single: int) -> Trail:
        now = sent([(b, start % slots) for b, start in enumerate(layout.starts)], torch.long, layout.device)
        kept = []
        for b, (start, count) in enumerate(zip(layout.starts, layout.counts)):
            end = start + count
            kept += [(b, n - end + single, n % slots) for n in range(max(start, end - slots) + 1, end + 1)]
        return cls(*now.unbind(1), *sent(kept, torch.long, layout.device).unbind(1))


class GatedRetention(nn.Module):
    """The self-decoder's mixer for `self_decoder = "gated_retention"`: `num_attention_heads` heads of `head_dim`."""

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__()
        self.head_dim = config.head_dim
        size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.decay_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.head_norm = RMSNorm(config.head_dim, config.rms_norm_eps, affine=False)

    def forward(self, hidden: Tensor, rotary: Rotary, layout: Layout | None = None) -> Tensor:
        """`hidden` `[B, T, hidden_size]`, or packed as `layout` says, from the first token of every sequence."""
        return self.extend(hidden, rotary, layout, None)[0]

    def extend(
        self, hidden: Tensor, rotary: Rotary, layout: Layout | None, state: RetentionState | None
    ) -> tuple[Tensor, RetentionState | None]:
        """Continues from `state`; returns the output and the state after these tokens."""
        q, k, v, log_decay = self._project(hidden, rotary)
        if state is None:
            o = self._retain(q, k, v, log_decay, None, layout)[0]
        elif state.memory.shape[1] == 1:
            o, memory = self._retain(q, k, v, log_decay, state.memory[:, 0], layout)
            state = RetentionState(memory[:, None])
        else:
            o, state = self._retain_and_keep(q, k, v, log_decay, state, layout)
        return self._gated(hidden, o), state

    def step(self, x: Tensor, norm: RMSNorm, rotary: Rotary, following: Following, state: RetentionState) -> Tensor:
        """x + `extend`(norm(x)) for few tokens `[B, T, hidden_size]`, T ≤ max_rollback + 1, which changes `state` in
        place.
        """
        hidden = norm(x)
        inputs, outputs = self._project(hidden, rotary), []
        sequence, slots = following.sequence[:, 0], state.memory.shape[1]
        memory = state.memory[sequence, following.positions[:, 0] % slots]
        for t in range(hidden.shape[1]):
            o, memory = self._retain(*(x[:, t : t + 1] for x in inputs), memory, None)
            outputs.append(o)
            state.memory[sequence, (following.positions[:, t] + 1) % slots] = memory.to(state.memory.dtype)
        return x + self._gated(hidden, torch.cat(outputs, 1))

    def _project(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v `[B, T, heads, D]`, the first two turned by their positions, and log γ `[B, T, heads]`."""
        q, k, v = (p(hidden).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        decay = self.decay_proj(hidden)
        log_decay = F.logsigmoid(decay.to(torch.promote_types(decay.dtype, torch.float32))) / DECAY_TEMPERATURE
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v, log_decay

    def _gated(self, hidden: Tensor, o: Tensor) -> Tensor:
        o = self.head_norm(o).to(hidden.dtype).flatten(-2)
        return self.o_proj(F.silu(self.gate_proj(hidden)) * o)

    def _retain(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None, layout: Layout | None
    ) -> tuple[Tensor, Tensor]:
        """o and the memory after the last token, from `memory` `[B, heads, D, D]`; packed as `layout` says, if any."""
        packed = layout is not None and layout.packed
        kernels = _fla_kernels() if q.is_cuda and q.dtype != torch.float64 else None
        if kernels is not None:
            chunked, recurrent = kernels
            retain = chunked if q.shape[1] > CHUNK_TOKENS or torch.is_grad_enabled() else recurrent
            return retain(
                q,
                k,
                v,
                g=log_decay,
                scale=self.head_dim**-0.5,
                initial_state=memory,
                output_final_state=True,
                cu_seqlens=layout.cu_seqlens.long() if packed else None,
            )
        if packed:
            o, memory = chunked_retention(*(layout.pad(x) for x in (q, k, v, log_decay)), memory)
            return layout.unpad(o), memory
        return chunked_retention(q, k, v, log_decay, memory)

    def _retain_and_keep(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: RetentionState, layout: Layout
    ) -> tuple[Tensor, RetentionState]:
        """The last tokens one by one, with the memory after each of them kept in its slot.

        Sequences end together: before the shorter ones stand tokens that leave the memory as it is.
        """
        inputs = (q, k, v, log_decay)
        if layout.packed:
            inputs = [layout.pad(x, at_end=True) for x in inputs]
        T, slots = inputs[0].shape[1], state.memory.shape[1]
        before = max(0, T - slots + 1)
        trail = Trail.of(layout, slots, T - before)
        memory, outputs, memories = state.memory[trail.sequences, trail.current], [], []
        for columns in (slice(0, before), *(slice(t, t + 1) for t in range(before, T))):
            if columns.stop:
                o, memory = self._retain(*(x[:, columns] for x in inputs), memory, None)
                outputs.append(o)
            memories.append(memory)
        kept = torch.stack(memories, 1)[trail.sequence, trail.column].to(state.memory.dtype)
        o = torch.cat(outputs, 1)
        return (
            layout.unpad(o, at_end=True) if layout.packed else o,
            RetentionState(state.memory.index_put((trail.sequence, trail.slot), kept)),
        )
