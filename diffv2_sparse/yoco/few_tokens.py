"""What a layer does beside attention, for the few tokens of a step.

Norm and projections, a projection and the residual, the feed-forward: `kernels/linear.py` does each in one launch, or
two, where it takes the tokens and the modules. Else the modules do, which compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .layers import RMSNorm, Rotary, SwiGLU, apply_rotary
from .layout import Following

FEW_TOKENS = 2  # for more, products on tensor cores are faster


@dataclass(frozen=True)
class Projection:
    """A projection of a layer's normed input.

    Attributes:
        turned: by the tokens' positions.
        ring: `[B, H, R, D]`, contiguous, that the heads are written to; None returns them.
    """

    linear: nn.Linear
    turned: bool = False
    ring: Tensor | None = None


def project(
    x: Tensor,
    norm: RMSNorm,
    projections: Sequence[Projection],
    head_dim: int,
    rotary: Rotary,
    following: Following | None = None,
) -> list[Tensor]:
    """The projections of norm(x), x `[B, T, hidden_size]`, that go to no ring, each `[B, T, N]`.

    Args:
        rotary: of the tokens.
        following: where the tokens stand, if there are rings.
    """
    linears = [one.linear for one in projections]
    if _fits(x, norm, linears):
        weights, turned, rings = zip(*((one.linear.weight, one.turned, one.ring) for one in projections))
        kept = next((ring.shape for ring in rings if ring is not None), None)
        places = None if kept is None else following.ring_places(*kept[1:])
        return ops.project_few(x, norm.weight, norm.eps, weights, turned, rings, head_dim, rotary, places)
    x, returned = norm(x), []
    for one in projections:
        y = one.linear(x)
        if one.turned:
            y = apply_rotary(y.unflatten(-1, (-1, head_dim)), rotary).flatten(-2)
        if one.ring is None:
            returned.append(y)
        else:
            slot = following.positions % one.ring.shape[2]
            one.ring[following.sequence, :, slot] = y.unflatten(-1, (-1, head_dim)).to(one.ring.dtype)
    return returned


def add_projection(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(y)."""
    return ops.add_few(x, y, linear.weight) if _fits(y, None, [linear]) else x + linear(y)


def add_mlp(x: Tensor, norm: RMSNorm, mlp: SwiGLU) -> Tensor:
    """x + mlp(norm(x))."""
    if not (_plain(mlp, SwiGLU) and _fits(x, norm, [mlp.gate_proj, mlp.up_proj, mlp.down_proj])):
        return x + mlp(norm(x))
    hidden = ops.gate_few(x, norm.weight, norm.eps, mlp.gate_proj.weight, mlp.up_proj.weight)
    return ops.add_few(x, hidden, mlp.down_proj.weight)


def _fits(x: Tensor, norm: RMSNorm | None, linears: Sequence[nn.Linear]) -> bool:
    return x.is_cuda and _takes(x, norm, linears)


def _takes(x: Tensor, norm: RMSNorm | None, linears: Sequence[nn.Linear]) -> bool:
    """Whether the kernels compute what these modules do for such tokens."""
    return (
        x.shape[:-1].numel() <= FEW_TOKENS
        and ops.obstacle(x[..., :1]) is None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and (norm is None or (_plain(norm, RMSNorm) and norm.weight is not None and norm.weight.device == x.device))
        and all(_plain(one, nn.Linear) and one.bias is None and _like(one.weight, x) for one in linears)
    )


def _plain(module: nn.Module, kind: type) -> bool:
    """Whether a call of the module computes what its class does, and no hook of its own listens."""
    listens = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not listens


def _like(weight: Tensor, x: Tensor) -> bool:
    alike = weight.dtype == x.dtype and weight.device == x.device
    return alike and type(weight.data) is Tensor and weight.is_contiguous()
