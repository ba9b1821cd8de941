"""The public functions: what they refuse; and that the yardstick of all other tests sees the five classic bugs."""

from types import SimpleNamespace

import pytest
import torch

from diffv2_sparse import BlockSelection, attention, diff_attention, diff_attention_paged
from diffv2_sparse.cache import PagedKV
from diffv2_sparse.reference import reference_attention
from tests.oracle import assert_within_budget, qkv, random_selection

Q, K, V, LAM = qkv(1, 32, 48, 8, 2, 16)
LISTS = random_selection(1, 32, 48, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, "q: expected floating point"),
        ({"q": Q.long()}, "q: expected floating point"),
        ({"k": K[..., :8]}, "k: expected"),
        ({"k": K.expand(2, -1, -1, -1)}, "k: expected"),
        ({"v": V[:, :40]}, "v: expected shape"),
        ({"q": Q[:, :, :7]}, "HQ a multiple of the 2 KV heads"),
        ({"q": Q[:, :, :6]}, "straddle two groups"),
        ({"lam_logit": LAM[:, :, :3]}, "lam_logit: expected"),
        ({"lam_logit": LAM[:, :3]}, "lam_logit: expected"),
        ({"k": K.half(), "v": V.half()}, "k: expected torch.float32"),
        ({"v": V.double()}, "v: expected torch.float32"),
        ({"k": K.to("meta"), "v": V.to("meta")}, "k: expected torch.float32 on cpu"),
        ({"lam_logit": LAM.to("meta")}, "lam_logit: expected on cpu"),
        ({"k": K[:, :20], "v": V[:, :20]}, "T = 32 > S = 20"),
        ({"q": Q[:, :0], "lam_logit": LAM[:, :0]}, "q: expected floating point .*no 0 among them"),
        ({"lam_logit": LAM.long()}, "lam_logit: expected floating point"),
        ({"window": True}, "window: expected a positive int"),
        ({"window": 0}, "window: expected a positive int"),
        ({"window": 2.0}, "window: expected a positive int"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"selection": (LISTS.indices, LISTS.counts)}, "selection: expected a BlockSelection"),
        ({"selection": random_selection(1, 48, 48, 2)}, "selection: expected .B, H, NM. = .1, 2, 2."),
        ({"selection": random_selection(2, 32, 48, 2)}, "selection: expected .B, H, NM."),
        ({"selection": random_selection(1, 32, 48, 1)}, "selection: expected .B, H, NM."),
        ({"selection": random_selection(1, 32, 48, 2, C=2), "lam_logit": None}, "need lam_logit"),
        (
            {"selection": BlockSelection(LISTS.indices.to("meta"), LISTS.counts.to("meta"), 16, 16)},
            "selection: expected on cpu",
        ),
        (
            {"backend": "triton", "q": Q.double(), "k": K.double(), "v": V.double()},
            '"triton": it computes in float16, bfloat16 and float32',
        ),
        ({"backend": "flash", "selection": LISTS}, '"flash" takes no selection'),
        (
            {
                "backend": "flex",
                "cu_seqlens_q": torch.tensor([0, 32]).int(),
                "cu_seqlens_k": torch.tensor([0, 48]).int(),
            },
            '"flex" takes no cu_seqlens',
        ),
        ({"cu_seqlens_q": torch.tensor([0, 32]).int()}, "expected both or neither"),
        (
            {"cu_seqlens_q": torch.tensor([0, 32]), "cu_seqlens_k": torch.tensor([0, 48])},
            "cu_seqlens_q: expected int32",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 32]).int(), "cu_seqlens_k": torch.tensor([0, 47]).int()},
            "cu_seqlens_k: expected bounds",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"q": Q, "k": K, "v": V, "lam_logit": LAM} | change
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "lam_logit")]
    with pytest.raises(ValueError, match=message):
        diff_attention(*tensors, **arguments)


