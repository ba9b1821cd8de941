"""One cross-decoder layer's choice of blocks for the next ones: who chooses, and that every way of computing agrees."""

import random

import pytest
import torch

from diffv2_sparse.yoco import attention
from tests.test_yoco_graphs import by_step
from tests.test_yoco_prefill import assert_equals_forward
from tests.tiny_yoco import ROWS, VOCAB, check_checkpointed_gradients, ragged_tokens, tiny_model

SELF_DECODERS = ("sliding_window", "gated_retention")
SPARSE = ROWS[1:]
COLUMNS, PADS = 47, (0, 11, 26)


def sharing_model(share_layers: int, **changes):
    """Three cross-decoder layers."""
    return tiny_model(num_hidden_layers=6, sparse_share_layers=share_layers, **changes)


def watched(monkeypatch, name: str) -> list:
    """The selections that the cross-decoder's layers attend by, from now on, in order."""
    attend, seen = getattr(attention, name), []

    def watching(*args, **options):
        if name == "diff_attention_paged" or "window" not in options:  # else a layer of the self-decoder
            seen.append(args[3 if name == "diff_attention_paged" else 4])
        return attend(*args, **options)

    monkeypatch.setattr(attention, name, watching)
    return seen


@pytest.mark.parametrize(("share_layers", "chooser"), [(1, (0, 1, 2)), (2, (0, 0, 2)), (3, (0, 0, 0)), (9, (0, 0, 0))])
@pytest.mark.parametrize(("mode", "block_m"), SPARSE)
def test_who_chooses(share_layers, chooser, mode, block_m, monkeypatch):
    """In training and in reading a cache: the lists of the layer that chooses, and no other choice is made."""
    model = sharing_model(share_layers, sparse_mode=mode, sparse_block_m=block_m)
    choices, select = [], attention.select_blocks
    monkeypatch.setattr(attention, "select_blocks", lambda *a, **o: choices.append(1) or select(*a, **o))
    tokens = torch.randint(1, VOCAB, (2, 40))
    for name, call in (
        ("diff_attention", lambda: model(tokens)),
        ("diff_attention_paged", lambda: model.prefill(tokens)),
    ):
        seen = watched(monkeypatch, name)
        call()
        assert len(seen) == 3
        assert [next(j for j in range(3) if seen[j] is own) for own in seen] == list(chooser)
        assert len(choices) == len(set(chooser))
        choices.clear()


@pytest.mark.parametrize("share_layers", [2, 3])
def test_it_is_another_model_where_the_budget_bites_and_the_same_where_not(share_layers):
    tokens = torch.randint(1, VOCAB, (1, COLUMNS))
    model = sharing_model(share_layers, sparse_mode="pair_mean")
    with torch.no_grad():
        shared = model(tokens).logits
        model.config.sparse_share_layers = 1
        difference = (model(tokens).logits - shared)[0].abs().amax(-1)
        assert (difference[36:] > 1e-6).all()
        assert (difference[:16] < 1e-9).all()
        model.config.sparse_mode, own = "dense", []
        for model.config.sparse_share_layers in (1, share_layers):
            own.append(model(tokens).logits)
    assert torch.equal(*own)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("share_layers", [2, 3])
@pytest.mark.parametrize(("mode", "block_m"), SPARSE)
def test_prefill_and_decode_equal_forward(self_decoder, share_layers, mode, block_m):
    model = sharing_model(share_layers, self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    tokens, mask = ragged_tokens(COLUMNS, PADS)
    rng = random.Random(f"{self_decoder} {mode} {block_m}")
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        logits, cache = model.prefill(tokens[:, :31], mask[:, :31], chunk_tokens=rng.randint(2, 9), logits_to_keep=0)
        assert_equals_forward(logits, whole, mask, range(31))
        cache, at = cache.fork(), 31
        while at < COLUMNS:
            t = min(rng.choice((1, 1, 2, 5)), COLUMNS - at)
            logits = model.decode(tokens[:, at : at + t], cache)
            assert_equals_forward(logits, whole, mask, range(at, at + t))
            at += t


@pytest.mark.parametrize("mode", ["pair_mean", "per_class"])
@torch.no_grad()
def test_a_step_of_a_graph_is_the_ordinary_forward(mode):
    model = sharing_model(2, sparse_mode=mode)
    tokens, mask = ragged_tokens(40, PADS)
    caches = [model.prefill(tokens[:, :30], mask[:, :30], model.new_cache(3, 60, max_rollback=2))[1] for _ in range(2)]
    for start, end in ((30, 31), (31, 34), (34, 35)):
        expected = model.decode(tokens[:, start:end], caches[0])
        torch.testing.assert_close(by_step(model, caches[1], tokens[:, start:end]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("share_layers", [2, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("mode", "block_m"), [("per_class", 1), ("pair_mean", 3)])
def test_checkpointed_gradients_are_exact(share_layers, use_reentrant, mode, block_m):
    model = sharing_model(share_layers, sparse_mode=mode, sparse_block_m=block_m).train()
    check_checkpointed_gradients(model, use_reentrant)


def test_an_open_row_is_finished_by_the_layers_that_chose_for_it():
    model = sharing_model(3, sparse_mode="pair_mean", sparse_block_m=8)
    tokens = torch.randint(1, VOCAB, (2, 40))
    cache = model.prefill(tokens[:, :30])[1]
    model.config.sparse_share_layers = 1
    with pytest.raises(ValueError, match="until the open row of 8 tokens is full"):
        model.decode(tokens[:, 30:31], cache)
    model.config.sparse_share_layers = 3
    model.decode(tokens[:, 30:32], cache)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_what_is_refused(value):
    with pytest.raises(ValueError, match="sparse_share_layers: expected an int ≥ 1"):
        sharing_model(value)


def test_it_is_kept_with_the_model(tmp_path):
    model = sharing_model(3, sparse_mode="pair_mean")
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.sparse_share_layers == 3
