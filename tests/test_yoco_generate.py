"""Transformers' `generate` over the shared cache: the same tokens with and without it, alone and in a padded batch."""

import pytest
import torch

from tests.tiny_yoco import VOCAB, ragged_tokens, tiny_model

SELF_DECODERS = ("sliding_window", "gated_retention")
PADS = (0, 7, 20)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "block_m"), [("dense", 1), ("pair_mean", 1), ("per_class", 3)])
def test_greedy(self_decoder, mode, block_m):
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    tokens, mask = ragged_tokens(27, PADS)
    options = {"max_new_tokens": 9, "do_sample": False}
    generated = model.generate(tokens, attention_mask=mask, **options)
    assert generated.shape == (3, 36)
    assert torch.equal(generated, model.generate(tokens, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(generated, model.generate(tokens, attention_mask=mask, prefill_chunk_size=6, **options))
    for b, pad in enumerate(PADS):
        assert torch.equal(generated[b, pad:], model.generate(tokens[b : b + 1, pad:], **options)[0])


@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}])
@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
def test_samples_and_beams(options, self_decoder):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="pair_mean", sparse_block_m=3)
    tokens, mask = ragged_tokens(27, PADS)
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        generated.append(model.generate(tokens, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*generated)
    assert len(generated[0]) == 3 * options.get("num_return_sequences", 1)


def test_a_cache_is_continued():
    model = tiny_model(sparse_mode="pair_mean")
    tokens, mask = ragged_tokens(20, (0, 7))
    cache = model.new_cache(2, 60)
    options = {"max_new_tokens": 6, "do_sample": False}
    first = model.generate(tokens, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options)
    assert first.past_key_values is cache
    assert cache.get_seq_length() == 25  # the last token generated has not been read
    tokens = torch.cat([first.sequences, torch.randint(1, VOCAB, (2, 4))], 1)
    mask = torch.cat([mask, mask.new_ones(2, 10)], 1)
    continued = model.generate(tokens, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(continued, model.generate(tokens, attention_mask=mask, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 6}])
def test_only_masks_of_prompts_are_read(options):
    """Reading one waits for the device; tokens that were generated are no padding."""
    model = tiny_model()
    tokens, mask = ragged_tokens(20, (0, 7))
    masks = []
    model.model.register_forward_pre_hook(lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True)
    model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    prompts = 4 if "prefill_chunk_size" in options else 1
    assert [x is None for x in masks] == [False] * prompts + [True] * 5
    masks.clear()
    model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
    assert all(x is not None for x in masks)


def test_generation_ends_at_the_end_of_sequence():
    model = tiny_model()
    tokens = torch.randint(1, VOCAB, (2, 12))
    options = {"max_new_tokens": 10, "do_sample": False}
    free = model.generate(tokens, **options)
    end = free[0, 15].item()
    ended = model.generate(tokens, eos_token_id=end, **options)
    stop = 12 + free[0, 12:].tolist().index(end)
    assert torch.equal(ended[0, : stop + 1], free[0, : stop + 1])
    assert not ended[0, stop + 1 :].any()  # padding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation: expected None, got 'static'"),
    ],
)
def test_ways_to_generate_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=4, **options)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("mode", ["dense", "pair_mean"])
def test_candidates_that_are_not_accepted_are_taken_back(self_decoder, mode):
    """The same tokens as greedy decoding, looked up in the prompt, right or wrong."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode)
    tokens = torch.randint(1, VOCAB, (1, 6)).repeat(1, 5)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(tokens, **options)
    counts = []
    model.model.cross_layers[-1].mlp.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[-2]))
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **options), expected)
    assert max(counts) == 4  # three candidates and the token before them
    cache = model.new_cache(1, 60, max_rollback=5)
    told = model.generate(
        tokens, prompt_lookup_num_tokens=5, past_key_values=cache, return_dict_in_generate=True, **options
    )
    assert torch.equal(told.sequences, expected)
    assert cache.tokens == (41,)  # the last token has not been read


def test_candidates_need_a_cache_that_can_be_cut_back():
    model, tokens = tiny_model(sparse_mode="pair_mean", sparse_block_m=3), torch.ones(1, 8, dtype=torch.long)
    options = {"max_new_tokens": 4, "prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="expected sparse_block_m = 1, as tokens cannot be taken back"):
        model.generate(tokens, **options)
    model = tiny_model()
    with pytest.raises(ValueError, match="cache: expected max_rollback > 0"):
        model.generate(tokens, past_key_values=model.new_cache(1, 20), **options)
    with pytest.raises(ValueError, match=r"assistant_model: expected past_key_values = model.new_cache\("):
        model.generate(tokens, max_new_tokens=4, assistant_model=tiny_model(num_hidden_layers=2))


def test_a_cache_that_is_too_small_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="at most 10 tokens per sequence"):
        model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=9, past_key_values=model.new_cache(1, 10))
