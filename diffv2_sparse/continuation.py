"""Continue a text, piece by piece: prefill once, then one token a step.

A model of ours is run through `prefill` (early exit: the cross-decoder sees one position) and `decode`; any other
Transformers model through its cached forward. A token is the likeliest, or drawn from softmax(logits / temperature).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from .niah_answers import check_mode, has_modes, in_mode


def stream(
    model,
    tokenizer,
    text: str,
    *,
    mode: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """Yield the continuation of a text as it comes, whole characters at a time, up to the end of sequence.

    Args:
        mode: attention mode of a model of ours; None is its own.
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.
        progress: called with (tokens done, tokens in all) of the prefill.

    Raises:
        ValueError: no tokens to continue or no room for new ones, a mode the model lacks, a number out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 or more and finite, got {temperature}")
    if mode is not None:
        check_mode(model, mode)
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)  # [1, T]
    if not input_ids.numel():
        raise ValueError("text: expected some text to continue, got none")
    maximum = getattr(model.config, "max_position_embeddings", None)
    if maximum is not None and input_ids.shape[1] + max_new_tokens > maximum:
        got = f"{input_ids.shape[1]} tokens of text and {max_new_tokens} new ones"
        raise ValueError(f"text: expected at most the model's {maximum} positions, got {got}")
    return _stream(model, tokenizer, input_ids, mode, max_new_tokens, temperature, seed, progress)


def _stream(model, tokenizer, input_ids, mode, max_new_tokens, temperature, seed, progress) -> Iterator[str]:
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens, shown = [], 0
    with torch.inference_mode(), nullcontext() if mode is None else in_mode(model, mode):
        for logits in _steps(model, input_ids, max_new_tokens, tokens, progress):  # [V]
            token = _choose(logits, temperature, generator)
            if token in ends:
                break
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # else in the middle of a character
                yield text[shown:]
                shown = len(text)
    yield tokenizer.decode(tokens, skip_special_tokens=True)[shown:]


def _steps(model, input_ids: Tensor, steps: int, tokens: list[int], progress) -> Iterator[Tensor]:
    """The next token's logits [V], `steps` times; the caller appends to `tokens` what it chose."""
    if has_modes(model):
        cache = model.new_cache(1, input_ids.shape[1] + steps)
        logits, cache = model.prefill(input_ids, cache=cache, logits_to_keep=1, progress=progress)
    else:
        told = model(input_ids, use_cache=True)
        logits, cache = told.logits, told.past_key_values
    yield logits[0, -1]
    for _ in range(steps - 1):
        last = torch.tensor([tokens[-1:]], device=input_ids.device)
        if has_modes(model):
            logits = model.decode(last, cache)
        else:
            told = model(last, past_key_values=cache, use_cache=True)
            logits, cache = told.logits, told.past_key_values
        yield logits[0, -1]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator))
