"""The kernels that choose blocks against the torch path: the same lists, but where scores differ by a rounding.

Without a GPU they run in Triton's interpreter, in float32 and float16; `test_score_gpu.py` has more for a GPU. Outputs
are poisoned: memory that a kernel allocates starts as NaN.
"""

import dataclasses
import math

import pytest
import torch

from diffv2_sparse import BlockSelection, TopK, TopP, diff_attention, select_blocks
from diffv2_sparse.selection import query_rows
from diffv2_sparse.selectors import block_summaries
from tests.choices import assert_same_lists, check, exact_scores

pytest.importorskip("triton")
from diffv2_sparse import ops
from diffv2_sparse.kernels import choose, pieces, ranking


@pytest.fixture(autouse=True)
def _poison():
    """Fills what `torch.empty` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["full", "few"])
def form(request, monkeypatch):
    """Tiles that walk all their candidates, or pieces of them, of several tiles and looked at one by one."""
    monkeypatch.setattr(choose, "is_few", lambda *_: request.param == "few")
    monkeypatch.setattr(pieces, "MANY_PIECES", 2)
    monkeypatch.setattr(pieces, "PARTIALS", 16)


KINDS = [("TopK", "few"), ("TopP", "full")]
TOP_K, TOP_P, PAIR = TopK(7), TopP(0.6, 9), (TopK(9), TopP(0.5, 7))
CELLS = [  # B, T, S, HQ, H, D, options
    (1, 5, 50, 4, 1, 16, {"block_m": 1, "block_n": 3}),
    (1, 2, 700, 4, 1, 16, {"block_m": 1, "block_n": 3}),  # more candidates than a tile, or a piece, has
    (2, 2, 61, 12, 1, 24, {"block_m": 1, "block_n": 4, "mode": "per_class"}),  # three pairs a group
    (1, 13, 40, 3, 1, 8, {"block_m": 3, "block_n": 1, "mode": "per_head"}),  # an odd group, blocks of one key
    (1, 10, 130, 4, 2, 16, {"block_m": 3, "block_n": 16, "row_queries": "first"}),
    (1, 70, 200, 8, 1, 16, {"block_m": 16, "block_n": 5}),  # rows shorter than a tile, several in one
    (1, 70, 170, 4, 1, 40, {"block_m": 16, "block_n": 8, "mode": "per_head", "row_queries": "first"}),
    (1, 100, 300, 16, 2, 16, {"block_m": 64, "block_n": 20}),  # rows longer than a tile, and the last one short
    (2, 64, 64, 4, 1, 16, {"block_m": 64, "block_n": 16, "mode": "per_class"}),  # no candidates at all
    (1, 40, 500, 4, 1, 16, {"block_m": 1000, "block_n": 64, "local_blocks": 1}),  # one row longer than the call
]


@pytest.mark.parametrize(("cell", "kind", "form"), [(c, k, f) for c in CELLS for k, f in KINDS], indirect=["form"])
def test_same_lists(cell, kind, form, device):
    *sizes, options = cell
    forced = 3 + math.ceil((options["block_m"] - 1) / options["block_n"])
    budget = TopK(forced + 4) if kind == "TopK" else TopP(0.6, forced + 6)
    if options.get("mode") == "per_class":
        budget = (budget, TopP(0.4, forced + 3) if kind == "TopK" else TopK(forced + 1))
    check(sizes, budget=budget, device=device, **options)


@pytest.mark.parametrize("mode", ["pair_mean", "per_class", "per_head"])
@pytest.mark.parametrize(("T", "block_m", "block_n"), [(6, 1, 8), (40, 16, 8)])
def test_half_precision(T, block_m, block_n, mode, form, device):
    check(
        (1, T, 300, 4, 1, 32), dtype=torch.float16, mode=mode, budget=TOP_P, device=device, block_m=block_m, block_n=8
    )


@pytest.mark.parametrize(
    "budget",
    [
        TopK(3),  # the forced blocks alone
        TopK(4),
        TopK(1000),  # more than there are
        TopP(1.0, 60),
        TopP(1e-9, 60),  # the forced ones are enough
        TopP(0.999, 8),  # cut by its number
    ],
)
def test_budgets(budget, device):
    for sink, local in ((0, 3), (2, 1)):
        sizes = (1, 1, 190, 4, 2, 16)
        check(sizes, budget=budget, block_m=1, block_n=4, sink_blocks=sink, local_blocks=local, device=device)


@pytest.mark.parametrize("spread", [0.0, 0.01, 30.0])
def test_flat_and_steep_scores(spread, device):
    """All equal (ties go to the lower index), nearly equal, and with all the mass in one block and zeros elsewhere."""
    for budget in (TopK(8), TopP(0.3, 20)):
        check((1, 1, 300, 4, 1, 16), budget=budget, block_m=1, block_n=4, spread=spread, device=device)


@pytest.mark.parametrize("budget", [TopK(7), TopP(0.5, 16)])
def test_ties_go_to_the_lower_block(budget, monkeypatch, device):
    q, k = torch.randn(1, 1, 4, 8, device=device), torch.ones(1, 64, 2, 8, device=device)
    for registers in (16384, 4):
        monkeypatch.setattr(ranking, "IN_REGISTERS", registers)
        got = select_blocks(q, k, budget=budget, block_m=1, block_n=4, backend="triton")
        blocks = [0, 1, 2, 3, 4, 14, 15] if isinstance(budget, TopK) else [0, 1, 2, 3, 4, 5, 6, 14, 15]
        assert got.indices[0, 0, 0, -1, : len(blocks)].tolist() == blocks
        assert got.counts[0, 0, 0, -1] == len(blocks)
        k[:, [20, 36]] = 2.0  # two blocks are better, then
        call = {"budget": budget, "block_m": 1, "block_n": 4}
        got, expected = (select_blocks(q.abs(), k, backend=name, **call) for name in ("triton", "torch"))
        k[:, [20, 36]] = 1.0
        assert {5, 9} < set(got.indices.flatten().tolist())
        assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("budget", [TOP_K, TOP_P])
def test_rows_that_do_not_fit_in_registers(budget, monkeypatch, device):
    monkeypatch.setattr(ranking, "IN_REGISTERS", 16)
    check((1, 1, 400, 4, 1, 16), budget=budget, block_m=1, block_n=4, device=device)
    monkeypatch.setattr(choose, "is_few", lambda *_: False)
    budget = dataclasses.replace(budget, **{list(vars(budget))[-1]: 30})
    check((1, 90, 400, 8, 1, 16), budget=budget, block_m=80, block_n=5, device=device)  # rows of several parts


LONG_ROWS = [  # B, T, S, HQ, H, budget, options
    (1, 1, 700, 4, 2, TopK(8), {"block_m": 1}),
    (2, 1, 1000, 2, 1, TopP(0.1, 8), {"block_m": 1, "local_blocks": 3}),
    (1, 3, 600, 6, 1, TopK(7), {"block_m": 1, "sink_blocks": 0, "local_blocks": 1}),  # three pairs a group
    (1, 7, 700, 3, 1, TopP(0.9, 8), {"block_m": 3, "mode": "per_head", "sink_blocks": 2}),
    (1, 40, 1200, 16, 1, TopK(13), {"block_m": 40}),  # a row of several parts
    (1, 1, 800, 4, 1, (TopK(7), TopP(0.1, 8)), {"block_m": 1, "mode": "per_class", "sink_blocks": 5}),
]


@pytest.fixture
def at_once_and_sifted(monkeypatch):
    """Both ways of ranking the rows of a call: all their scores at once, or the best of each stretch."""

    def both(q, summaries, lengths, budget, **options):
        monkeypatch.setattr(choose, "is_few", lambda *_: True)
        monkeypatch.setattr(pieces, "MANY_PIECES", 2)
        call = {"summaries": summaries, "key_tokens": lengths, "budget": budget, "block_n": 4, **options}
        lists, took = [], []
        rank = choose.rank
        for longest in (1 << 30, 0):
            monkeypatch.setattr(pieces, "LONG", longest)
            monkeypatch.setattr(choose, "rank", lambda scores, best, *x: (took.append(best), rank(scores, best, *x)))
            lists.append(select_blocks(q, backend="triton", **call))
            monkeypatch.setattr(choose, "rank", rank)
        assert took[0] is None
        assert took[-1].scores.shape[1] >= 4, "stretches"
        assert torch.equal(lists[0].indices, lists[1].indices)
        assert torch.equal(lists[0].counts, lists[1].counts)
        return lists[1]

    return both


@pytest.mark.parametrize("cell", LONG_ROWS)
@pytest.mark.parametrize(("few", "spread"), [(False, 2.0), (True, 0.3)])
def test_sifted_lists_are_those_of_whole_rows(cell, few, spread, at_once_and_sifted, device):
    """With few different summaries, too, so that many scores are equal."""
    B, T, S, HQ, H, budget, options = cell
    q = torch.randn(B, T, HQ, 8, device=device) * spread
    summaries = torch.randn(B, S // 4, H, 8, device=device)
    if few:
        summaries = torch.eye(8, device=device)[torch.randint(3, summaries.shape[:3], device=device)]
    at_once_and_sifted(q, summaries, S, budget, **options).validate(T, S)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("budget", [(TopK(7), TopP(0.1, 8)), (TopP(0.5, 8), TopK(8))])
def test_sifted_lists_of_any_length(budget, at_once_and_sifted, device):
    """Lengths at the edges of stretches of 32, and where forced blocks begin in another one; no numbers in q."""
    lengths = torch.tensor([520, 21, 0, 4 * 33, 4 * 64 + 1, 4 * 66, 500], device=device)
    q, summaries = torch.randn(7, 1, 4, 8, device=device), torch.randn(7, 130, 1, 8, device=device)
    q[6, 0, 2], q[0, 0, 1] = float("nan"), float("inf")
    options = {"block_m": 1, "mode": "per_class", "sink_blocks": 2, "local_blocks": 3}
    got = at_once_and_sifted(q, summaries, lengths, budget, **options)
    call = {"summaries": summaries[1:6], "key_tokens": lengths[1:6], "budget": budget, "block_n": 4, **options}
    assert torch.equal(got.indices[1:6], select_blocks(q[1:6], backend="torch", **call).indices)


@pytest.mark.parametrize("budget", [TOP_K, TopP(0.1, 8)])
def test_sifted_packed_rows(budget, at_once_and_sifted, device):
    cu_q, cu_k = (torch.tensor(x, device=device).int() for x in ([0, 1, 1, 4], [0, 300, 310, 900]))
    q, k = torch.randn(1, 4, 4, 8, device=device), torch.randn(1, 900, 1, 8, device=device)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "block_m": 1}
    got = at_once_and_sifted(q, block_summaries(k, 4, cu_k), None, budget, **packed)
    expected = select_blocks(q, k, budget=budget, block_n=4, backend="torch", **packed)
    assert torch.equal(got.indices[:, :, :, :4], expected.indices)


def test_chunks_do_not_change_the_lists(monkeypatch, form, device):
    options = {"mode": "per_class", "budget": (TopK(9), TopP(0.7, 12)), "block_m": 4, "block_n": 8, "backend": "triton"}
    q, given = torch.randn(2, 8, 4, 8, device=device), {"summaries": torch.randn(2, 18, 1, 8), "key_tokens": 151}
    given["summaries"] = given["summaries"].to(device)
    whole = select_blocks(q, **given, **options)
    monkeypatch.setattr(choose, "WORKSPACE_BYTES", 1)
    chunked = select_blocks(q, **given, **options)
    assert torch.equal(whole.indices, chunked.indices)
    assert torch.equal(whole.counts, chunked.counts)


@pytest.mark.parametrize("heads", [140, 300])
def test_more_heads_than_a_tile(heads, form, device):
    check((1, 4, 90, heads, 1, 16), budget=TOP_K, block_m=4, block_n=4, device=device)


@pytest.mark.parametrize("scale", [0.9, -0.3, 0.0])
def test_scale(scale, device):
    q, summaries = torch.randn(1, 2, 4, 16, device=device), torch.randn(1, 25, 1, 16, device=device)
    options = {"key_tokens": 100, "budget": TOP_P, "block_m": 1, "block_n": 4, "scale": scale}
    got, expected = (select_blocks(q, summaries=summaries, backend=name, **options) for name in ("triton", "torch"))
    assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("budget", [TOP_K, PAIR])
def test_lengths_on_the_device(budget, form, device):
    """Sequences shorter than their queries, too, and one without any keys; int64 lengths, and room for more blocks."""
    lengths = torch.tensor([150, 37, 3, 0, 96], device=device)
    q, summaries = torch.randn(5, 4, 4, 16, device=device), torch.randn(5, 40, 1, 16, device=device)
    options = {"mode": "per_class" if budget is PAIR else "per_head", "budget": budget, "block_m": 2, "block_n": 4}
    given = {"summaries": summaries, "key_tokens": lengths}
    got, expected = (select_blocks(q, backend=name, **given, **options) for name in ("triton", "torch"))
    scoring = {name: options[name] for name in ("mode", "block_m", "block_n")}
    scores = exact_scores(q, summaries, lengths, row_queries="all", **scoring)
    assert_same_lists(got, expected, scores, budget if budget is PAIR else (budget,), 1e-5)
    assert not got.counts[3].any()


@pytest.mark.parametrize(
    ("block_m", "block_n", "given", "form"),
    [(1, 8, True, "few"), (1, 8, False, "full"), (3, 4, True, "few"), (3, 4, True, "full"), (16, 8, False, "few")],
    indirect=["form"],
)
def test_packed(block_m, block_n, given, form, device):
    """No row and no summary of one sequence reaches into another, and nothing is read on the host."""
    lengths_q, lengths_k = (5, 0, 1, 8, 3), (40, 30, 70, 8, 131)
    cu_q, cu_k = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in (lengths_q, lengths_k))
    q = torch.randn(1, sum(lengths_q), 4, 16, device=device) * 2
    k = torch.randn(1, sum(lengths_k), 1, 16, device=device) * 2
    options = {"budget": TopK(9), "block_m": block_m, "block_n": block_n}
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    keys = {"summaries": block_summaries(k, block_n, cu_k)} if given else {"k": k}
    got = select_blocks(q, backend="triton", **keys, **options, **packed)
    got.validate(sum(lengths_q), sum(lengths_k), **packed)
    rows = len(query_rows(1, sum(lengths_q), 0, block_m, **packed))
    assert rows <= got.indices.shape[3] <= sum(lengths_q) // block_m + len(lengths_q)
    row = 0
    for a, b in zip(q.split(lengths_q, 1), k.split(lengths_k, 1)):
        if a.shape[1]:
            alone = select_blocks(a, b, backend="torch", **options)
            own = slice(row, row + alone.indices.shape[3])
            assert torch.equal(got.indices[:, :, :, own], alone.indices)
            assert torch.equal(got.counts[:, :, :, own], alone.counts)
            row = own.stop
    assert row == rows
    assert not got.counts[:, :, :, rows:].any()
    expected = select_blocks(q, k, backend="torch", **options, **packed)
    torch.testing.assert_close(
        got.density(sum(lengths_q), sum(lengths_k), **packed),
        expected.density(sum(lengths_q), sum(lengths_k), **packed),
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_lists_behind_packed_rows_change_nothing(backend, device):
    cu_q, cu_k = (torch.tensor(x, device=device).int() for x in ([0, 8, 8, 16], [0, 30, 40, 60]))
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    q, k, v = (torch.randn(1, n, h, 16, device=device).requires_grad_() for n, h in ((16, 4), (60, 2), (60, 2)))
    chosen = select_blocks(q, k, budget=TopK(5), block_m=4, block_n=4, backend="triton", **packed)
    assert chosen.indices.shape[3] == 6
    exact = BlockSelection(chosen.indices[:, :, :, :4].contiguous(), chosen.counts[:, :, :, :4].contiguous(), 4, 4)
    lam_logit, results = torch.randn(1, 16, 2, device=device), []
    for selection in (chosen, exact):
        o = diff_attention(q, k, v, lam_logit, selection, backend=backend, **packed)
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_any_strides(device):
    q, summaries = torch.randn(1, 1, 4, 16, device=device), torch.randn(1, 30, 2, 16, device=device)
    wide = torch.randn(1, 37, 3, 20, device=device)
    wide[:, :30, :2, :16] = summaries
    options = {"key_tokens": 120, "budget": TOP_K, "block_m": 4, "block_n": 4}
    expected = select_blocks(q.repeat(1, 4, 1, 1), summaries=summaries, backend="torch", **options)
    for strided in (wide[:, :30, :2, :16], summaries.mT.contiguous().mT):
        got = select_blocks(q.expand(-1, 4, -1, -1), summaries=strided, backend="triton", **options)
        assert torch.equal(got.indices, expected.indices)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("budget", "form"), [(TOP_K, "full"), (TOP_P, "few")], indirect=["form"])
def test_no_number_gives_a_valid_list_and_stays_where_it_was(bad, budget, form, device):
    q, summaries = torch.randn(1, 6, 2, 8, device=device), torch.randn(1, 40, 1, 8, device=device)
    options = {"key_tokens": 160, "budget": budget, "block_m": 2, "block_n": 4}
    clean = select_blocks(q, summaries=summaries, backend="torch", **options)
    q[:, 3, 1] = bad
    got = select_blocks(q, summaries=summaries, backend="triton", **options)
    got.validate(6, 160)
    assert torch.equal(got.indices[0, 0, 0, ::2], clean.indices[0, 0, 0, ::2])
    if isinstance(budget, TopK):  # no score is as good as 0, on both backends
        assert torch.equal(got.indices, select_blocks(q, summaries=summaries, backend="torch", **options).indices)


def test_same_inputs_same_bits(device):
    q, k = torch.randn(1, 16, 4, 16, device=device), torch.randn(1, 50, 1, 16, device=device)
    options = {"mode": "per_class", "budget": PAIR, "block_m": 8, "block_n": 4, "backend": "triton"}
    first, second = (select_blocks(q, k, **options) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.counts, second.counts)


@pytest.mark.parametrize("block_n", [1, 7, 20, 64, 300])
def test_summaries_have_the_bits_of_the_tree(block_n, device):
    """Those of plain torch on a CPU."""
    for dtype in (torch.float32, torch.float16):
        k = torch.randn(1, 2 * block_n + block_n // 2 + 2, 3, 24).to(dtype)
        strided = torch.nn.functional.pad(k.to(device), (0, 4, 0, 1))[:, :, :3, :24]
        assert torch.equal(ops.triton_summaries(strided, block_n, None).cpu(), block_summaries(k, block_n))
        cu = torch.tensor([0, 1, 1, k.shape[1] - 1, k.shape[1]]).int()
        packed = ops.triton_summaries(k.to(device), block_n, cu.to(device)).cpu()
        expected = block_summaries(k, block_n, cu)
        assert torch.equal(packed[:, : expected.shape[1]], expected)
        assert not packed[:, expected.shape[1] :].any()


def test_operators(device):
    q, k = torch.randn(1, 2, 2, 16, device=device), torch.randn(1, 24, 1, 16, device=device)
    cu = torch.tensor([0, 1, 2], device=device).int(), torch.tensor([0, 9, 24], device=device).int()
    torch.library.opcheck(ops.triton_summaries, (k, 8, cu[1]))
    summaries, lengths = block_summaries(k, 8), torch.tensor([24], device=device)
    sizes = 2, 8, 1, 1, False, 0.2
    torch.library.opcheck(
        ops._select, (q, summaries, lengths, None, None, 0, "per_class", [5, 6], [math.inf, 0.9], *sizes)
    )
    torch.library.opcheck(ops._select, (q, summaries, None, *cu, 0, "per_head", [5], [0.5], *sizes))


def test_compiles_whole(device):
    def choose(q, k):
        selection = select_blocks(q, k, budget=TOP_P, block_m=2, block_n=4, backend="triton")
        return selection.indices, selection.counts

    q, k = torch.randn(1, 3, 2, 16, device=device), torch.randn(1, 40, 1, 16, device=device)
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(choose(q, k), compiled(q, k)))


def test_backends(monkeypatch):
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 60, 2, 8)
    options = {"budget": TOP_K, "block_m": 1, "block_n": 4}

    def refuse(*_, **__):
        raise AssertionError("the kernels were called")

    monkeypatch.setattr("diffv2_sparse.selectors.triton_select", refuse)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    select_blocks(q, k, **options)  # on a CPU "auto" is "torch", even where the interpreter would run the kernels
    select_blocks(q, k, backend="torch", **options)
    with pytest.raises(AssertionError, match="were called"):
        select_blocks(q, k, backend="triton", **options)
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, torch, got 'cuda'"):
        select_blocks(q, k, backend="cuda", **options)
    with pytest.raises(ValueError, match=r'"triton": it computes in .* not in torch.float64; "torch" would do'):
        select_blocks(q.double(), k.double(), backend="triton", **options)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='"triton": it needs tensors on a GPU, not on cpu; "torch" would do'):
        select_blocks(q, k, backend="triton", **options)
