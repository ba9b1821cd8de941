"""Prefill in any chunking, then decode, computes what one forward does, and the cross-decoder runs only where asked."""

import random

import pytest
import torch

from tests.tiny_yoco import ROWS, VOCAB, ragged_tokens, tiny_model

SELF_DECODERS = ("sliding_window", "gated_retention")
COLUMNS, PADS = 47, (0, 11, 26)


def assert_equals_forward(logits: torch.Tensor, whole: torch.Tensor, mask: torch.Tensor, columns) -> None:
    """logits `[B, len(columns), V]` against `whole` `[B, T, V]`, where the columns are real; lists must be the same."""
    columns = torch.as_tensor(columns)
    real = mask[:, columns].bool()
    torch.testing.assert_close(logits[real], whole[:, columns][real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(
    ("mode", "block_m", "cross_position"), [*((*row, "rope") for row in ROWS), ("pair_mean", 1, "none")]
)
def test_prefill_and_decode_equal_forward(self_decoder, mode, block_m, cross_position):
    model = tiny_model(
        self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m, cross_position=cross_position
    )
    tokens, mask = ragged_tokens(COLUMNS, PADS)
    rng = random.Random(f"{self_decoder} {mode} {block_m}")
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        for chunk_tokens in (1, rng.randint(2, 9), 64):
            prompt = rng.randint(27, 40)
            cache = model.new_cache(len(PADS), COLUMNS)
            logits, same = model.prefill(tokens[:, :prompt], mask[:, :prompt], cache, chunk_tokens=chunk_tokens)
            assert same is cache
            assert logits.shape == (len(PADS), 1, VOCAB)
            assert_equals_forward(logits, whole, mask, [prompt - 1])
            at = prompt
            while at < COLUMNS:
                t = min(rng.choice((1, 1, 2, 5)), COLUMNS - at)
                logits = model.decode(tokens[:, at : at + t], cache)
                assert_equals_forward(logits, whole, mask, range(at, at + t))
                at += t
            assert cache.tokens == tuple(COLUMNS - p for p in PADS) == tuple(cache.lengths.tolist())
            assert cache.get_seq_length() == COLUMNS


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "block_m"), ROWS[1:])
def test_the_budget_bites(self_decoder, mode, block_m):
    """Otherwise the tests here would compare dense with dense."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    tokens = torch.randint(1, VOCAB, (1, COLUMNS))
    with torch.no_grad():
        sparse = model(tokens).logits
        model.config.sparse_mode = "dense"
        difference = (model(tokens).logits - sparse)[0].abs().amax(-1)
    assert (difference[32:] > 1e-3).all()
    assert (difference[:16] < 1e-9).all()


@pytest.mark.parametrize(("mode", "block_m"), ROWS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0, 1, 6, torch.tensor([46, 3, 20, 20])])
def test_any_logits_can_be_kept(mode, block_m, side, keep):
    model = tiny_model(sparse_mode=mode, sparse_block_m=block_m)
    tokens, mask = ragged_tokens(COLUMNS, PADS, side)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, logits_to_keep=keep).logits
        for chunk_tokens in (5, 64):
            logits, _ = model.prefill(tokens, mask, chunk_tokens=chunk_tokens, logits_to_keep=keep)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        outputs = model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=keep)
        torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-9)
        assert outputs.past_key_values.tokens == tuple(COLUMNS - p for p in PADS)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "block_m"), ROWS)
def test_a_second_prompt_continues_the_first(self_decoder, mode, block_m):
    """Each prompt padded on its own side, so that real tokens stand on both sides of padding."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    first, first_mask = ragged_tokens(21, (0, 9, 4), "right")
    second, second_mask = ragged_tokens(24, (5, 0, 23))
    tokens, mask = torch.cat([first, second], 1), torch.cat([first_mask, second_mask], 1)
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        cache = model.prefill(first, first_mask, chunk_tokens=8)[1]
        logits, _ = model.prefill(second, second_mask, cache, chunk_tokens=7, logits_to_keep=0)
        real = second_mask.bool()
        torch.testing.assert_close(logits[real], whole[:, 21:][real], rtol=0, atol=1e-9)
        # the same through forward, with a mask over all columns
        cache = model(first, attention_mask=first_mask, use_cache=True).past_key_values
        logits = model(second, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits[real], whole[:, 21:][real], rtol=0, atol=1e-9)


