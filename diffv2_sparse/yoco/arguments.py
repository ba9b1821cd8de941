"""What a call of the model may be given. Every function raises ValueError, naming the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration import DiffV2YocoConfig

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index")  # of Transformers' loss; Trainer passes the first
NOT_SUPPORTED = {
    "position_ids": "positions follow from attention_mask",
    "output_attentions": "the attention weights are never formed",
    "output_hidden_states": "the layers' outputs are not kept",
}


def tokens_or_embeddings(config: DiffV2YocoConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of the two that was given: int64 or int32 `[B, T]`, or floating `[B, T, hidden_size]`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
    if inputs_embeds is None:
        if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected int64 [B, T] with at least one token, got {_kind(input_ids)}")
        return input_ids
    size = config.hidden_size
    shape_fits = inputs_embeds.ndim == 3 and inputs_embeds.shape[2] == size and inputs_embeds.numel()
    if not shape_fits or not inputs_embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds: expected floating-point [B, T, {size}] with at least one token, got {_kind(inputs_embeds)}"
        )
    return inputs_embeds


def check_labels(logits_to_keep: int | Tensor, cached: bool) -> None:
    """Labels need the logits of all columns and, where gradients are wanted, a pass that carries them."""
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
        raise ValueError(f"logits_to_keep: expected 0 with labels, which cover every column, got {logits_to_keep!r}")
    if cached and torch.is_grad_enabled():
        raise ValueError(
            "labels: a cache carries no gradients, so only the head would train; pass use_cache=False and no "
            "past_key_values, or call under torch.no_grad()"
        )


def loss_arguments(given: dict) -> dict:
    """Those of `given` that the loss takes; anything else must be None or False, which ask for nothing."""
    for name, value in given.items():
        if name in LOSS_ARGUMENTS or value is None or value is False:
            continue
        if name in NOT_SUPPORTED:
            raise ValueError(f"{name}: not supported by this model, {NOT_SUPPORTED[name]}")
        raise ValueError(f"{name}: not an argument of this model")
    return {name: value for name, value in given.items() if name in LOSS_ARGUMENTS}


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
