"""What chosen lists are held against: the torch path's lists, and exact scores where the two differ by a rounding."""

import torch

from diffv2_sparse import TopP, select_blocks


def exact_scores(q, summaries, lengths, *, mode, block_m, block_n, row_queries, scale=None):
    """float64 `[B, C, H, NM, NC]` of the operands as they are rounded, 0 where a block is no candidate."""
    B, T, HQ, D = q.shape
    NC, H = summaries.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    heads = q.unflatten(2, (H, -1))  # [B, T, H, G, D]
    if mode == "pair_mean":
        parts = [((heads[..., 0::2, :].float() + heads[..., 1::2, :].float()) / 2).to(q.dtype)]
    else:
        parts = [heads] if mode == "per_head" else [heads[..., 0::2, :], heads[..., 1::2, :]]
    logits = torch.stack([torch.einsum("bthgd,bnhd->bhtgn", x.double(), summaries.double()) for x in parts], 1) * scale
    row = torch.arange(T, device=q.device) // block_m
    n = torch.stack([(length - T + row * block_m).clamp(min=0) // block_n for length in lengths])  # [B, T]
    candidate = torch.arange(NC, device=q.device) < n[:, None, None, :, None, None]
    weights = torch.softmax(logits.masked_fill(~candidate, -torch.inf), -1).nan_to_num(0.0).mean(4)  # [B, C, H, T, NC]
    tokens = [weights[:, :, :, t : t + block_m] for t in range(0, T, block_m)]
    return torch.stack([x[:, :, :, 0] if row_queries == "first" else x.mean(3) for x in tokens], 3)


def assert_same_lists(got, expected, scores, budgets, tolerance):
    """Lists differ only where scores do by no more than `tolerance`, relative; and by blocks that TopP still takes for
    a mass that is short of its budget by no more than that.
    """
    assert got.indices.dtype == got.counts.dtype == torch.int32
    NM, NB = expected.indices.shape[3:]
    assert not got.counts[:, :, :, NM:].any(), "rows behind the last"
    assert got.indices.shape[4] == NB
    different = (got.indices[:, :, :, :NM] != expected.indices).any(-1) | (got.counts[:, :, :, :NM] != expected.counts)
    for at in different.nonzero().tolist():
        lists = [x.indices[(*at, slice(x.counts[tuple(at)]))].tolist() for x in (got, expected)]
        less, more = sorted(map(set, lists), key=len)
        own = scores[tuple(at)].tolist()
        worth = {j: own[j] for j in less | more if j < len(own)}
        said = f"{at}: {lists[0]}, expected {lists[1]}, scores {worth}"
        assert lists[0] == sorted(set(lists[0])), said
        assert less ^ more <= worth.keys(), said  # the blocks that the row overlaps have no score
        assert len(less ^ more) > 0, said  # else something stands behind the list
        apart = [worth[j] for j in less ^ more]
        if len(less) == len(more):
            assert max(apart) - min(apart) <= tolerance * max(apart) + 1e-30, said
        else:
            assert isinstance(budgets[at[1]], TopP), said
            assert less < more, said
            assert sum(worth.get(j, 0.0) for j in less) >= budgets[at[1]].mass - tolerance, said
    assert different.sum() <= 1 + different.numel() // 50, f"{different.float().mean():.0%} differ: more than roundings"


def tolerance_of(dtype):
    return 1e-5 if dtype == torch.float32 else 1e-4


def check(sizes, *, dtype=torch.float32, device="cpu", budget, spread=2.0, **options):
    """`spread` is that of the logits, roughly."""
    B, T, S, HQ, H, D = sizes
    options = {"mode": "pair_mean", "row_queries": "all", **options}
    q = (torch.randn(B, T, HQ, D, device=device) * spread).to(dtype)
    summaries = torch.randn(B, S // options["block_n"], H, D, device=device).to(dtype)
    call = {"summaries": summaries, "key_tokens": S, "budget": budget, **options}
    got, expected = (select_blocks(q, backend=name, **call) for name in ("triton", "torch"))
    got.validate(T, S)
    scoring = {name: options[name] for name in ("mode", "block_m", "block_n", "row_queries")}
    scores = exact_scores(q, summaries, torch.full((B,), S, device=device), **scoring)
    assert_same_lists(got, expected, scores, budget if isinstance(budget, tuple) else (budget,), tolerance_of(dtype))
