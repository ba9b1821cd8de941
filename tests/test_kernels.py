"""The Triton kernels within the error budget of the oracle: forward, lse and every gradient.

Without a GPU they run in Triton's interpreter, in float32 and float16; cases marked gpu add bfloat16 and larger grids.
Outputs are poisoned: memory that a kernel allocates starts as NaN.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from diffv2_sparse import BlockSelection
from diffv2_sparse.reference import reference_attention
from tests.oracle import assert_within_budget, error, forward_backward, qkv, random_selection

pytest.importorskip("triton")
from diffv2_sparse import ops


@pytest.fixture(autouse=True)
def _poison():
    """Fills what `torch.empty` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Kernels(NamedTuple):
    """A backend and sizes that it takes. Under another fixture `kernels`, the same bodies test other kernels."""

    attend: Callable
    dtype: torch.dtype
    D: int
    block_n: int

    def __call__(self, selection=None, *, scale=None, window=None, cu_seqlens_q=None, cu_seqlens_k=None):
        def attention(q, k, v, lam_logit):
            return self.attend(
                q,
                k,
                v,
                lam_logit,
                selection,
                scale=q.shape[-1] ** -0.5 if scale is None else scale,
                window=window,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
            )

        return attention

    def tokens(self, n):
        """As many more tokens as blocks are larger than 16, but for the last few."""
        return n if self.block_n == 16 or n == 1 else n * self.block_n // 16 - 3

    def inputs(self, B, T, S, HQ, H, **options):
        return qkv(B, self.tokens(T), self.tokens(S), HQ, H, self.D, dtype=self.dtype, **options)

    def lists(self, B, T, S, H, *, block_m=16, **options):
        sizes = {"block_m": max(1, block_m * self.block_n // 16), "block_n": self.block_n}
        return random_selection(B, self.tokens(T), self.tokens(S), H, **sizes, **options)

    def check(self, inputs, selection=None, *, gradients=True, **options):
        assert_within_budget(self(selection, **options), inputs, selection, gradients=gradients, **options)


TRITON = Kernels(ops.triton_attention, torch.float32, 16, 16)


def check(sizes, selection=None, *, dtype=torch.float32, device, differential=True, **options):
    TRITON.check(qkv(*sizes, dtype=dtype, device=device, differential=differential), selection, **options)


@pytest.fixture
def kernels():
    return TRITON


SHAPES = [  # B, T, S, HQ, H, D, block_m, block_n
    (1, 64, 64, 4, 2, 32, 16, 16),  # G = 2
    (1, 19, 45, 16, 2, 16, 1, 8),  # one row a token, ragged: tiles walk the union of several rows
    (2, 70, 70, 8, 1, 24, 16, 32),  # one KV head, T no multiple of anything
    (1, 60, 91, 12, 2, 64, 128, 20),  # one row longer than the call, odd block, three pairs a group
    (2, 40, 50, 4, 2, 16, 3, 16),  # rows that do not fill a tile
    (3, 1, 50, 4, 2, 16, 1, 16),  # decode
    (1, 90, 90, 4, 1, 16, 80, 16),  # a row longer than a tile
]


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_selection(shape, C, device):
    *sizes, block_m, block_n = shape
    B, T, S, _, H, _ = sizes
    selection = random_selection(B, T, S, H, C=C, NB=4, block_m=block_m, block_n=block_n, device=device)
    check(sizes, selection, device=device)


@pytest.mark.parametrize(("D", "block_n"), [(64, 64), (96, 16), (128, 128), (256, 256)])
def test_half_precision(D, block_n, device):
    selection = random_selection(1, 48, 300, 1, C=1 + (D == 64), block_m=16, block_n=block_n, device=device)
    check((1, 48, 300, 4, 1, D), selection, dtype=torch.float16, device=device)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_ordinary_attention_with_any_group(shape, device):
    *sizes, block_m, block_n = shape
    B, T, S, _, H, _ = sizes
    sizes[3] = 3 * H
    selection = random_selection(B, T, S, H, NB=4, block_m=block_m, block_n=block_n, device=device)
    check(sizes, selection, differential=False, device=device)


@pytest.mark.parametrize(("sizes", "window"), [((1, 90, 90, 4, 2), 7), ((2, 33, 190, 4, 1), 100)])
def test_window(sizes, window, kernels, device):
    kernels.check(kernels.inputs(*sizes, device=device), window=kernels.tokens(window))


def test_window_and_selection_is_their_intersection(kernels, device):
    selection = kernels.lists(1, 64, 64, 2, C=2, device=device)
    kernels.check(kernels.inputs(1, 64, 64, 4, 2, device=device), selection, window=kernels.tokens(20))


@pytest.mark.parametrize("sizes", [(2, 70, 170, 4, 2), (5, 1, 50, 8, 2)])
def test_dense(sizes, kernels, device):
    kernels.check(kernels.inputs(*sizes, device=device))


@pytest.mark.parametrize(("blocks", "less"), [(1, 2), (1, 1), (1, 0), (4, 2)])
def test_full_lists_are_dense_attention(blocks, less, kernels, device):
    """With a row's first token just before, on and just after the last key of a block, of the lists or of a tile."""
    n = kernels.block_n
    T, S = 2 * n, 2 * n + blocks * n - less
    NN = -(-S // n)
    indices = torch.arange(NN, dtype=torch.int32, device=device).expand(1, 1, 2, 2, NN).contiguous()
    full = BlockSelection(indices, torch.full((1, 1, 2, 2), NN, dtype=torch.int32, device=device), n, n)
    inputs = qkv(1, T, S, 4, 2, kernels.D, dtype=kernels.dtype, device=device)
    kernels.check(inputs, full)
    kernels.check(inputs)


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(scale, kernels, device):
    kernels.check(kernels.inputs(1, 20, 40, 4, 2, device=device), scale=scale)


def packed_case(
    kind, device, *, C=2, block_m=16, block_n=16, H=2, lengths_q=(33, 1, 16, 50), lengths_k=(40, 70, 16, 50)
):
    """Bounds, options and selection of a packed call."""
    cu = {
        f"cu_seqlens_{n}": torch.tensor([0, *x], device=device).cumsum(0).int()
        for n, x in (("q", lengths_q), ("k", lengths_k))
    }
    if kind == "window":
        cu["window"] = 12
    if kind != "selection":
        return cu, None
    sizes = {"NB": 3, "C": C, "block_m": block_m, "block_n": block_n}
    parts = [random_selection(1, t, s, H, **sizes) for t, s in zip(lengths_q, lengths_k)]
    wide = [torch.nn.functional.pad(p.indices, (0, 3 - p.indices.shape[-1])) for p in parts]
    indices, counts = torch.cat(wide, 3), torch.cat([p.counts for p in parts], 3)
    return cu, BlockSelection(indices.to(device), counts.to(device), block_m, block_n)


def test_padding_of_packed_pieces_stays_in_32_bits():
    """Kernels multiply the number of a piece by its tokens; padding has to come out past the end of every sequence."""
    from diffv2_sparse.kernels.domain import Domain

    T, tokens = 1 << 20, 4096
    cu = torch.tensor([0, T // 2, T], dtype=torch.int32)
    most, table = Domain(1, T, T, 1, None, None, None, tokens, 64, cu, cu).pieces(tokens)
    own = table[:, 1].long()
    assert most == len(own) == T // tokens + 2
    assert (own[:-2] < T // 2 // tokens).all()
    assert ((own[-2:] * tokens >= T) & (own[-2:] * tokens < 2**31)).all()


@pytest.mark.parametrize(("kind", "block_m"), [("selection", 16), ("selection", 1), ("window", 0), ("dense", 0)])
def test_packed(kind, block_m, kernels, device):
    options, selection = packed_case(kind, device, block_m=block_m, block_n=kernels.block_n)
    inputs = qkv(1, 100, 176, 4, 2, kernels.D, dtype=kernels.dtype, device=device)
    kernels.check(inputs, selection, **options)


@pytest.mark.parametrize("C", [1, 2])
def test_entries_that_name_no_other_block_are_skipped(C, kernels, device):
    n = kernels.block_n
    inputs = qkv(1, 2 * n, 2 * n, 4, 2, kernels.D, dtype=kernels.dtype, device=device)
    do = torch.randn(1, 2 * n, 2, kernels.D, device=device)

    def run(blocks, count):
        indices = torch.tensor(blocks, dtype=torch.int32, device=device).expand(1, C, 2, 2, len(blocks))
        counts = torch.full((1, C, 2, 2), count, dtype=torch.int32, device=device)
        return forward_backward(kernels(BlockSelection(indices.contiguous(), counts, n, n)), inputs, do)

    exact = run([0, 1], 2)
    broken = ([-5, 0, 1, 7, 2**31 - 1], 5), ([0, 1], 2**30), ([-(2**31), 0, 1, 2], 4)
    for blocks, count in broken:
        for x, y in zip(run(blocks, count), exact):
            torch.testing.assert_close(x, y)


def test_empty_lists_give_zero_and_no_gradient(kernels, device):
    n = kernels.block_n
    inputs = qkv(1, 2 * n, 2 * n, 4, 2, kernels.D, dtype=kernels.dtype, device=device)
    nothing = BlockSelection(
        torch.zeros(1, 2, 2, 2, 1, dtype=torch.int32, device=device),
        torch.zeros(1, 2, 2, 2, dtype=torch.int32, device=device),
        n,
        n,
    )
    do = torch.randn(1, 2 * n, 2, kernels.D, device=device)
    o, lse, *gradients = forward_backward(kernels(nothing), inputs, do)
    assert (o == 0).all()
    assert (lse == float("-inf")).all()
    assert all((x == 0).all() for x in gradients)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_number_stays_where_it_was(kernels, device):
    selection = kernels.lists(1, 20, 64, 1, NB=3, block_m=1, device=device, empty=False)
    q, k, v, lam = kernels.inputs(1, 20, 64, 4, 1, device=device)
    clean, _ = kernels(selection)(q, k, v, lam)
    q[0, 5, 2] = float("nan")
    o, lse = kernels(selection)(q, k, v, lam)
    assert o[0, 5, 1].isnan().all()
    assert lse[0, 2, 5].isnan()
    o[0, 5, 1], clean[0, 5, 1] = 0, 0
    assert torch.equal(o, clean)


def test_same_inputs_same_bits(kernels, device):
    selection = kernels.lists(1, 20, 40, 2, C=2, block_m=1, device=device)
    inputs = kernels.inputs(1, 20, 40, 8, 2, device=device)
    do = torch.randn(1, kernels.tokens(20), 4, kernels.D, device=device)
    runs = [forward_backward(kernels(selection), inputs, do) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_any_strides(kernels, device):
    selection = kernels.lists(1, 40, 40, 2, device=device)
    q, k, v, lam = kernels.inputs(1, 40, 40, 4, 2, device=device)
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        v[:, :, :, :],
        lam.mT.contiguous().mT,
    )
    do = torch.randn(1, 1, 1, 1, device=device).expand(1, q.shape[1], 2, kernels.D)
    for x, y in zip(*(forward_backward(kernels(selection), i, do) for i in ((q, k, v, lam), strided))):
        assert torch.equal(x, y)


@pytest.mark.parametrize("differential", [True, False])
def test_more_heads_than_a_tile(differential, kernels, device):
    selection = kernels.lists(1, 10, 20, 1, block_m=4, device=device)
    kernels.check(kernels.inputs(1, 10, 20, 140, 1, device=device, differential=differential), selection)


def test_obstacles(device, monkeypatch):
    q = torch.randn(1, 4, 2, 16, device=device)
    assert ops.obstacle(q) is None
    assert "float64" in ops.obstacle(q.double())
    assert "257" in ops.obstacle(q.new_empty(1, 4, 2, 257))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on cpu" in ops.obstacle(q.cpu())


@pytest.mark.parametrize("differential", [True, False])
def test_operators(differential, device):
    q, k, v, lam = qkv(1, 9, 17, 4, 1, 16, device=device, differential=differential, requires_grad=True)
    selection = random_selection(1, 9, 17, 1, device=device)
    lists = selection.indices, selection.counts, None, None, 16, 16, 0.25
    torch.library.opcheck(ops._attention, (q, k, v, lam, *lists, None, True))
    torch.library.opcheck(ops._attention, (q, k, v, lam, None, None, None, None, 0, 0, 0.25, 9, True))


def test_compiles_whole(kernels, device):
    selection = kernels.lists(1, 20, 40, 2, C=2, device=device)
    inputs = kernels.inputs(1, 20, 40, 4, 2, device=device)
    do = torch.randn(1, kernels.tokens(20), 2, kernels.D, device=device)
    compiled = torch.compile(kernels(selection), fullgraph=True, backend="aot_eager")
    eager, graph = (forward_backward(f, inputs, do) for f in (kernels(selection), compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, graph))


BLOCKS = ((1, 64), (16, 16), (64, 64), (128, 128), (128, 256))
GRID = [  # every D with every block, the others in turn
    (D, blocks, G, C)
    for (D, blocks), G, C in zip(
        itertools.product((64, 96, 128, 256), BLOCKS), itertools.cycle((2, 4, 8)), itertools.cycle((1, 2))
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "blocks", "G", "C"), GRID)
def test_grid(dtype, D, blocks, G, C):
    block_m, block_n = blocks
    selection = random_selection(2, 300, 700, 2, C=C, block_m=block_m, block_n=block_n, device="cuda")
    check((2, 300, 700, 2 * G, 2, D), selection, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"differential": False}])
def test_grid_without_lists(D, options):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check((2, 300, 700, 16, 4, D), dtype=dtype, device="cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "block_m"), [(64, 1), (128, 16), (64, 64)])
def test_grid_packed(D, block_m):
    lengths = {"lengths_q": (150, 1, 64, 85), "lengths_k": (300, 70, 64, 90)}
    for kind, dtype in itertools.product(("selection", "window", "dense"), (torch.bfloat16, torch.float32)):
        options, selection = packed_case(kind, "cuda", block_m=block_m, **lengths)
        check((1, 300, 524, 16, 2, D), selection, dtype=dtype, device="cuda", **options)


@pytest.mark.gpu
def test_beyond_two_billion_elements(kernels):
    T, window = 300_000, 64
    q, k, v = (torch.randn(1, T, h, 128, dtype=torch.bfloat16, device="cuda").requires_grad_() for h in (64, 8, 8))
    lam = torch.randn(1, T, 32, dtype=torch.bfloat16, device="cuda").requires_grad_()
    o, lse = kernels(window=window)(q, k, v, lam)
    do = torch.zeros_like(o)
    do[:, -100:] = torch.randn_like(do[:, -100:])
    got = torch.autograd.grad(o, (q, k, v, lam), do)
    tail = [x[:, -n:].detach().double().requires_grad_() for x, n in ((q, 100), (k, 200), (v, 200), (lam, 100))]
    exact, exact_lse = reference_attention(*tail, window=window, return_lse=True)
    assert error(o[:, -100:], exact) < 1e-2
    assert error(lse[:, :, -100:], exact_lse) < 1e-5
    for x, y, n in zip(got, torch.autograd.grad(exact, tail, do[:, -100:].double()), (100, 200, 200, 100)):
        assert error(x[:, -n:], y) < 2e-2
        assert (x[:, :-n] == 0).all()
