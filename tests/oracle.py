"""What results are held against: the reference in float64, and how far plain PyTorch in the same dtype is from it."""

import torch

from diffv2_sparse import BlockSelection
from diffv2_sparse.reference import reference_attention


def qkv(B, T, S, HQ, H, D, *, dtype=torch.float32, device="cpu", differential=True, requires_grad=False):
    """Random inputs, every head and batch different."""
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.float64).to(dtype)  # noqa: E731
    lam = make(B, T, HQ // 2) if differential else None
    tensors = make(B, T, HQ, D), make(B, S, H, D), make(B, S, H, D), lam
    if requires_grad:
        for x in tensors:
            if x is not None:
                x.requires_grad_()
    return tensors


def random_selection(B, T, S, H, *, C=1, NB=4, block_m=16, block_n=16, device="cpu", empty=True):
    """Lists of random length and content, some of them empty, with garbage after their ends."""
    NM, NN = -(-T // block_m), -(-S // block_n)
    NB = min(NB, NN)
    scores = torch.rand(B, C, H, NM, NN)
    indices = scores.topk(NB, -1).indices.int()
    counts = torch.randint(0 if empty else 1, NB + 1, (B, C, H, NM), dtype=torch.int32)
    listed = torch.arange(NB) < counts[..., None]
    indices = torch.where(listed, indices, NN).sort(-1).values
    garbage = torch.randint(-(2**31), 2**31 - 1, indices.shape, dtype=torch.int64).int()
    indices = torch.where(listed, indices.int(), garbage)
    return BlockSelection(indices.to(device), counts.to(device), block_m, block_n)


def error(actual, exact):
    """‖actual − exact‖ / ‖exact‖; infinite where anything is not finite but should be."""
    actual, exact = actual.double().cpu(), exact.double().cpu()
    if not torch.equal(actual.isfinite(), exact.isfinite()):
        return float("inf")
    actual, exact = actual.where(exact.isfinite(), 0.0), exact.where(exact.isfinite(), 0.0)
    return ((actual - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def forward_backward(function, inputs, do):
    """o, lse and the gradients of all inputs that have one."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    o, lse = function(*inputs)
    grads = torch.autograd.grad((o * do.to(o.dtype)).sum(), [x for x in inputs if x is not None])
    return o.detach(), lse.detach(), *grads


def assert_within_budget(function, inputs, selection=None, *, factor=2.0, gradients=True, **options):
    """`function(q, k, v, lam)` → (o, lse) is at most `factor` times as far from float64 as plain PyTorch in the
    inputs' dtype.
    """
    wide = [None if x is None else x.detach().double() for x in inputs]
    q, lam = inputs[0], inputs[3]
    do = torch.randn(*q.shape[:2], q.shape[2] // (1 if lam is None else 2), q.shape[3], device=q.device)

    def plain(*inputs):
        return reference_attention(*inputs, selection, return_lse=True, **options)

    if gradients:
        exact, same, got = (forward_backward(f, x, do) for f, x in ((plain, wide), (plain, inputs), (function, inputs)))
    else:
        exact, same, got = plain(*wide), plain(*inputs), function(*inputs)
    names = ["o", "lse", "dq", "dk", "dv", "dlam"]
    for name, e, s, g in zip(names, exact, same, got):
        # where plain is (nearly) exact: logits in base 2 and weights from a rounded lse cost float32 an ulp or two
        floor = torch.finfo(q.dtype).eps * {torch.float64: 8, torch.float32: 3}.get(q.dtype, 1)
        assert error(g, e) <= factor * max(error(s, e), floor), f"{name}: {error(g, e):.2e}, plain {error(s, e):.2e}"
