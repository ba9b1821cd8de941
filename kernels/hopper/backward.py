"""Fused backward of block-sparse differential attention for Hopper: formulas and passes of `kernels/backward.py`.

dk and dv have a kernel of their own. dq is the portable one's: a warp-specialised kernel was no faster, as both end at
about 540 TFLOP/s.
"""

from torch import Tensor

from .. import key_gradients as portable
from ..backward import deltas
from ..domain import Domain
from ..query_gradient import query_gradient
from .key_gradients import key_gradients, obstacle


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam_logit: Tensor | None,
    o: Tensor,
    o_noise: Tensor,
    lse: Tensor,
    domain: Domain,
    transposed: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and lam_logit; arguments as those of the portable `backward`, of a call that the Hopper
    `forward` takes.
    """
    delta, dlam = deltas(do, o, o_noise, lam_logit, lse)
    dq = query_gradient(do, q, k, v, lam_logit, lse, delta, domain, scale)
    by_keys = portable.key_gradients if obstacle(q, k, lam_logit, domain) else key_gradients
    dk, dv = by_keys(do, q, k, v, lam_logit, lse, delta, domain, transposed, scale)
    return dq, dk, dv, dlam