def tokens_run(model) -> list[int]:
    """Counts, from now on, how many tokens each call of the last cross-decoder layer runs."""
    counts = []
    model.model.cross_layers[-1].mlp.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[-2]))
    return counts


@pytest.mark.parametrize("mode", ["dense", "pair_mean"])
def test_early_exit_runs_the_cross_decoder_for_what_is_asked(mode):
    model = tiny_model(sparse_mode=mode)
    tokens, mask = ragged_tokens(COLUMNS, PADS)
    counts = tokens_run(model)
    cache = model.prefill(tokens, mask, chunk_tokens=10)[1]
    assert counts == [3]
    model.decode(tokens[:, :2], cache)
    assert counts == [3, 6]
    model.prefill(tokens, mask, logits_to_keep=torch.tensor([0, 40]))  # column 0 is padding but in the first sequence
    assert counts == [3, 6, 4]


def test_early_exit_with_longer_rows_runs_their_first_tokens_too():
    model = tiny_model(sparse_mode="pair_mean", sparse_block_m=8)
    counts = tokens_run(model)
    cache = model.prefill(torch.randint(1, VOCAB, (2, 30)), chunk_tokens=30)[1]
    assert counts == [4]  # token 29, and token 24, which begins its row
    model.decode(torch.randint(1, VOCAB, (2, 1)), cache)
    assert counts == [4, 2]  # token 30 goes by the list that is held
    model.decode(torch.randint(1, VOCAB, (2, 2)), cache)
    assert counts == [4, 2, 4]  # token 31 too; token 32 begins a row


def test_longer_rows_are_finished_under_the_options_they_began_with():
    model = tiny_model(sparse_mode="pair_mean", sparse_block_m=8)
    tokens = torch.randint(1, VOCAB, (2, 40))
    cache = model.prefill(tokens[:, :30])[1]
    model.config.sparse_budget = 6
    with pytest.raises(ValueError, match="until the open row of 8 tokens is full"):
        model.decode(tokens[:, 30:31], cache)
    model.config.sparse_budget = 5
    model.decode(tokens[:, 30:32], cache)
    model.config.sparse_budget = 6  # no row is open
    logits = model.decode(tokens[:, 32:33], cache)
    torch.testing.assert_close(logits, model(tokens[:, :33], logits_to_keep=1).logits, rtol=0, atol=1e-9)


def test_modes_may_change_over_one_cache():
    """The cache does not depend on the mode, with rows of one token."""
    model = tiny_model()
    tokens = torch.randint(1, VOCAB, (2, 45))
    cache = model.prefill(tokens[:, :40])[1]
    for at, mode in enumerate(("pair_mean", "dense", "per_class"), 40):
        model.config.sparse_mode = mode
        logits = model.decode(tokens[:, at : at + 1], cache)
        expected = model(tokens[:, : at + 1], logits_to_keep=1).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_progress_and_chunks():
    model, seen = tiny_model(), []
    model.prefill(torch.ones(1, 10, dtype=torch.long), chunk_tokens=4, progress=lambda *done: seen.append(done))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(ValueError, match="chunk_tokens: expected a positive int, got 0"):
        model.prefill(torch.ones(1, 10, dtype=torch.long), chunk_tokens=0)


def test_embeddings_instead_of_tokens():
    model = tiny_model(sparse_mode="pair_mean")
    tokens, mask = ragged_tokens(30, (0, 11))
    embeds = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(
            model(inputs_embeds=embeds, attention_mask=mask).logits, expected, rtol=0, atol=1e-12
        )
        logits, _ = model.prefill(attention_mask=mask, inputs_embeds=embeds, chunk_tokens=7)
        torch.testing.assert_close(logits, expected[:, -1:], rtol=0, atol=1e-9)


def test_a_sequence_of_padding_only_stays_empty():
    model = tiny_model(sparse_mode="pair_mean")
    tokens, mask = ragged_tokens(12, (0, 12))
    logits, cache = model.prefill(tokens, mask, chunk_tokens=5, logits_to_keep=0)
    assert cache.tokens == (12, 0)
    assert not logits[1].any()
    more = torch.randint(1, VOCAB, (2, 3))
    torch.testing.assert_close(model.decode(more, cache)[1], model(more[1:]).logits[0], rtol=0, atol=1e-9)
