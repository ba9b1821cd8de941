"""The Hopper kernels on a GPU that has what they need: the bodies and cells of test_kernels.py, in sizes they take."""

import itertools

import pytest
import torch

from diffv2_sparse import diff_attention, ops
from tests.oracle import forward_backward, qkv, random_selection
from tests.test_kernels import (  # noqa: F401
    Kernels,
    _poison,
    packed_case,
    test_any_strides,
    test_beyond_two_billion_elements,
    test_compiles_whole,
    test_dense,
    test_empty_lists_give_zero_and_no_gradient,
    test_entries_that_name_no_other_block_are_skipped,
    test_full_lists_are_dense_attention,
    test_more_heads_than_a_tile,
    test_no_number_stays_where_it_was,
    test_packed,
    test_same_inputs_same_bits,
    test_scale,
    test_window,
    test_window_and_selection_is_their_intersection,
)

pytestmark = pytest.mark.gpu

DTYPES = torch.bfloat16, torch.float16


@pytest.fixture
def device():
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper GPU")
    return device


@pytest.fixture(params=[(torch.bfloat16, 128, 128), (torch.float16, 64, 64)], ids=["bf16-128-128", "fp16-64-64"])
def kernels(request):
    return Kernels(ops.hopper_attention, *request.param)


def check(sizes, selection=None, *, dtype, device, differential=True, **options):
    inputs = qkv(*sizes, dtype=dtype, device=device, differential=differential)
    Kernels(ops.hopper_attention, dtype, sizes[-1], 128).check(inputs, selection, **options)


BLOCKS = ((1, 64), (16, 64), (16, 128), (64, 64), (128, 128), (200, 64))
GRID = [  # every D with every block, groups and lists per class; dtypes in turn
    (D, blocks, G, C, dtype)
    for (D, blocks, (G, C)), dtype in zip(
        itertools.product((64, 128), BLOCKS, ((2, 2), (4, 1), (8, 1), (8, 2), (16, 2))), itertools.cycle(DTYPES)
    )
]


@pytest.mark.parametrize(("D", "blocks", "G", "C", "dtype"), GRID)
def test_grid(D, blocks, G, C, dtype, device):
    block_m, block_n = blocks
    selection = random_selection(2, 300, 700, 2, C=C, NB=6, block_m=block_m, block_n=block_n, device=device)
    check((2, 300, 700, 2 * G, 2, D), selection, dtype=dtype, device=device)


@pytest.mark.parametrize(("G", "blocks"), list(itertools.product((1, 3, 4, 7), ((16, 64), (128, 128)))))
def test_ordinary_attention_with_any_group(G, blocks, device):
    block_m, block_n = blocks
    selection = random_selection(1, 300, 700, 2, NB=6, block_m=block_m, block_n=block_n, device=device)
    for dtype, D in zip(DTYPES, (128, 64)):
        check((1, 300, 700, 2 * G, 2, D), selection, dtype=dtype, device=device, differential=False)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"differential": False}])
def test_grid_without_lists(D, options, device):
    for dtype in DTYPES:
        check((2, 300, 700, 16, 4, D), dtype=dtype, device=device, **options)


@pytest.mark.parametrize(("D", "block_m", "block_n"), [(64, 1, 64), (128, 16, 64), (64, 64, 128), (128, 128, 64)])
def test_grid_packed(D, block_m, block_n, device):
    lengths = {"lengths_q": (150, 1, 64, 85), "lengths_k": (300, 70, 64, 90)}
    for kind, dtype in itertools.product(("selection", "window", "dense"), DTYPES):
        options, selection = packed_case(kind, device, block_m=block_m, block_n=block_n, **lengths)
        check((1, 300, 524, 16, 2, D), selection, dtype=dtype, device=device, **options)


