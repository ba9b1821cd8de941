"""The oracle against arithmetic written out token by token."""

import math

import pytest
import torch

from diffv2_sparse.reference import reference_attention
from tests.oracle import qkv, random_selection


def by_hand(q, k, v, lam_logit, visible):
    """One number at a time; `visible(b, head, t)` lists key positions."""
    B, T, HQ, D = q.shape
    G = HQ // k.shape[2]
    heads = torch.zeros(B, T, HQ, D, dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            for h in range(HQ):
                keys = visible(b, h, t)
                if not keys:
                    continue
                weights = [math.exp(float(q[b, t, h] @ k[b, s, h // G]) / math.sqrt(D)) for s in keys]
                for w, s in zip(weights, keys):
                    heads[b, t, h] += w / sum(weights) * v[b, s, h // G]
    if lam_logit is None:
        return heads
    o = torch.empty(B, T, HQ // 2, D, dtype=q.dtype)
    for p in range(HQ // 2):
        lam = 1 / (1 + torch.exp(-lam_logit[:, :, p, None]))
        o[:, :, p] = heads[:, :, 2 * p] - lam * heads[:, :, 2 * p + 1]
    return o


@pytest.mark.parametrize("differential", [True, False])
@pytest.mark.parametrize(("T", "S", "window"), [(5, 5, None), (3, 8, None), (4, 7, 3)])
def test_dense_and_windowed(T, S, window, differential):
    inputs = qkv(2, T, S, 8, 2, 4, dtype=torch.float64, differential=differential)

    def visible(b, h, t):
        position = S - T + t
        return [s for s in range(position + 1) if window is None or s > position - window]

    torch.testing.assert_close(reference_attention(*inputs, window=window), by_hand(*inputs, visible))


@pytest.mark.parametrize("C", [1, 2])
def test_selected_blocks(C):
    T, S = 7, 13
    inputs = qkv(2, T, S, 8, 2, 4, dtype=torch.float64)
    selection = random_selection(2, T, S, 2, C=C, NB=3, block_m=2, block_n=3)

    def visible(b, h, t):
        at = b, h % C, h // 4, t // 2
        blocks = selection.indices[at][: selection.counts[at]].tolist()
        return [s for s in range(S - T + t + 1) if s // 3 in blocks]

    torch.testing.assert_close(reference_attention(*inputs, selection), by_hand(*inputs, visible))


def test_lse_and_tokens_that_see_nothing():
    inputs = qkv(1, 4, 4, 4, 2, 8, dtype=torch.float64)
    selection = random_selection(1, 4, 4, 2, NB=1, block_m=2, block_n=2)
    selection.counts[:, :, 0, 0] = 0
    o, lse = reference_attention(*inputs, selection, return_lse=True)
    assert (lse[0, :2, :2] == float("-inf")).all()
    assert (o[0, :2, 0] == 0).all()
    o, lse = reference_attention(*inputs, return_lse=True)
    logits = inputs[0][0, 3, 1] @ inputs[1][0, :, 0].T * 8**-0.5
    torch.testing.assert_close(lse[0, 1, 3], logits.logsumexp(0))


def test_packed_equals_each_alone():
    lengths_q, lengths_k = [3, 1, 6], [5, 1, 6]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    q, k, v, lam = qkv(1, 10, 12, 4, 2, 4, dtype=torch.float64)
    q, lam = q[:, :10], lam[:, :10]
    packed = reference_attention(q, k, v, lam, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    at_q = at_k = 0
    for n, m in zip(lengths_q, lengths_k):
        one = reference_attention(
            q[:, at_q : at_q + n], k[:, at_k : at_k + m], v[:, at_k : at_k + m], lam[:, at_q : at_q + n]
        )
        torch.testing.assert_close(packed[:, at_q : at_q + n], one)
        at_q, at_k = at_q + n, at_k + m
