"""dk and dv of the Hopper kernel: in the interpreter (see gluon_on_cpu.py), and on a GPU that has what it needs."""

import itertools
import os
from unittest import mock

import pytest
import torch

from diffv2_sparse import ops
from diffv2_sparse.reference import reference_attention
from tests.oracle import error, forward_backward, qkv, random_selection

pytest.importorskip("triton")
from diffv2_sparse.kernels import backward
from tests import gluon_on_cpu
from tests.test_kernels import _poison, packed_case  # noqa: F401

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it needs the interpreter")


def modules(device):
    """key_gradients and shares, for this device."""
    if device.type == "cpu":
        return gluon_on_cpu.load("key_gradients"), gluon_on_cpu.load("shares")
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper GPU")
    from diffv2_sparse.kernels.hopper import key_gradients, shares

    return key_gradients, shares


def gradients(inputs, do, selection, device, *, least=16, runs=1, **options):
    """dk and dv from this kernel inside the portable forward and backward; all of `runs` calls agree."""
    ours, shares = modules(device)
    calls = []

    def key_gradients(do, q, k, v, lam_logit, *rest):
        assert ours.obstacle(q, k, lam_logit, rest[2]) is None
        calls.append((do, q, k, v, lam_logit, *rest))
        return ours.key_gradients(*calls[-1])

    call = {"scale": inputs[0].shape[-1] ** -0.5, "window": None, "cu_seqlens_q": None, "cu_seqlens_k": None} | options
    with mock.patch.object(backward, "key_gradients", key_gradients), mock.patch.object(shares, "LEAST_TILES", least):
        _, _, _, dk, dv, *_ = forward_backward(
            lambda *x: ops.triton_attention(*x, selection, **call), inputs, do.to(inputs[0].dtype)
        )
        for _ in range(1, runs):
            assert all(torch.equal(x, y) for x, y in zip(ours.key_gradients(*calls[0]), (dk, dv)))
    assert len(calls) == 1
    return dk, dv


def check(sizes, selection=None, *, dtype=torch.float16, device, differential=True, least=16, **options):
    inputs = qkv(*sizes, dtype=dtype, device=device, differential=differential)
    B, T, _, HQ, _, D = sizes
    do = torch.randn(B, T, HQ // (2 if differential else 1), D, device=device)
    wide = [None if x is None else x.double() for x in inputs]
    plain = lambda *x: reference_attention(*x, selection, return_lse=True, **options)  # noqa: E731
    exact, same = (forward_backward(plain, x, do)[3:5] for x in (wide, inputs))
    for name, e, s, g in zip(
        ("dk", "dv"), exact, same, gradients(inputs, do, selection, device, least=least, **options)
    ):
        budget = 2 * max(error(s, e), torch.finfo(dtype).eps)
        assert error(g, e) <= budget, f"{name}: {error(g, e):.2e}, budget {budget:.2e}"


CPU = torch.device("cpu")


@interpreted
@pytest.mark.parametrize(
    ("T", "S", "G", "C", "block_m", "block_n", "D", "least"),
    [
        (40, 300, 8, 1, 16, 64, 64, 16),  # the consumers take turns
        (70, 261, 4, 1, 70, 128, 64, 16),  # several tiles a row, the last not full
        (40, 300, 8, 2, 16, 64, 64, 16),  # each class has its own lists
        (70, 300, 16, 2, 40, 128, 64, 16),
        (100, 200, 2, 2, 16, 64, 64, 16),  # several rows a tile
        (60, 300, 4, 1, 5, 128, 64, 16),  # rows that do not fill a box, nor boxes a tile
        (30, 200, 6, 1, 16, 128, 128, 16),  # three pairs
        (9, 70, 140, 1, 4, 64, 64, 16),  # more heads than a tile
        (200, 300, 16, 1, 16, 128, 64, 1),  # lists that programs share
    ],
)
def test_lists(T, S, G, C, block_m, block_n, D, least):
    selection = random_selection(1, T, S, 1, C=C, NB=4, block_m=block_m, block_n=block_n)
    check((1, T, S, G, 1, D), selection, device=CPU, least=least)


@interpreted
@pytest.mark.parametrize("options", [{}, {"window": 60}, {"differential": False}])
def test_without_lists(options):
    check((2, 40, 200, 12, 2, 64), device=CPU, **options)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["selection", "dense"])