@pytest.mark.parametrize("kind", ["selection", "window", "dense"])
def test_sequences_do_not_meet(kind, kernels, device):
    """What one packed sequence holds does not reach the others, nor their gradients, not even NaN."""
    options, selection = packed_case(kind, device, block_m=64, block_n=kernels.block_n)
    q, k, v, lam = qkv(1, 100, 176, 4, 2, kernels.D, dtype=kernels.dtype, device=device)
    do = torch.randn(1, 100, 2, kernels.D, device=device)
    clean = forward_backward(kernels(selection, **options), (q, k, v, lam), do)
    q[:, 33:34], k[:, 40:110], v[:, 40:110] = float("nan"), float("inf"), float("nan")  # the second sequence
    got = forward_backward(kernels(selection, **options), (q, k, v, lam), do)
    for i, first, last in ((0, 33, 34), (2, 33, 34), (3, 40, 110), (4, 40, 110)):  # o, dq, dk, dv
        assert torch.equal(got[i][:, :first], clean[i][:, :first])
        assert torch.equal(got[i][:, last:], clean[i][:, last:])


@pytest.mark.parametrize("tokens", [slice(None), slice(37, 38)], ids=["all tokens", "one token"])
@pytest.mark.parametrize(("C", "block_m"), [(1, 16), (2, 16), (2, 128)])
@pytest.mark.parametrize("added", [(0, 100, 120), (0, 0, 90)], ids=str)
def test_sums_out_of_range(added, C, block_m, tokens, device):
    """With logits so far above those of a row's first tile that a single walk would give infinity."""
    sizes = 1, 200, 700, 16, 2, 128
    selection = random_selection(*sizes[:3], 2, C=C, NB=5, block_m=block_m, block_n=64, device=device)
    selection.counts[:, -1, :, ::3] = 0
    q, k, v, lam = qkv(*sizes, dtype=torch.bfloat16, device=device)
    levels = torch.tensor(added).repeat_interleave(torch.tensor([192, 256, 252]))
    k[..., 0] = levels.to(k)[:, None]
    q[..., 0] = 0
    q[:, tokens, 1:9, 0] = 128**0.5  # of the scale
    Kernels(ops.hopper_attention, torch.bfloat16, 128, 64).check((q, k, v, lam), selection)


@pytest.mark.parametrize("added", [-60, -85, -110])
def test_sums_too_small(added, device):
    """A list that shares a tile of queries, and sees nothing in that tile's first keys, and little in later ones."""
    selection = random_selection(1, 32, 556, 1, NB=2, block_m=16, block_n=64, device=device)
    selection.indices[:] = torch.tensor([[0, 1], [4, 5]], device=device)
    selection.counts[:] = 2
    q, k, v, lam = qkv(1, 32, 556, 4, 1, 128, dtype=torch.bfloat16, device=device)
    q[..., 0], k[..., 0] = 128**0.5, 0
    k[:, 4 * 64 : 6 * 64, :, 0] = added
    Kernels(ops.hopper_attention, torch.bfloat16, 128, 64).check((q, k, v, lam), selection)


@pytest.mark.parametrize(("C", "block_m"), [(1, 16), (2, 16), (2, 2)])  # both classes at a consumer, apart, its own
def test_the_same_a_thousand_times(C, block_m, kernels, device):
    selection = kernels.lists(1, 100, 200, 2, C=C, block_m=block_m, device=device)
    inputs = kernels.inputs(1, 100, 200, 8, 2, device=device)
    do = torch.randn(1, kernels.tokens(100), 4, kernels.D, device=device)
    first = forward_backward(kernels(selection), inputs, do)
    for _ in range(1000):
        assert all(torch.equal(x, y) for x, y in zip(forward_backward(kernels(selection), inputs, do), first))


def test_lse_only_where_it_is_asked_for(kernels, device):
    inputs = kernels.inputs(1, 40, 40, 4, 2, device=device)
    o, lse = diff_attention(*inputs, backend="hopper", return_lse=True)
    assert lse.shape == (1, 4, kernels.tokens(40))
    assert torch.equal(diff_attention(*inputs, backend="hopper"), o)
    call = {"scale": kernels.D**-0.5, "window": None, "cu_seqlens_q": None, "cu_seqlens_k": None}
    assert ops.hopper_attention(*inputs, None, **call, return_lse=False)[1].numel() == 0