def paged(**change):
    fields = {
        "k_pages": torch.randn(6, 16, 16),
        "v_pages": torch.randn(6, 16, 16),
        "page_table": torch.arange(6).view(1, 2, 3).int(),
        "lengths": torch.tensor([48]).int(),
    }
    return PagedKV(**(fields | change))


@pytest.mark.parametrize(
    ("pages", "selection", "message"),
    [
        (
            paged(page_table=torch.arange(6).view(2, 1, 3).int(), lengths=torch.tensor([48, 48]).int()),
            None,
            "pages: expected page_table",
        ),
        (paged(k_pages=torch.randn(6, 16, 8), v_pages=torch.randn(6, 16, 8)), None, "pages: expected k_pages"),
        (
            paged(k_pages=torch.randn(6, 16, 16).half(), v_pages=torch.randn(6, 16, 16).half()),
            None,
            "k_pages: expected",
        ),
        (paged(page_table=torch.arange(6).view(1, 2, 3)), None, "pages: expected page_table int32"),
        (paged(lengths=torch.tensor([48.0])), None, "pages: expected lengths int32"),
        (paged(page_table=torch.zeros(1, 2, 0).int()), None, "pages: expected at least one"),
        ((1, 2), None, "pages: expected a PagedKV"),
        (paged(), random_selection(1, 2, 48, 2, block_m=1, block_n=8), "the page size"),
        (paged(), random_selection(1, 3, 48, 2, block_m=1), "selection: expected .B, H, NM."),
    ],
)
def test_bad_pages(pages, selection, message):
    with pytest.raises(ValueError, match=message):
        diff_attention_paged(Q[:, :2], LAM[:, :2], pages, selection)
    with pytest.raises(ValueError, match="backend: expected one of"):
        diff_attention_paged(Q[:, :2], LAM[:, :2], paged(), backend="flex")


def swapped_pair(q, k, v, lam, selection):
    return reference_attention(q.unflatten(2, (-1, 2)).flip(3).flatten(2, 3), k, v, lam, selection, return_lse=True)


@pytest.mark.parametrize(
    ("choice", "dtype", "D", "selected", "plain"),
    [
        ("triton", torch.bfloat16, 64, True, False),
        ("triton", torch.float32, 64, False, False),  # a window, packed sequences, or lse
        ("torch", torch.bfloat16, 64, False, True),
        ("torch", torch.bfloat16, 512, True, False),  # heads too wide for the kernels
        ("torch", torch.float64, 64, True, False),
    ],
)
def test_what_auto_takes_on_a_gpu(choice, dtype, D, selected, plain):
    q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 8, 4, D))
    assert attention._automatic(q, random_selection(1, 8, 8, 2, block_m=1) if selected else None, plain) == choice


def dropped_block(q, k, v, lam, selection):
    short = BlockSelection(selection.indices, (selection.counts - 1).clamp(min=0), selection.block_m, selection.block_n)
    return reference_attention(q, k, v, lam, short, return_lse=True)


def no_sigmoid(q, k, v, lam, selection):
    heads, lse = reference_attention(q, k, v, None, selection, return_lse=True)
    return heads[:, :, 0::2] - lam[..., None] * heads[:, :, 1::2], lse


def wrong_group(q, k, v, lam, selection):
    return reference_attention(q, k.flip(2), v.flip(2), lam, selection, return_lse=True)


def causal_off_by_one(q, k, v, lam, selection):
    return reference_attention(q, k[:, :-1], v[:, :-1], lam, selection, return_lse=True)


@pytest.mark.parametrize("bug", [swapped_pair, dropped_block, no_sigmoid, wrong_group, causal_off_by_one])
def test_the_error_budget_catches(bug):
    selection = None if bug is causal_off_by_one else random_selection(2, 32, 48, 2, empty=False)
    with pytest.raises(AssertionError):
        assert_within_budget(lambda *x: bug(*x, selection), qkv(2, 32, 48, 8, 2, 16), selection, gradients=False)