def test_packed_sequences_do_not_meet(kind):
    options, selection = packed_case(kind, "cpu", block_m=16, block_n=64)
    check((1, 100, 176, 8, 2, 64), selection, device=CPU, **options)
    q, k, v, lam = qkv(1, 100, 176, 8, 2, 64, dtype=torch.float16)
    do = torch.randn(1, 100, 4, 64)
    clean = gradients((q, k, v, lam), do, selection, CPU, **options)
    q[:, 33:34], do[:, 33:34] = float("nan"), float("inf")  # the second sequence
    for x, y in zip(gradients((q, k, v, lam), do, selection, CPU, **options), clean):
        assert torch.equal(x[:, :40], y[:, :40])
        assert torch.equal(x[:, 110:], y[:, 110:])


@interpreted
def test_a_list_that_every_row_shares_is_cut():
    """All rows choose the first block, and no share is longer than it may be."""
    ours, shares = modules(CPU)
    selection = random_selection(1, 160, 320, 2, C=2, NB=2, block_m=16, block_n=64, empty=False)
    selection.indices[..., 0] = 0
    offsets, _ = selection.transpose(320)
    lengths = offsets.diff(dim=-1).sum(1).flatten()
    with mock.patch.object(shares, "LEAST_TILES", 1):
        cut = shares.shares_of(offsets, selection.indices.numel(), 1, 64, 64)
    most = cut.most.item()
    assert most < lengths.max()
    assert torch.equal(cut.further, ((lengths + most - 1) // most - 1).clamp(min=0).int())
    assert cut.further.sum() <= len(cut.blocks)
    assert cut.blocks[: cut.further.sum()].bincount(minlength=len(lengths)).tolist() == cut.further.tolist()
    check((1, 160, 320, 8, 2, 64), selection, device=CPU, least=1)


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


DTYPES = torch.bfloat16, torch.float16
BLOCKS = ((16, 64), (16, 128), (64, 64), (128, 128), (200, 64))
GRID = [
    (D, blocks, G, C, dtype, least)
    for (D, blocks, (G, C)), dtype, least in zip(
        itertools.product((64, 128), BLOCKS, ((2, 2), (4, 1), (8, 1), (8, 2), (16, 2))),
        itertools.cycle(DTYPES),
        itertools.cycle((16, 1, 16)),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "blocks", "G", "C", "dtype", "least"), GRID)
def test_grid(D, blocks, G, C, dtype, least, gpu):
    block_m, block_n = blocks
    selection = random_selection(2, 300, 700, 2, C=C, NB=6, block_m=block_m, block_n=block_n, device=gpu)
    check((2, 300, 700, 2 * G, 2, D), selection, dtype=dtype, device=gpu, least=least)


@pytest.mark.gpu
@pytest.mark.parametrize(("G", "blocks"), list(itertools.product((1, 3, 4, 7), ((16, 64), (128, 128)))))
def test_ordinary_attention_with_any_group(G, blocks, gpu):
    block_m, block_n = blocks
    selection = random_selection(1, 300, 700, 2, NB=6, block_m=block_m, block_n=block_n, device=gpu)
    for dtype, D in zip(DTYPES, (128, 64)):
        check((1, 300, 700, 2 * G, 2, D), selection, dtype=dtype, device=gpu, differential=False)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"differential": False}])
def test_grid_without_lists(D, options, gpu):
    for dtype in DTYPES:
        check((2, 300, 700, 16, 4, D), dtype=dtype, device=gpu, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "block_m", "block_n"), [(64, 2, 64), (128, 16, 64), (64, 64, 128), (128, 128, 64)])
def test_grid_packed(D, block_m, block_n, gpu):
    lengths = {"lengths_q": (150, 1, 64, 85), "lengths_k": (300, 70, 64, 90)}
    for kind, dtype in itertools.product(("selection", "window", "dense"), DTYPES):
        options, selection = packed_case(kind, gpu, block_m=block_m, block_n=block_n, **lengths)
        check((1, 300, 524, 16, 2, D), selection, dtype=dtype, device=gpu, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("C", "block_n", "D"), [(1, 128, 128), (2, 64, 64)])
def test_the_same_a_thousand_times(C, block_n, D, gpu):
    selection = random_selection(1, 500, 900, 2, C=C, NB=6, block_m=16, block_n=block_n, device=gpu)
    inputs = qkv(1, 500, 900, 16, 2, D, dtype=torch.bfloat16, device=gpu)
    gradients(inputs, torch.randn(1, 500, 8, D, device=gpu), selection, gpu, least=1, runs=1000)
