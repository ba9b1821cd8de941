"""Linear layers for few tokens: the fused kernels compute what the modules do, and are taken where they may be."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from diffv2_sparse.yoco import few_tokens
from diffv2_sparse.yoco.few_tokens import FEW_TOKENS, Projection, add_mlp, add_projection, project
from diffv2_sparse.yoco.graphs import StepTensors, copied, step
from diffv2_sparse.yoco.layers import RMSNorm, SwiGLU, rotary_angles
from diffv2_sparse.yoco.layout import Following
from tests.oracle import error
from tests.tiny_yoco import VOCAB, tiny_model

DTYPES = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
SIZES = (80, 16, 6, 2)  # hidden size, head dimension, query and KV heads: no multiples of a tile


def modules(hidden: int, D: int, HQ: int, H: int) -> nn.ModuleDict:
    linears = {"q": HQ * D, "k": H * D, "v": H * D, "lam": HQ // 2}
    made = {name: nn.Linear(hidden, size, bias=False) for name, size in linears.items()}
    made |= {"o": nn.Linear(HQ // 2 * D, hidden, bias=False), "norm": RMSNorm(hidden, 1e-5), "mlp": SwiGLU(hidden, 72)}
    made = nn.ModuleDict(made)
    with torch.no_grad():
        made["norm"].weight.uniform_(0.5, 2)
    return made


def layer(own: nn.ModuleDict, x, o, rings, positions, D: int) -> list[torch.Tensor]:
    """All that a layer does beside attention, in the dtype of x."""
    rings = [ring.clone() for ring in rings]
    rotary = rotary_angles(positions, D, 1e4, x.dtype)
    q, lam = Projection(own["q"], turned=True), Projection(own["lam"])
    k, v = Projection(own["k"], turned=True, ring=rings[0]), Projection(own["v"], ring=rings[1])
    outs = project(x, own["norm"], (q, lam, k, v), D, rotary, Following(positions))
    return [*outs, *rings, add_projection(x, o, own["o"]), add_mlp(x, own["norm"], own["mlp"])]


@pytest.mark.parametrize("sizes", [SIZES, pytest.param((3072, 128, 48, 8), marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 1), (1, 2)])
@torch.no_grad()
def test_kernels_compute_what_the_modules_do(B, T, sizes, device, monkeypatch):
    hidden, D, HQ, H = sizes
    wide = modules(*sizes).double().to(device)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, device=device)  # noqa: E731
    x, o, rings = make(B, T, hidden), make(B, T, HQ // 2 * D), make(2, B, H, 5, D).unbind(0)
    positions = torch.tensor([[3, 4], [1_000_003, 1_000_004]], device=device)[:B, :T]
    for dtype in DTYPES[device.type]:
        with monkeypatch.context() as patch:
            patch.setattr(few_tokens, "_fits", lambda *_: False)
            own = copy.deepcopy(wide).to(dtype)
            inputs = [t.to(dtype) for t in (x, o)], [ring.to(dtype) for ring in rings]
            exact = layer(copy.deepcopy(own).double(), *(t.double() for t in inputs[0]), inputs[1], positions, D)
            plain = layer(own, *inputs[0], inputs[1], positions, D)
            patch.setattr(few_tokens, "_fits", few_tokens._takes)
            fused = layer(own, *inputs[0], inputs[1], positions, D)
        for e, p, f in zip(exact, plain, fused, strict=True):
            assert f.dtype == dtype
            assert f.shape == e.shape
            assert error(f, e) <= 2 * max(error(p, e), torch.finfo(dtype).eps)
        for before, after in zip(inputs[1], fused[2:4]):  # nothing else in the rings
            changed = (before != after).any(-1)
            assert changed.sum() == B * H * T


@pytest.mark.parametrize("kernels", [False, True])
@torch.no_grad()
def test_a_step_by_them(kernels, device, monkeypatch):
    model, taken = tiny_model(torch.float32, sparse_mode="pair_mean").to(device), []
    tokens = torch.randint(1, VOCAB, (1, 40), device=device)
    cache = model.new_cache(1, 60, max_rollback=1)
    model.prefill(tokens[:, :38], cache=cache)
    expected = model.model.prefill(tokens, logits_to_keep=2)[0]

    def takes(*args) -> bool:
        taken.append(few_tokens._takes(*args))
        return kernels and taken[-1]

    monkeypatch.setattr(few_tokens, "_fits", takes)
    cache.advance(2)
    at = StepTensors.of(cache, 2, copied(cache.states))
    at.ids.copy_(tokens[:, 38:])
    torch.testing.assert_close(step(model.model, at), expected, rtol=1e-4, atol=1e-4)
    assert len(taken) == 4 * 3 + 1  # of each layer the projections, o and the feed-forward; the shared keys
    assert all(taken)


def test_what_is_taken():
    own = modules(*SIZES)
    x = torch.randn(1, FEW_TOKENS, SIZES[0])
    taken = lambda x=x, norm=own["norm"], linear=own["q"]: few_tokens._takes(x, norm, [own["lam"], linear])  # noqa: E731
    assert not taken()  # gradients
    with torch.no_grad():
        assert taken()
        assert taken(norm=None)
        assert not taken(torch.randn(1, FEW_TOKENS + 1, SIZES[0]))
        assert not taken(x.half())  # the weights are not
        assert not taken(x.double())
        assert not taken(x.bfloat16())
        assert not taken(linear=nn.Linear(SIZES[0], 8))  # a bias
        assert not taken(linear=nn.Linear(SIZES[0], 8, bias=False, dtype=torch.bfloat16))
        assert not taken(linear=type("Lora", (nn.Linear,), {})(SIZES[0], 8, bias=False))
        strided = nn.Linear(SIZES[0], 8, bias=False)
        strided.weight = nn.Parameter(torch.randn(SIZES[0], 8).T)
        assert not taken(linear=strided)
        for listen in ("register_forward_hook", "register_forward_pre_hook"):
            heard = nn.Linear(SIZES[0], 8, bias=False)
            getattr(heard, listen)(lambda *_: None)
            assert not taken(linear=heard)
        wrapped = nn.Linear(SIZES[0], 8, bias=False)
        wrapped.forward = lambda x: x
        assert not taken(linear=wrapped)
        assert not taken(norm=nn.LayerNorm(SIZES[0]))
        assert not taken(norm=RMSNorm(SIZES[0], 1e-5, affine=False))
        assert few_tokens._fits(x, own["norm"], [own["q"]]) == x.is_cuda


@torch.no_grad()
def test_a_feed_forward_of_another_kind_is_called():
    x, norm = torch.randn(1, 1, SIZES[0]), RMSNorm(SIZES[0], 1e-5)
    assert torch.equal(add_mlp(x, norm, nn.Identity()), x + norm(x))
    heard = SwiGLU(SIZES[0], 8)
    heard.register_forward_hook(lambda module, inputs, output: 2 * output)
    with mock.patch.object(few_tokens, "_fits", return_value=True):
        assert torch.equal(add_mlp(x, norm, heard), x + heard(norm(x)))
