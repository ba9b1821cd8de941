"""Backend "torch" within the error budget of the oracle: forward, lse and every gradient."""

import pytest
import torch

from diffv2_sparse import BlockSelection, diff_attention, diff_attention_paged
from diffv2_sparse.cache import PagedKV
from diffv2_sparse.reference import reference_attention
from tests.oracle import assert_within_budget, error, qkv, random_selection


def torch_backend(selection=None, **options):
    return lambda *inputs: diff_attention(*inputs, selection, backend="torch", return_lse=True, **options)


SHAPES = [  # B, T, S, HQ, H, D, block_m, block_n
    (1, 64, 64, 4, 2, 32, 16, 16),  # G = 2
    (2, 33, 75, 8, 2, 16, 1, 8),  # one row a token, ragged
    (2, 70, 70, 8, 1, 24, 16, 32),  # one KV head, T no multiple of anything
    (1, 100, 131, 12, 3, 64, 128, 20),  # one row longer than the call
    (3, 1, 50, 4, 2, 16, 1, 16),  # decode
]


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_selection(shape, C, device):
    *sizes, block_m, block_n = shape
    B, T, S, _, H, _ = sizes
    selection = random_selection(B, T, S, H, C=C, NB=4, block_m=block_m, block_n=block_n, device=device)
    assert_within_budget(torch_backend(selection), qkv(*sizes, device=device), selection)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, device):
    selection = random_selection(2, 40, 60, 2, C=2, device=device)
    assert_within_budget(torch_backend(selection), qkv(2, 40, 60, 8, 2, 32, dtype=dtype, device=device), selection)


@pytest.mark.parametrize("shape", SHAPES)
def test_ordinary_attention_with_any_group(shape, device):
    *sizes, block_m, block_n = shape
    B, T, S, HQ, H, _ = sizes
    sizes[3] = HQ - HQ // 2 + (H - (HQ - HQ // 2) % H) % H  # an odd group for some
    selection = random_selection(B, T, S, H, NB=4, block_m=block_m, block_n=block_n, device=device)
    assert_within_budget(torch_backend(selection), qkv(*sizes, differential=False, device=device), selection)


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
@pytest.mark.parametrize("sizes", [(2, 90, 90, 4, 2, 16), (1, 5, 130, 4, 1, 16), (2, 1, 40, 8, 2, 16)])
def test_window(sizes, window, device):
    assert_within_budget(torch_backend(window=window), qkv(*sizes, device=device), window=window)


@pytest.mark.parametrize("C", [1, 2])
def test_window_and_selection_is_their_intersection(C, device):
    selection = random_selection(1, 64, 64, 2, C=C, device=device)
    options = {"window": 20}
    assert_within_budget(
        torch_backend(selection, **options), qkv(1, 64, 64, 4, 2, 16, device=device), selection, **options
    )


@pytest.mark.parametrize("sizes", [(2, 64, 64, 4, 2, 16), (2, 30, 200, 4, 2, 16), (2, 1, 50, 4, 2, 16)])
def test_dense(sizes, device):
    assert_within_budget(torch_backend(), qkv(*sizes, device=device))
    inputs = qkv(*sizes, dtype=torch.float64, device=device)
    torch.testing.assert_close(diff_attention(*inputs), reference_attention(*inputs))


def test_scale(device):
    inputs = qkv(1, 40, 40, 4, 2, 16, device=device)
    assert_within_budget(torch_backend(scale=0.7), inputs, scale=0.7)


@pytest.mark.parametrize("kind", ["selection", "window", "dense"])
def test_packed(kind, device):
    lengths_q, lengths_k = [33, 1, 16, 50], [40, 70, 16, 50]
    cu = {
        f"cu_seqlens_{n}": torch.tensor([0, *x], device=device).cumsum(0).int()
        for n, x in (("q", lengths_q), ("k", lengths_k))
    }
    inputs = qkv(1, sum(lengths_q), sum(lengths_k), 4, 2, 16, device=device)
    options, selection = dict(cu), None
    if kind == "window":
        options["window"] = 12
    if kind == "selection":
        parts = [random_selection(1, t, s, 2, NB=2, C=2, device=device) for t, s in zip(lengths_q, lengths_k)]
        wide = [torch.nn.functional.pad(p.indices, (0, 2 - p.indices.shape[-1])) for p in parts]
        selection = BlockSelection(torch.cat(wide, 3), torch.cat([p.counts for p in parts], 3), 16, 16)
    assert_within_budget(torch_backend(selection, **options), inputs, selection, **options)


