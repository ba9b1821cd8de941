"""The small parts that both halves of the decoder share: RMSNorm, the SwiGLU feed-forward, interleaved rotary
positions.

    norm(x) = weight · x / sqrt(mean(x²) + eps)        mlp(x) = (silu(x W_gate) · x W_up) W_down
    rotary: (x_2i, x_2i+1) is turned by the angle position · theta^(−2i / D)

Source of the rotary form: microsoft/unilm, Diff-Transformer-V2 (`interleaved=True`: adjacent dimensions are a pair).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 at least; without a weight if `affine` is
    False.
    """

    def __init__(self, size: int, eps: float, affine: bool = True):
        super().__init__()
        self.size, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)  # of one dtype, so that one kernel does it
        return F.rms_norm(x, self.size, weight, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """The feed-forward part of a layer, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


Rotary = tuple[Tensor, Tensor]  # cos and sin, each [B, T, D / 2]


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """cos and sin of every position's angles, `[*positions.shape, head_dim / 2]`, in float32, or float64 when `dtype`
    is.

    The angles are float64 until then: at position 10⁶ a float32 product is off by several hundredths of a radian.
    """
    last, device = 2 / head_dim - 1, positions.device
    frequencies = torch.logspace(0, last, head_dim // 2, base=theta, dtype=torch.float64, device=device)
    angles = positions[..., None] * frequencies
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns `x` `[B, T, heads, D]` by the angles of its tokens; computed in the angles' dtype, returned in x's."""
    turn = torch.complex(*rotary)[:, :, None]
    pairs = x.to(torch.promote_types(x.dtype, rotary[0].dtype)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
