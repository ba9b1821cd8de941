"""Tiny YOCO models in float64, whose budget of blocks bites after two dozen tokens, and ragged batches for them."""

import torch

from diffv2_sparse.yoco import DiffV2YocoConfig, DiffV2YocoForCausalLM

VOCAB = 64
ROWS = (  # sparse_mode, sparse_block_m; keys come in blocks of 4
    ("dense", 1),
    ("pair_mean", 1),
    ("per_class", 1),
    ("pair_mean", 3),  # rows straddle blocks
    ("per_class", 8),  # rows overlap two blocks
)


def tiny_config(**changes) -> DiffV2YocoConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "sparse_block_n": 4,
        "sparse_budget": 5,
        "sparse_noise_budget": 6,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return DiffV2YocoConfig(**sizes | changes)


def tiny_model(dtype: torch.dtype = torch.float64, **changes) -> DiffV2YocoForCausalLM:
    """Weights four times as large as usual, so that attention is sharp and a wrong list of blocks shows."""
    model = DiffV2YocoForCausalLM(tiny_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model


def ragged_tokens(columns: int, pads: tuple[int, ...], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[B, columns]`, `pads[b]` columns of sequence b being padding on one side."""
    tokens = torch.randint(1, VOCAB, (len(pads), columns))
    column = torch.arange(columns)
    real = torch.stack([column >= p if side == "left" else column < columns - p for p in pads])
    return tokens * real, real.long()


def check_checkpointed_gradients(model, use_reentrant: bool) -> None:
    """Every weight has a gradient, and the same with checkpointing as without."""
    tokens, mask = ragged_tokens(40, (0, 13))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    plain, again = gradients
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-12, atol=1e-14, msg=name)