@pytest.mark.parametrize(("C", "T"), [(1, 1), (2, 1), (2, 5), (None, 1), (None, 5)])
def test_paged_equals_contiguous(C, T, device):
    B, HQ, H, D, block_n = 3, 8, 2, 16, 8
    lengths = [29, 64, 7]
    NP = 8
    table = torch.randperm(B * H * NP + 5)[: B * H * NP].view(B, H, NP).int()  # scattered, some pages unused
    k_pages, v_pages = torch.randn(2, B * H * NP + 5, block_n, D, dtype=torch.float64, device=device).unbind(0)
    q, _, _, lam = qkv(B, T, 64, HQ, H, D, dtype=torch.float64, device=device)
    pages = PagedKV(k_pages, v_pages, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))
    selection = (
        None if C is None else random_selection(B, T, 7, H, C=C, NB=1, block_m=1, block_n=block_n, device=device)
    )
    o = diff_attention_paged(q, lam, pages, selection)
    for b, S in enumerate(lengths):
        k, v = (x[table[b].long().to(device)].flatten(1, 2)[:, :S].movedim(0, 1)[None] for x in (k_pages, v_pages))
        own = None
        if selection is not None:
            own = BlockSelection(selection.indices[b : b + 1], selection.counts[b : b + 1], 1, block_n)
        exact = reference_attention(q[b : b + 1], k, v, lam[b : b + 1], own)
        assert error(o[b : b + 1], exact) < 1e-12


def test_pages_that_do_not_exist_are_never_read(device):
    pages = PagedKV(
        torch.randn(4, 8, 16, device=device),
        torch.randn(4, 8, 16, device=device),
        torch.tensor([[[0, 99], [1, -7]]], dtype=torch.int32, device=device),
        torch.tensor([16], dtype=torch.int32, device=device),
    )
    q, _, _, lam = qkv(1, 1, 16, 4, 2, 16, device=device)
    whole = diff_attention_paged(q, lam, pages)
    first = diff_attention_paged(
        q,
        lam,
        pages,
        BlockSelection(
            torch.zeros(1, 1, 2, 1, 1, dtype=torch.int32, device=device),
            torch.ones(1, 1, 2, 1, dtype=torch.int32, device=device),
            1,
            8,
        ),
    )
    torch.testing.assert_close(whole, first)


def test_lists_outside_the_keys_are_skipped(device):
    inputs = qkv(1, 32, 32, 4, 2, 16, device=device)
    indices = (
        torch.tensor([-5, 0, 1, 7, 2**31 - 1], dtype=torch.int32, device=device).expand(1, 1, 2, 2, 5).contiguous()
    )
    broken = BlockSelection(indices, torch.full((1, 1, 2, 2), 5, dtype=torch.int32, device=device), 16, 16)
    valid = BlockSelection(
        torch.tensor([0, 1], dtype=torch.int32, device=device).expand(1, 1, 2, 2, 2).contiguous(),
        torch.full((1, 1, 2, 2), 2, dtype=torch.int32, device=device),
        16,
        16,
    )
    torch.testing.assert_close(
        diff_attention(*inputs, broken, backend="torch"), diff_attention(*inputs, valid, backend="torch")
    )


def test_empty_lists_give_zero_and_no_gradient(device):
    inputs = qkv(1, 32, 32, 4, 2, 16, device=device, requires_grad=True)
    nothing = BlockSelection(
        torch.zeros(1, 2, 2, 2, 1, dtype=torch.int32, device=device),
        torch.zeros(1, 2, 2, 2, dtype=torch.int32, device=device),
        16,
        16,
    )
    o, lse = diff_attention(*inputs, nothing, return_lse=True)
    o.sum().backward()
    assert (o == 0).all()
    assert (lse == float("-inf")).all()
    assert all((x.grad == 0).all() for x in inputs)


def test_same_inputs_same_bits():
    selection = random_selection(2, 100, 100, 2, C=2, block_m=1)
    inputs = qkv(2, 100, 100, 8, 2, 16, requires_grad=True)
    runs = []
    for _ in range(2):
        o = diff_attention(*inputs, selection)
        runs.append((o, *torch.autograd.grad(o.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradcheck():
    selection = random_selection(1, 6, 9, 1, C=2, NB=3, block_m=2, block_n=2)
    inputs = qkv(1, 6, 9, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: diff_attention(*x, selection), inputs)
