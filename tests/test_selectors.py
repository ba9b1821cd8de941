"""`select_blocks` against a brute-force selector that follows the rules of its docstring one row at a time."""

import math

import pytest
import torch

from diffv2_sparse import BlockSelection, TopK, TopP, select_blocks
from diffv2_sparse.selectors import block_mean, block_summaries


def brute_force(q, k, *, mode, budgets, block_m, block_n, sink_blocks, local_blocks, row_queries):
    """Lists `[b][c][h][row]` of block numbers, and the smallest score gap that any decision rested on."""
    B, T, HQ, D = q.shape
    S, H = k.shape[1:3]
    G, q, k = HQ // H, q.double(), k.double()
    classes = 2 if mode == "per_class" else 1
    lists, gap = [], math.inf
    for b, c, h in ((b, c, h) for b in range(B) for c in range(classes) for h in range(H)):
        lists.append([])
        for t0 in range(0, T, block_m):
            t1 = min(t0 + block_m, T)
            first, last = S - T + t0, S - T + t1 - 1
            candidates = [j for j in range(S) if (j + 1) * block_n <= first]
            means = [k[b, j * block_n : (j + 1) * block_n, h].mean(0) for j in candidates]
            score = dict.fromkeys(candidates, 0.0)
            tokens = range(t0, t0 + 1) if row_queries == "first" else range(t0, t1)
            for t in tokens:
                heads = [q[b, t, h * G + g] for g in range(G)]
                if mode == "pair_mean":
                    heads = [(heads[i] + heads[i + 1]) / 2 for i in range(0, G, 2)]
                elif mode == "per_class":
                    heads = heads[c::2]
                for one in heads:
                    weights = [math.exp(float(one @ m) / math.sqrt(D)) for m in means]
                    for j, w in zip(candidates, weights):
                        score[j] += w / sum(weights) / len(heads) / len(tokens)
            forced = {j for j in range(sink_blocks) if j <= last // block_n}
            forced |= set(range(first // block_n, last // block_n + 1))
            forced |= {j for j in range(first // block_n - local_blocks + 1, first // block_n) if j >= 0}
            chosen, budget = set(forced), budgets[c]
            mass = sum(score.get(j, 0.0) for j in forced)
            free = sorted((j for j in candidates if j not in forced), key=lambda j: (-score[j], j))
            for i, j in enumerate(free):
                if isinstance(budget, TopP):
                    gap = min(gap, abs(mass - budget.mass))
                    if mass >= budget.mass:
                        break
                if len(chosen) == budget.max_blocks:
                    gap = min(gap, score[free[i - 1]] - score[j]) if i else gap
                    break
                chosen.add(j)
                mass += score[j]
            lists[-1].append(sorted(chosen))
    return lists, gap


def assert_same(selection: BlockSelection, expected, B, C, H):
    flat = iter(expected)
    for b, c, h in ((b, c, h) for b in range(B) for c in range(C) for h in range(H)):
        for row, blocks in enumerate(next(flat)):
            at = b, c, h, row
            assert selection.indices[at][: selection.counts[at]].tolist() == blocks, at


CASES = [  # B, T, S, HQ, H, D, block_m, block_n, sink, local
    (2, 50, 50, 4, 2, 8, 1, 4, 1, 1),
    (1, 70, 101, 8, 2, 16, 8, 4, 1, 2),
    (2, 1, 77, 8, 2, 8, 1, 8, 2, 3),
    (1, 130, 259, 4, 1, 8, 128, 16, 0, 1),
    (1, 45, 90, 12, 2, 8, 5, 7, 1, 2),
    (1, 9, 9, 4, 2, 8, 16, 16, 1, 1),
]


@pytest.mark.parametrize("row_queries", ["all", "first"])
@pytest.mark.parametrize("mode", ["pair_mean", "per_class", "per_head"])
@pytest.mark.parametrize("case", CASES)
def test_against_brute_force(case, mode, row_queries, device):
    B, T, S, HQ, H, D, block_m, block_n, sink, local = case
    forced = sink + local + math.ceil((block_m - 1) / block_n)
    q, k = torch.randn(B, T, HQ, D) * 2, torch.randn(B, S, H, D) * 2
    for budgets in (
        (TopK(forced), TopK(forced + 3)),
        (TopK(forced + 2), TopP(0.6, forced + 4)),
        (TopP(0.8, forced + 5), TopP(0.3, forced)),
        (TopP(1.0, forced + 6), TopK(1000)),
    ):
        if mode != "per_class":
            budgets = budgets[:1]
        sizes = {"block_m": block_m, "block_n": block_n, "sink_blocks": sink, "local_blocks": local}
        expected, gap = brute_force(q, k, mode=mode, budgets=budgets, row_queries=row_queries, **sizes)
        assert gap > 1e-8, "an unlucky draw: the cut falls between equal scores"
        got = select_blocks(
            q.double().to(device),
            k.double().to(device),
            mode=mode,
            budget=budgets if len(budgets) == 2 else budgets[0],
            row_queries=row_queries,
            **sizes,
        )
        got.validate(T, S)
        assert got.indices.shape[-1] == max(b.max_blocks for b in budgets)
        assert_same(got, expected, B, len(budgets), H)


def test_float32_lists_are_those_of_float64(device):
    q, k = torch.randn(1, 300, 8, 32, device=device), torch.randn(1, 300, 2, 32, device=device)
    options = {"budget": TopK(8), "block_m": 1, "block_n": 8}
    assert torch.equal(select_blocks(q, k, **options).indices, select_blocks(q.double(), k.double(), **options).indices)


@pytest.mark.parametrize("mode", ["per_class", "per_head"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_scores_are_summed_in_float32(dtype, mode, device):
    """Rounded summaries are all that 16-bit keys cost: with those, float64 chooses the same lists."""
    q, k = (torch.randn(1, 200, heads, 32, device=device).to(dtype) for heads in (8, 2))
    options = {"mode": mode, "budget": TopK(6), "block_m": 1, "block_n": 8}
    summaries = block_summaries(k, 8)
    wide = select_blocks(q.double(), summaries=summaries.double(), key_tokens=200, **options)
    assert torch.equal(select_blocks(q, k, **options).indices, wide.indices)


def test_sequences_shorter_than_the_queries_get_empty_lists(device):
    lengths = torch.tensor([16, 3, 0], dtype=torch.int32, device=device)
    q, summaries = torch.randn(3, 8, 4, 8, device=device), torch.randn(3, 4, 2, 8, device=device)
    got = select_blocks(q, summaries=summaries, key_tokens=lengths, budget=TopK(4), block_m=1, block_n=4)
    assert (got.counts[1, 0, 0] > 0).tolist() == [False] * 5 + [True] * 3
    assert not got.counts[2].any()
    assert (got.indices >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_go_to_the_lower_block(dtype, device):
    """All keys equal: every free candidate has the same score, so the lowest win."""
    q, k = torch.randn(1, 4, 4, 8, device=device, dtype=dtype), torch.ones(1, 64, 2, 8, device=device, dtype=dtype)
    got = select_blocks(q, k, budget=TopK(7), block_m=1, block_n=4, sink_blocks=1, local_blocks=2)
    assert got.indices[0, 0, 0, -1].tolist() == [0, 1, 2, 3, 4, 14, 15]
    got = select_blocks(q, k, budget=TopP(0.5, 16), block_m=1, block_n=4, sink_blocks=1, local_blocks=2)
    assert got.indices[0, 0, 0, -1, : got.counts[0, 0, 0, -1]].tolist() == [0, 1, 2, 3, 4, 5, 6, 14, 15]


def test_chunks_do_not_change_the_lists(monkeypatch):
    import diffv2_sparse.selectors as selectors

    q, k = torch.randn(2, 97, 8, 8), torch.randn(2, 211, 2, 8)
    options = {"mode": "per_class", "budget": (TopK(9), TopP(0.7, 12)), "block_m": 4, "block_n": 8}
    whole = select_blocks(q, k, **options)
    monkeypatch.setattr(selectors, "_SCORE_BYTES", {"cpu": 1})
    chunked = select_blocks(q, k, **options)
    assert torch.equal(whole.counts, chunked.counts)
    assert torch.equal(whole.indices, chunked.indices)


def test_packed_equals_each_alone():
    lengths_q, lengths_k = [13, 1, 40], [29, 64, 40]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    q, k = torch.randn(1, sum(lengths_q), 4, 8), torch.randn(1, sum(lengths_k), 2, 8)
    options = {"budget": TopK(6), "block_m": 4, "block_n": 8}
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    whole = select_blocks(q, k, **options, **packed)
    given = select_blocks(q, summaries=block_summaries(k, 8, cu_k), **options, **packed)
    alone = [select_blocks(a, b, **options) for a, b in zip(q.split(lengths_q, 1), k.split(lengths_k, 1))]
    for one in (whole, given):
        assert torch.equal(one.indices, torch.cat([a.indices for a in alone], 3))
        assert torch.equal(one.counts, torch.cat([a.counts for a in alone], 3))
        one.validate(54, 133, **packed)


def test_given_summaries_and_lengths_on_the_device(device):
    lengths = torch.tensor([100, 37, 64], dtype=torch.int32, device=device)
    q, k = torch.randn(3, 3, 8, 8, device=device), torch.randn(3, 100, 2, 8, device=device)
    options = {"mode": "per_class", "budget": TopK(6), "block_m": 1, "block_n": 8}
    got = select_blocks(q, summaries=block_summaries(k, 8), key_tokens=lengths, **options)
    for b, S in enumerate(lengths.tolist()):
        one = select_blocks(q[b : b + 1], k[b : b + 1, :S], **options)
        assert torch.equal(got.counts[b : b + 1], one.counts)
        assert torch.equal(got.indices[b : b + 1], one.indices)


@pytest.mark.parametrize("mode", ["pair_mean", "per_class", "per_head"])
def test_first_is_strictly_causal_and_all_is_not(mode):
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 200, 2, 8)
    later = q.clone()
    later[:, 1::16] += 5  # the second token of each row of 16
    options = {"mode": mode, "budget": TopK(6), "block_m": 16, "block_n": 8}
    first = [select_blocks(x, k, row_queries="first", **options).indices for x in (q, later)]
    both = [select_blocks(x, k, row_queries="all", **options).indices for x in (q, later)]
    assert torch.equal(*first)
    assert not torch.equal(*both)


def test_summaries_do_not_depend_on_chunks_or_layout():
    for block_n in (1, 3, 16, 20):
        k = torch.randn(2, 10 * block_n + block_n // 2, 3, 8)
        whole = block_summaries(k, block_n)
        assert whole.shape == (2, 10, 3, 8)
        pages = k[:, : 10 * block_n].unflatten(1, (10, block_n)).permute(0, 3, 1, 2, 4).contiguous()
        assert torch.equal(block_mean(pages, 3).permute(0, 2, 1, 3), whole)
        torch.testing.assert_close(whole, k[:, : 10 * block_n].unflatten(1, (10, block_n)).double().mean(2).float())


def test_nan_in_q_gives_a_valid_list(device):
    q, k = torch.randn(1, 16, 4, 8, device=device), torch.randn(1, 160, 2, 8, device=device)
    q[:, 3] = float("nan")
    select_blocks(q, k, budget=TopK(6), block_m=4, block_n=8).validate(16, 160)


GOOD = {"budget": TopK(6), "block_m": 4, "block_n": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": TopK(3)}, "budget: expected at least the 4 forced blocks"),
        ({"budget": (TopK(6), TopK(6))}, "budget: expected a pair"),
        ({"mode": "per_class", "budget": (TopK(6), TopP(0.5, 3))}, "budget: expected at least"),
        ({"budget": 6}, "budget: expected TopK or TopP"),
        ({"mode": "mean"}, "mode: expected"),
        ({"row_queries": "last"}, "row_queries: expected"),
        ({"block_m": 0}, "block_m: expected an int"),
        ({"local_blocks": 0}, "local_blocks: expected an int"),
        ({"sink_blocks": -1}, "sink_blocks: expected an int"),
        ({"summaries": torch.randn(1, 5, 2, 8)}, "exactly one"),
        ({"k": None}, "exactly one"),
        ({"k": torch.randn(1, 20, 2, 8)}, "at most as many queries as keys"),
        ({"k": torch.randn(1, 40, 3, 8)}, "multiple of the 3 KV heads"),
        ({"k": torch.randn(1, 40, 4, 8)}, "whole pairs"),
        ({"k": torch.randn(1, 40, 2, 8).double()}, "k: expected torch.float32"),
        ({"k": torch.randn(2, 40, 2, 8)}, "k: expected"),
        ({"k": None, "summaries": torch.randn(1, 5, 2, 8)}, "key_tokens: expected the number"),
        ({"k": None, "summaries": torch.randn(1, 4, 2, 8), "key_tokens": 40}, "summaries: expected at least 5"),
        ({"k": None, "summaries": torch.randn(1, 4, 2, 8), "key_tokens": torch.tensor([40])}, "at least 5 for 40 keys"),
        ({"k": None, "summaries": torch.randn(1, 5, 2, 8), "key_tokens": 40.0}, "key_tokens: expected an int"),
        (
            {
                "k": None,
                "summaries": torch.randn(1, 4, 2, 8),
                "cu_seqlens_q": torch.tensor([0, 16, 32]).int(),
                "cu_seqlens_k": torch.tensor([0, 20, 44]).int(),
            },
            "at least 5 for the packed keys",
        ),
        ({"q": torch.randn(0, 32, 4, 8), "k": torch.randn(0, 40, 2, 8)}, "q: expected no empty dimension"),
        ({"block_m": True}, "block_m: expected an int"),
        ({"cu_seqlens_q": torch.tensor([0, 32], dtype=torch.int32)}, "expected both or neither"),
        (
            {"cu_seqlens_q": torch.tensor([0, 9, 30]).int(), "cu_seqlens_k": torch.tensor([0, 9, 40]).int()},
            "cu_seqlens_q: expected bounds that rise from 0 to 32",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 20, 32]).int(), "cu_seqlens_k": torch.tensor([0, 9, 40]).int()},
            "more queries than keys",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"q": torch.randn(1, 32, 4, 8), "k": torch.randn(1, 40, 2, 8), **GOOD} | change
    with pytest.raises(ValueError, match=message):
        select_blocks(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_budget_values():
    for bad in (
        lambda: TopK(0),
        lambda: TopK(1.5),
        lambda: TopK(True),
        lambda: TopP("x", 4),
        lambda: TopP(0.0, 4),
        lambda: TopP(1.1, 4),
        lambda: TopP(0.5, 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            bad()
