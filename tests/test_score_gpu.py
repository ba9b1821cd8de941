"""The kernels that choose blocks, on a GPU: bfloat16, large sizes, CUDA graphs; repeatable, waiting for nothing."""

import itertools
import math

import pytest
import torch

from diffv2_sparse import BlockSelection, TopK, TopP, select_blocks
from diffv2_sparse.selectors import block_summaries
from tests.choices import assert_same_lists, check, exact_scores

pytest.importorskip("triton")
from diffv2_sparse.kernels import choose, pieces

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poison():
    """Fills what `torch.empty` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


BLOCKS = ((1, 64), (3, 16), (16, 64), (64, 64), (128, 128), (128, 256))
GRID = [  # every D with every block, the others in turn
    (D, blocks, dtype, G, mode, row_queries)
    for (D, blocks), dtype, G, mode, row_queries in zip(
        itertools.product((64, 96, 128, 256), BLOCKS),
        itertools.cycle((torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)),
        itertools.cycle((2, 8, 4, 6, 16)),
        itertools.cycle(("pair_mean", "per_class", "per_head", "pair_mean")),
        itertools.cycle(("all", "all", "first")),
    )
]


@pytest.mark.parametrize(("D", "blocks", "dtype", "G", "mode", "row_queries"), GRID)
def test_grid(D, blocks, dtype, G, mode, row_queries):
    block_m, block_n = blocks
    least = 3 + math.ceil((block_m - 1) / block_n)
    options = {"block_m": block_m, "block_n": block_n, "mode": mode, "row_queries": row_queries}
    for budget in (TopK(least + 12), TopP(0.7, least + 20)):
        both = (budget, TopK(least + 3)) if mode == "per_class" else budget
        check((2, 700, 6000, 2 * G, 2, D), dtype=dtype, device="cuda", budget=both, **options)


@pytest.mark.parametrize("budget", [TopK(64), TopP(0.9, 64)])
@pytest.mark.parametrize(("B", "T", "NC"), [(3, 1, 2048), (1, 1, 16384), (2, 16, 2048), (1, 5, 20000), (1, 200, 4096)])
def test_decoding_far_into_a_sequence(B, T, NC, budget):
    q = torch.randn(B, T, 64, 128, device="cuda").bfloat16() * 2
    summaries = torch.randn(B, NC, 8, 128, device="cuda").bfloat16()
    lengths = (NC * 64 + 63 - torch.arange(B, device="cuda") * 40_003).int()
    options = {"budget": budget, "block_m": 1, "block_n": 64}
    given = {"summaries": summaries, "key_tokens": lengths}
    got, expected = (select_blocks(q, backend=name, **given, **options) for name in ("triton", "torch"))
    scores = exact_scores(q, summaries, lengths, mode="pair_mean", block_m=1, block_n=64, row_queries="all")
    assert_same_lists(got, expected, scores, (budget,), 1e-4)


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 128), (64, 64), (1, 64)])
@pytest.mark.parametrize("mode", ["pair_mean", "per_class"])
def test_a_prompt(block_m, block_n, mode):
    budget = TopK(24) if mode == "pair_mean" else (TopK(24), TopP(0.8, 24))
    options = {"block_m": block_m, "block_n": block_n, "mode": mode, "budget": budget}
    check((1, 8192, 8192, 64, 8, 128), dtype=torch.bfloat16, device="cuda", **options)


@pytest.mark.parametrize("block_m", [1, 16, 128])
@pytest.mark.parametrize("row_queries", ["all", "first"])
def test_long_inputs_are_repeatable_and_chunks_do_not_matter(block_m, row_queries, monkeypatch):
    q = torch.randn(1, 4096, 64, 128, device="cuda").bfloat16()
    summaries = torch.randn(1, 1000, 8, 128, device="cuda").bfloat16()
    q[0, 1000, 3] = float("nan")
    options = {"block_m": block_m, "block_n": 64, "budget": TopP(0.9, 40), "row_queries": row_queries}
    call = {"summaries": summaries, "key_tokens": 64_000, "backend": "triton", **options}
    first, second = (select_blocks(q, **call) for _ in range(2))
    first.validate(4096, 64_000)
    monkeypatch.setattr(choose, "WORKSPACE_BYTES", 20 << 20)
    for other in (second, select_blocks(q, **call)):
        assert torch.equal(first.indices, other.indices)
        assert torch.equal(first.counts, other.counts)


@pytest.mark.parametrize("block_n", [3, 64, 100, 128, 256])
def test_summaries_of_many_keys(block_n):
    k = torch.randn(2, 5000, 8, 128).bfloat16()
    expected = block_summaries(k, block_n)
    assert torch.equal(block_summaries(k.cuda(), block_n).cpu(), expected)  # by the kernel
    assert torch.equal(block_summaries(k.cuda().requires_grad_(), block_n).cpu(), expected)  # by plain torch


def test_beyond_two_billion_elements():
    """The last rows of a long call choose as they do alone."""
    T = 128 * 2350  # times 64 heads of 128
    q, k = (torch.randn(1, T, h, 128, dtype=torch.bfloat16, device="cuda") for h in (64, 8))
    options = {"budget": TopK(32), "block_m": 128, "block_n": 128}
    whole = select_blocks(q, k, backend="triton", **options)
    summaries = block_summaries(k, 128)
    alone = select_blocks(q[:, -512:], summaries=summaries, key_tokens=T, backend="torch", **options)
    scoring = {"mode": "pair_mean", "block_m": 128, "block_n": 128, "row_queries": "all"}
    scores = exact_scores(q[:, -512:], summaries, torch.tensor([T], device="cuda"), **scoring)
    tail = BlockSelection(whole.indices[:, :, :, -4:].contiguous(), whole.counts[:, :, :, -4:].contiguous(), 128, 128)
    assert_same_lists(tail, alone, scores, (TopK(32),), 1e-4)


@pytest.mark.parametrize("mode", ["pair_mean", "per_class"])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 1), (1, 4), (1, 16)])
def test_sifted_lists_are_those_of_whole_rows(B, T, mode, monkeypatch):
    """The best of each stretch of 16384 candidates against all of them, in a graph as outside; and with equal scores.

    TopP adds scores up in another order, so that a list may end elsewhere where a sum is its mass but for a rounding.
    """
    lengths = torch.tensor([1 << 20, 700_000], dtype=torch.int32, device="cuda")[:B]
    q = torch.randn(B, T, 64, 128, device="cuda").bfloat16()
    summaries = torch.randn(B, 16384, 8, 128, device="cuda").bfloat16()
    budget = TopK(64) if mode == "pair_mean" else (TopK(48), TopP(0.02, 64))
    call = {"summaries": summaries, "key_tokens": lengths, "backend": "triton"}
    call |= {"mode": mode, "budget": budget, "block_m": 1, "block_n": 64}
    select_blocks(q, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks(q, **call)
    few = torch.randn(4, 128, device="cuda").bfloat16()[torch.randint(4, (B, 16384, 8), device="cuda")]
    for given, scale in ((summaries.clone(), 1), (summaries.clone(), 4), (few, 1)):
        summaries.copy_(given)
        q.mul_(scale)
        graph.replay()
        monkeypatch.setattr(pieces, "LONG", 1 << 30)
        whole = select_blocks(q, **call)
        monkeypatch.undo()
        assert torch.equal(captured.indices, whole.indices)
        assert torch.equal(captured.counts, whole.counts)


@pytest.mark.parametrize(("T", "block_m"), [(1, 1), (4, 1), (256, 16)])
def test_in_a_graph_with_lengths_that_change(T, block_m):
    q = torch.randn(3, T, 16, 64, device="cuda").bfloat16()
    summaries = torch.randn(3, 500, 4, 64, device="cuda").bfloat16()
    lengths = torch.tensor([32_000, 17, 600], dtype=torch.int32, device="cuda")
    options = {"mode": "per_class", "budget": (TopK(20), TopP(0.5, 30)), "block_m": block_m, "block_n": 64}
    call = {"summaries": summaries, "key_tokens": lengths, "backend": "triton", **options}
    select_blocks(q, **call)  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks(q, **call)
    for new in ([0, 5000, 31_999], [32_063, 64, 300], [64, 128, 20_000]):
        lengths.copy_(torch.tensor(new))
        q.copy_(torch.randn_like(q))
        graph.replay()
        eager = select_blocks(q, **call)
        assert torch.equal(captured.indices, eager.indices)
        assert torch.equal(captured.counts, eager.counts)
        expected = select_blocks(q, **{**call, "backend": "torch"})
        scoring = {"mode": "per_class", "block_m": block_m, "block_n": 64, "row_queries": "all"}
        assert_same_lists(eager, expected, exact_scores(q, summaries, lengths, **scoring), options["budget"], 1e-4)


@pytest.mark.parametrize("block_m", [1, 16])
def test_nothing_waits_for_the_device(block_m):
    q, k = torch.randn(1, 300, 16, 64, device="cuda").half(), torch.randn(1, 900, 4, 64, device="cuda").half()
    cu_q = torch.tensor([0, 100, 100, 300], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 300, 310, 900], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([890], device="cuda")
    options = {"budget": TopK(12), "block_m": block_m, "block_n": 16}
    calls = (
        {"k": k},
        {"k": k, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k},
        {"summaries": block_summaries(k, 16), "key_tokens": lengths},
    )
    for call in calls:
        select_blocks(q, **call, **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            select_blocks(q, **call, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_automatic_on_a_gpu(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the kernels were called")

    monkeypatch.setattr("diffv2_sparse.selectors.triton_select", refuse)
    q, k = torch.randn(1, 4, 4, 8, device="cuda"), torch.randn(1, 60, 2, 8, device="cuda")
    options = {"budget": TopK(7), "block_m": 1, "block_n": 4}
    with pytest.raises(AssertionError, match="were called"):
        select_blocks(q, k, **options)
    select_blocks(q, k, backend="torch", **options)
    select_blocks(q.double(), k.double(), **options)
