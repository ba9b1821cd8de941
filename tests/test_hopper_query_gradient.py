"""dq of the Hopper kernel: in the interpreter (see gluon_on_cpu.py), and on a GPU that has what it needs."""

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
CPU = torch.device("cpu")


def module(device):
    if device.type == "cpu":
        return gluon_on_cpu.load("query_gradient")
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper GPU")
    from diffv2_sparse.kernels.hopper import query_gradient

    return query_gradient


def gradient(inputs, do, selection, device, *, runs=1, **options):
    """dq from this kernel inside the portable forward and backward, and what it was called with; all runs agree."""
    ours = module(device)
    calls = []

    def query_gradient(*call):
        calls.append(call)
        return ours.query_gradient(*call)

    options = {
        "scale": inputs[0].shape[-1] ** -0.5,
        "window": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
    } | options
    no_keys = {"key_gradients": lambda do, q, k, v, *_: (torch.zeros_like(k), torch.zeros_like(v))}
    with mock.patch.multiple(backward, query_gradient=query_gradient, **no_keys):
        _, _, dq, *_ = forward_backward(
            lambda *x: ops.triton_attention(*x, selection, **options), inputs, do.to(inputs[0].dtype)
        )
    [call] = calls
    for _ in range(1, runs):
        assert torch.equal(ours.query_gradient(*call), dq)
    return dq, call


def check(sizes, selection=None, *, dtype=torch.float16, device, differential=True, **options):
    inputs = qkv(*sizes, dtype=dtype, device=device, differential=differential)
    B, T, _, HQ, _, D = sizes
    do = torch.randn(B, T, HQ // (2 if differential else 1), D, device=device)
    wide = [None if x is None else x.double() for x in inputs]
    plain = lambda *x: reference_attention(*x, selection, return_lse=True, **options)  # noqa: E731
    exact, same = (forward_backward(plain, x, do)[2] for x in (wide, inputs))
    dq, call = gradient(inputs, do, selection, device, **options)
    budget = 2 * max(error(same, exact), torch.finfo(dtype).eps)
    assert error(dq, exact) <= budget, f"{error(dq, exact):.2e}, budget {budget:.2e}"
    return dq, call


@interpreted
@pytest.mark.parametrize(
    ("T", "S", "G", "C", "block_m", "block_n", "D"),
    [
        (70, 200, 4, 1, 64, 64, 64),  # a consumer has both classes
        (70, 261, 4, 1, 70, 128, 128),  # a block in two tiles, several tiles a row
        (40, 260, 8, 2, 32, 128, 64),  # each class has its own lists, and a launch
        (40, 200, 8, 2, 33, 64, 64),  # with two blocks a tile, and an odd last one
        (20, 300, 6, 1, 32, 128, 64),  # three pairs
        (2, 70, 264, 1, 4, 64, 64),  # more pairs than a tile
    ],
)
def test_lists(T, S, G, C, block_m, block_n, D):
    H = 2 if G < 100 else 1
    selection = random_selection(1, T, S, H, C=C, NB=5, block_m=block_m, block_n=block_n)
    check((1, T, S, H * G, H, D), selection, device=CPU)


@interpreted
@pytest.mark.parametrize(("G", "block_m"), [(1, 128), (3, 32), (5, 100)])
def test_ordinary_attention_with_any_group(G, block_m):
    selection = random_selection(1, 50, 300, 2, NB=4, block_m=block_m, block_n=64)
    check((1, 50, 300, 2 * G, 2, 64), selection, device=CPU, differential=False)


@interpreted
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"scale": -0.3}, {"differential": False, "window": 150}])
def test_without_lists(options):
    check((2, 20, 200, 8, 2, 64), device=CPU, **options)


@interpreted
@pytest.mark.parametrize(
    ("ahead", "differential"), [(63, True), (64, True), (127, True), (128, True), (127, False), (128, False)]
)
def test_diagonals(ahead, differential):
    """With the tile's first token just before and on the last key of a tile of keys."""
    check((1, 33, 33 + ahead, 4, 1, 64), device=CPU, differential=differential)


@interpreted
def test_window_and_lists():
    selection = random_selection(1, 40, 200, 1, C=2, NB=4, block_m=32, block_n=64)
    check((1, 40, 200, 8, 1, 64), selection, device=CPU, window=90)


def sequences_do_not_meet(kind, block_m, dtype, device):
    """What one packed sequence holds does not reach dq of the others, not even NaN."""
    options, selection = packed_case(kind, device, block_m=block_m, block_n=64)
    clean, call = check((1, 100, 176, 8, 2, 64), selection, dtype=dtype, device=device, **options)
    do, q, k, v, *rest = (x.clone() if torch.is_tensor(x) else x for x in call)
    q[:, 33:34], do[:, 33:34] = float("nan"), float("inf")  # the second sequence
    k[:, 40:110], v[:, 40:110] = float("inf"), float("nan")
    dq = module(device).query_gradient(do, q, k, v, *rest)
    assert torch.equal(dq[:, :33], clean[:, :33])
    assert torch.equal(dq[:, 34:], clean[:, 34:])


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("kind", "block_m"), [("selection", 64), ("dense", 16)])
def test_packed_sequences_do_not_meet(kind, block_m):
    sequences_do_not_meet(kind, block_m, torch.float16, CPU)


