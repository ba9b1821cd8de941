"""Fused backward of block-sparse differential attention for Hopper: formulas and passes of `kernels/backward.py`.

Each pass has a kernel of its own, which says what calls it leaves to the portable one.
"""

from torch import Tensor

from .. import key_gradients as portable_by_keys
from .. import query_gradient as portable_by_rows
from ..backward import deltas
from ..domain import Domain
from . import key_gradients as by_keys
from . import query_gradient as by_rows


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
    rows = portable_by_rows if by_rows.obstacle(q, k, lam_logit, domain) else by_rows
    dq = rows.query_gradient(do, q, k, v, lam_logit, lse, delta, domain, scale)
    keys = portable_by_keys if by_keys.obstacle(q, k, lam_logit, domain) else by_keys
    dk, dv = keys.key_gradients(do, q, k, v, lam_logit, lse, delta, domain, transposed, scale)
    return dq, dk, dv, dlam
