"""The YOCO model as a Transformers model: its attention module, training, padding, saving, dtypes, what it refuses."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from diffv2_sparse.yoco import DiffV2Attention, DiffV2YocoConfig, DiffV2YocoForCausalLM, DiffV2YocoModel
from diffv2_sparse.yoco.layers import rotary_angles
from tests.tiny_yoco import ROWS, VOCAB, check_checkpointed_gradients, ragged_tokens, tiny_config, tiny_model

SELF_DECODERS = ("sliding_window", "gated_retention")


def test_attention_module_loads_a_state_dict_of_the_reference_and_computes_the_same():
    """Written from the published formula with explicit loops over pairs; nothing of ours but the module under test."""
    T, hidden, heads, kv_heads, D = 11, 24, 6, 2, 4
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "q_proj": (2 * heads * D, hidden),
        "k_proj": (kv_heads * D, hidden),
        "v_proj": (kv_heads * D, hidden),
        "o_proj": (hidden, heads * D),
        "lambda_proj": (heads, hidden),
    }
    weights = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    x = torch.randn(2, T, hidden, generator=generator, dtype=torch.float64)

    def turn(y):  # adjacent dimensions are the real and the imaginary part of one number
        angle = torch.arange(T, dtype=torch.float64)[:, None] / 10000.0 ** (torch.arange(0, D, 2).double() / D)
        return torch.view_as_real(
            torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2)) * torch.exp(1j * angle)
        ).flatten(-2)

    q, k, v = ((x @ weights[n].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
    q, k = turn(q), turn(k)
    future = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)
    gate = 1 / (1 + torch.exp(-(x @ weights["lambda_proj"].T)))
    pairs = []
    for p in range(heads):
        kv = 2 * p // (2 * heads // kv_heads)
        signal, noise = (
            torch.softmax(q[:, h] @ k[:, kv].mT / D**0.5 + future, -1) @ v[:, kv] for h in (2 * p, 2 * p + 1)
        )
        pairs.append(signal - gate[:, :, p, None] * noise)
    expected = torch.cat(pairs, -1) @ weights["o_proj"].T

    config = tiny_config(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=D)
    module = DiffV2Attention(config).double()
    module.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    rotary = rotary_angles(torch.arange(T)[None], D, 10000.0, torch.float64)
    torch.testing.assert_close(module(x, rotary), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "block_m"), ROWS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_sequence_alone(self_decoder, mode, block_m, side):
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    pads = (0, 8, 33)
    tokens, mask = ragged_tokens(40, pads, side)
    weights = torch.randn(3, 40, VOCAB, dtype=torch.float64) * mask[..., None]
    logits = model(tokens, attention_mask=mask).logits
    (logits * weights).sum().backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    for b, real in enumerate(mask.bool()):
        alone = model(tokens[b, real][None]).logits[0]
        torch.testing.assert_close(logits[b, real], alone, rtol=0, atol=1e-11)
        (alone * weights[b, real]).sum().backward()
    for ours, weight in zip(gradients, model.parameters()):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mode", "block_m"), ROWS)
def test_the_future_never_shows(mode, block_m):
    """Neither what comes later nor how much of it changes a logit; in particular not through the choice of blocks."""
    model = tiny_model(sparse_mode=mode, sparse_block_m=block_m)
    tokens = torch.randint(1, VOCAB, (2, 43))
    with torch.no_grad():
        logits = model(tokens).logits
        for seen in (1, 5, 22, 24, 29, 42):
            other = torch.cat([tokens[:, :seen], torch.randint(1, VOCAB, (2, 43 - seen))], 1)
            torch.testing.assert_close(model(other).logits[:, :seen], logits[:, :seen], rtol=0, atol=1e-11)
            torch.testing.assert_close(model(tokens[:, :seen]).logits, logits[:, :seen], rtol=0, atol=1e-11)


def test_rows_chosen_by_all_their_tokens_would_leak(monkeypatch):
    """What the configuration refuses: the test above would fail."""
    monkeypatch.setattr(DiffV2YocoConfig, "check_sparsity", lambda self: None)
    model = tiny_model(sparse_mode="pair_mean", sparse_block_m=8, sparse_row_queries="all")
    tokens = torch.randint(1, VOCAB, (2, 40))
    other = torch.cat([tokens[:, :34], torch.randint(1, VOCAB, (2, 6))], 1)
    with torch.no_grad():
        assert (model(other).logits - model(tokens).logits)[:, :34].abs().max() > 1e-3


def test_modes_and_budgets_are_read_at_every_call():
    model = tiny_model()
    tokens = torch.randint(1, VOCAB, (1, 60))
    logits = {}
    with torch.no_grad():
        for mode, budget in (("dense", 5), ("pair_mean", 5), ("per_class", 5), ("pair_mean", 8)):
            model.config.sparse_mode, model.config.sparse_budget = mode, budget
            logits[mode, budget] = model(tokens).logits
        model.config.sparse_mode, model.config.sparse_budget = "pair_mean", 15  # every block there is
        torch.testing.assert_close(model(tokens).logits, logits["dense", 5], rtol=0, atol=1e-11)
        model.config.sparse_mode, model.config.sparse_budget, model.config.sparse_noise_budget = "per_class", 5, None
        logits["equal budgets"] = model(tokens).logits
    assert min((a - b).abs().max() for a in logits.values() for b in logits.values() if a is not b) > 1e-3


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("cross_position", ["rope", "none"])
def test_positions(self_decoder, cross_position):
    """With "none" the cross-decoder sees its keys as a set, with "rope" in order: exchange two far tokens."""
    model = tiny_model(self_decoder=self_decoder, cross_position=cross_position)
    with torch.no_grad():
        for layer in model.model.self_layers:  # nothing but the cross-decoder mixes tokens
            layer.mixer.o_proj.weight.zero_()
        tokens = torch.randint(1, VOCAB, (1, 40))
        swapped = tokens.clone()
        swapped[0, [3, 30]] = tokens[0, [30, 3]]
        change = (model(swapped).logits - model(tokens).logits)[:, -1].abs().max()
    assert (change < 1e-11) == (cross_position == "none")


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_exact(self_decoder, use_reentrant):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="per_class").train()
    check_checkpointed_gradients(model, use_reentrant)


def test_loss_is_shifted_cross_entropy_and_takes_the_trainers_count():
    model = tiny_model()
    tokens = torch.randint(1, VOCAB, (2, 12))
    labels = tokens.clone()
    labels[0, 3:6] = -100
    outputs = model(tokens, labels=labels)
    targets = labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(outputs.loss, expected / (targets != -100).sum())
    counted = model(tokens, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(counted, expected / 7)
    assert isinstance(model(tokens, labels=labels, return_dict=False), tuple)


def test_labels_need_every_logit_and_a_pass_with_gradients():
    model, tokens = tiny_model(), torch.randint(1, VOCAB, (2, 12))
    loss = model(tokens, labels=tokens).loss
    for cached in ({"use_cache": True}, {"past_key_values": model.new_cache(2, 20)}):
        with pytest.raises(ValueError, match=r"labels: a cache carries no gradients.*pass use_cache=False"):
            model(tokens, labels=tokens, **cached)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, labels=tokens, **cached).loss, loss)
    for keep in (1, torch.arange(12)):
        with pytest.raises(ValueError, match="logits_to_keep: expected 0 with labels"):
            model(tokens, labels=tokens, logits_to_keep=keep)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("keep", "columns"), [(0, 6), (2, 2), (torch.tensor([3]), 1)])
def test_padding_only_gives_zeros(use_cache, keep, columns):
    tokens = torch.ones(2, 6, dtype=torch.long)
    model = tiny_model(sparse_mode="pair_mean")
    logits = model(tokens, attention_mask=0 * tokens, use_cache=use_cache, logits_to_keep=keep).logits
    assert torch.equal(logits, torch.zeros(2, columns, VOCAB).double())


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([7, 2, -1]), torch.tensor([3])])
def test_logits_to_keep_without_a_cache(keep):
    model = tiny_model(sparse_mode="pair_mean")
    tokens, mask = ragged_tokens(20, (0, 6))
    logits = model(tokens, attention_mask=mask).logits
    kept = model(tokens, attention_mask=mask, logits_to_keep=keep).logits
    expected = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12)


def test_the_last_tokens_of_a_right_padded_batch_are_real_ones():
    model = tiny_model()
    tokens, mask = ragged_tokens(20, (0, 6, 19), "right")
    logits, kept = (
        model(tokens, attention_mask=mask).logits,
        model(tokens, attention_mask=mask, logits_to_keep=2).logits,
    )
    for b, end in enumerate((20, 14)):
        torch.testing.assert_close(kept[b], logits[b, end - 2 : end], rtol=0, atol=1e-12)
    torch.testing.assert_close(kept[2, 1], logits[2, 0], rtol=0, atol=1e-12)
    assert not kept[2, 0].any()  # it has one token only


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
def test_saved_and_loaded_through_the_auto_classes(tmp_path, tied, self_decoder):
    model = tiny_model(
        tie_word_embeddings=tied, self_decoder=self_decoder, sparse_mode="per_class", cross_position="none"
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DiffV2YocoForCausalLM
    assert loaded.dtype == torch.float64
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    tokens = torch.randint(1, VOCAB, (1, 40))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-11)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, DiffV2YocoConfig)
    assert config.to_dict() == loaded.config.to_dict()
    assert (config.self_decoder, config.sparse_noise_budget, config.cross_position) == (self_decoder, 6, "none")
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is DiffV2YocoModel
    states = backbone(tokens).last_hidden_state
    torch.testing.assert_close(states @ model.lm_head.weight.T, model(tokens).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_autocast(self_decoder, dtype):
    """Low precision stays near float64, with and without a cache; under autocast the weights stay float32."""
    changes = {"self_decoder": self_decoder, "sparse_mode": "pair_mean", "sparse_budget": 12}
    exact = tiny_model(**changes)
    tokens, mask = ragged_tokens(30, (0, 11))
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    with torch.no_grad():
        for (
            weight
        ) in exact.parameters():  # 16-bit weights from the start, and smaller ones: only the arithmetic differs
            weight.copy_((weight / 2).to(dtype))
        model = tiny_model(**changes).to(dtype)
        model.load_state_dict(exact.state_dict())
        expected = exact(tokens, attention_mask=mask).logits[:, -5:]
        logits = model(tokens, attention_mask=mask, logits_to_keep=5).logits
        assert logits.dtype == dtype
        assert (logits.double() - expected).abs().max() < tolerance
        cache = model.prefill(tokens[:, :25], mask[:, :25])[1]
        assert (model.decode(tokens[:, 25:], cache).double() - expected).abs().max() < tolerance
        if dtype == torch.bfloat16:
            model.float()
            with torch.autocast("cpu", dtype=dtype):
                cache = model.prefill(tokens[:, :25], mask[:, :25])[1]
                assert (model.decode(tokens[:, 25:], cache).double() - expected).abs().max() < tolerance
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            loss = model(tokens, attention_mask=mask, labels=tokens).loss
        loss.backward()
        assert all(weight.grad.isfinite().all() and weight.grad.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers: expected an even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an int ≥ 1"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an int ≥ 1"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of the 8 query heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: expected an even number of query heads per KV head"),
        ({"sliding_window": 0}, "sliding_window: expected an int ≥ 1"),
        ({"self_decoder": "mamba"}, "self_decoder: expected one of"),
        ({"cross_position": "alibi"}, "cross_position: expected one of"),
        ({"sparse_mode": "per_head"}, "sparse_mode: expected one of"),
        ({"sparse_row_queries": "last"}, "sparse_row_queries: expected one of"),
        ({"sparse_row_queries": "all", "sparse_block_m": 2}, "sparse_row_queries: expected 'first'"),
        ({"sparse_budget": 2}, "sparse_budget: expected at least the 3 blocks"),
        ({"sparse_noise_budget": 2}, "sparse_noise_budget: expected at least the 3 blocks"),
        ({"sparse_block_m": 14}, "sparse_budget: expected at least the 7 blocks"),
        ({"sparse_local_blocks": 0}, "sparse_local_blocks: expected an int ≥ 1"),
        ({"sparse_block_n": 4.0}, "sparse_block_n: expected an int ≥ 1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: expected rope_type 'default'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: expected rope_type 'default'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: expected rope_type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: expected rope_type 'default'"),
        ({"rope_scaling": 2.0}, "rope_scaling: expected rope_type 'default'"),
        ({"rope_theta": 0}, "rope_theta: expected a number > 0, got 0"),
        ({"rope_theta": "10000"}, "rope_theta: expected a number > 0, got '10000'"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a number > 0, got nan"),
        ({"sparse_noise_budget": 6.0}, "sparse_noise_budget: expected an int ≥ 1, got 6.0"),
        ({"sparse_noise_budget": True}, "sparse_noise_budget: expected an int ≥ 1, got True"),
        ({"num_key_value_heads": True}, "num_key_value_heads: expected an int ≥ 1, got True"),
        ({"paged_backend": "flex"}, "paged_backend: expected one of .*'xformers'.* got 'flex'"),
        ({"attn_backend": "cudnn"}, "attn_backend: expected one of .*'triton'.* got 'cudnn'"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


def test_fields_set_later_are_checked_too():
    model, tokens = tiny_model(sparse_mode="pair_mean"), torch.ones(1, 8, dtype=torch.long)
    model.config.sparse_mode = "sparse"
    for call in (model, model.prefill):
        with pytest.raises(ValueError, match="sparse_mode: expected one of"):
            call(tokens)
    model.config.sparse_mode, model.config.sparse_noise_budget = "per_class", "6"
    for call in (model, model.prefill):
        with pytest.raises(ValueError, match="sparse_noise_budget: expected an int"):
            call(tokens)
    model.config.sparse_mode, model.config.sparse_noise_budget, model.config.sparse_budget = "pair_mean", None, 1
    for call in (model, model.prefill):
        with pytest.raises(ValueError, match="sparse_budget: expected at least the 3 blocks"):
            call(tokens)


def test_configuration_defaults():
    config = tiny_config(num_key_value_heads=None, head_dim=None, rope_parameters={"rope_theta": 500.0})
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 500.0)
    assert tiny_config(rope_scaling={"type": "default", "rope_theta": 500}).rope_theta == 500
    assert tiny_config(rope_scaling=None).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids, inputs_embeds: expected exactly one"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "input_ids: expected"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, "input_ids: expected"),
        ({"input_ids": torch.ones(2, 6)}, r"input_ids: expected int64 .* got float32 \[2, 6\]"),
        ({"input_ids": torch.ones(2, 6).bool()}, "input_ids: expected int64"),
        ({"input_ids": None, "inputs_embeds": torch.ones(2, 6, 32).long()}, "inputs_embeds: expected floating-point"),
        ({"input_ids": None, "inputs_embeds": torch.ones(2, 6, 31)}, r"inputs_embeds: expected .* \[B, T, 32\] .* 31"),
        ({"input_ids": None, "inputs_embeds": torch.ones(6, 32)}, "inputs_embeds: expected"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask: expected"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected"),
        ({"logits_to_keep": -1}, "logits_to_keep: expected an int"),
        ({"logits_to_keep": torch.tensor([6])}, "logits_to_keep: expected columns"),
        ({"logits_to_keep": torch.ones(2, 6).bool()}, "logits_to_keep: expected an int"),
        ({"logits_to_keep": True}, "logits_to_keep: expected an int or an integer tensor .* got True"),
        ({"logits_to_keep": False}, "logits_to_keep: expected an int or an integer tensor .* got False"),
        ({"logits_to_keep": torch.ones(6).bool()}, "logits_to_keep: expected an int or an integer tensor"),
        ({"position_ids": torch.arange(6)[None]}, "position_ids: not supported by this model, positions follow"),
        ({"output_attentions": True}, "output_attentions: not supported by this model, the attention weights"),
        ({"output_hidden_states": True}, "output_hidden_states: not supported by this model, the layers' outputs"),
        ({"attention_masks": torch.ones(2, 6)}, "attention_masks: not an argument of this model"),
    ],
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_calls_that_are_refused(arguments, message, use_cache):
    if arguments and "input_ids" not in arguments:
        arguments = {"input_ids": torch.ones(2, 6, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments, use_cache=use_cache)