def any_strides(dtype, device):
    """The same bits, whatever the strides; keys also in rows of 136 bytes, which the copy engine does not take."""
    selection = random_selection(1, 40, 90, 2, block_m=64, block_n=64, device=device)
    inputs, do = qkv(1, 40, 90, 8, 2, 64, dtype=dtype, device=device), torch.randn(1, 40, 4, 64, device=device)
    dq, (do, q, k, v, lam, *rest) = gradient(inputs, do, selection, device)
    wide = torch.empty(1, 90, 2, 68, dtype=dtype, device=device)
    wide[..., :64] = k
    do, q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (do, q, v))
    assert torch.equal(module(device).query_gradient(do, q, wide[..., :64], v, lam.mT.contiguous().mT, *rest), dq)


@interpreted
def test_any_strides():
    any_strides(torch.float16, CPU)


@interpreted
@pytest.mark.parametrize(("C", "block_m"), [(1, 64), (2, 32)])
def test_empty_lists_give_zero(C, block_m):
    selection = random_selection(1, 40, 90, 1, C=C, block_m=block_m, block_n=64)
    selection.counts.zero_()
    dq, _ = gradient(qkv(1, 40, 90, 8, 1, 64, dtype=torch.float16), torch.randn(1, 40, 4, 64), selection, CPU)
    assert (dq == 0).all()


@interpreted
@pytest.mark.parametrize("told", [None, "slower"])
def test_an_obstacle_leads_to_the_portable_kernel(told, monkeypatch):
    ours = gluon_on_cpu.load("backward")
    monkeypatch.setattr(ours, "deltas", lambda *_: (None, None))
    for module, name in ((ours.by_rows, "Hopper"), (ours.portable_by_rows, "portable")):
        monkeypatch.setattr(module, "query_gradient", lambda *_, name=name: name)
    monkeypatch.setattr(ours.by_rows, "obstacle", lambda *_: told)
    monkeypatch.setattr(ours.by_keys, "obstacle", lambda *_: None)
    monkeypatch.setattr(ours.by_keys, "key_gradients", lambda *_: (None, None))
    dq, *_ = ours.backward(*[None] * 10, 1.0)
    assert dq == ("portable" if told else "Hopper")


@interpreted
def test_rows_that_fill_no_tile_have_an_obstacle():
    ours = gluon_on_cpu.load("query_gradient")

    def told(G, block_m, differential=True):
        q, k, _, lam = qkv(1, 40, 90, G, 1, 64, dtype=torch.float16, differential=differential)
        selection = block_m and random_selection(1, 40, 90, 1, block_m=block_m, block_n=64)
        lists = (selection.indices, selection.counts) if selection else (None, None)
        return ours.obstacle(q, k, lam, ops._domain(q, k, *lists, None, None, block_m, 64, None))

    assert [told(8, block_m) for block_m in (32, 0)] == [None, None]
    assert told(8, 31) == told(6, 16) == told(4, 31, differential=False) == "a row of the selection fills no tile"
    assert told(4, 32, differential=False) is None


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


DTYPES = torch.bfloat16, torch.float16
BLOCKS = ((16, 64), (32, 128), (64, 64), (128, 128), (200, 64))
GRID = [  # every D with every block, groups and lists per class, where rows fill a tile; dtypes in turn
    (D, blocks, G, C, dtype)
    for (D, blocks, (G, C)), dtype in zip(
        itertools.product((64, 128), BLOCKS, ((2, 2), (4, 1), (8, 1), (8, 2), (16, 2))), itertools.cycle(DTYPES)
    )
    if blocks[0] * G // 2 >= 128
]


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "blocks", "G", "C", "dtype"), GRID)
def test_grid(D, blocks, G, C, dtype, gpu):
    block_m, block_n = blocks
    selection = random_selection(2, 300, 700, 2, C=C, NB=6, block_m=block_m, block_n=block_n, device=gpu)
    check((2, 300, 700, 2 * G, 2, D), selection, dtype=dtype, device=gpu)


@pytest.mark.gpu
@pytest.mark.parametrize(("G", "blocks"), [(1, (128, 64)), (3, (32, 64)), (4, (128, 128)), (7, (16, 64))])
def test_grid_of_ordinary_attention(G, blocks, gpu):
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
@pytest.mark.parametrize(("D", "block_m", "block_n"), [(64, 32, 64), (128, 40, 64), (64, 64, 128), (128, 128, 64)])
def test_grid_packed(D, block_m, block_n, gpu):
    lengths = {"lengths_q": (150, 1, 64, 85), "lengths_k": (300, 70, 64, 90)}
    for kind, dtype in itertools.product(("selection", "window", "dense"), DTYPES):
        options, selection = packed_case(kind, gpu, block_m=block_m, block_n=block_n, **lengths)
        check((1, 300, 524, 16, 2, D), selection, dtype=dtype, device=gpu, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "block_m"), [("selection", 64), ("dense", 16)])
def test_grid_sequences_do_not_meet(kind, block_m, gpu):
    sequences_do_not_meet(kind, block_m, torch.bfloat16, gpu)


@pytest.mark.gpu
def test_grid_any_strides(gpu):
    any_strides(torch.bfloat16, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("C", "block_m"), [(1, 128), (2, 128)])
def test_the_same_a_thousand_times(C, block_m, D, gpu):
    selection = random_selection(1, 500, 900, 2, C=C, NB=6, block_m=block_m, block_n=128, device=gpu)
    inputs = qkv(1, 500, 900, 16, 2, D, dtype=torch.bfloat16, device=gpu)
    gradient(inputs, torch.randn(1, 500, 8, D, device=gpu), selection, gpu, runs=1000)
