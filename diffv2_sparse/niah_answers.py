"""Ask a model for the rest of a prompt, in one attention mode or several, and see what that takes.

A model of ours is run through `prefill` and `decode`, another Transformers model through `generate`. The **density** of
a mode is read off the block lists that the cross-decoder attends to for the answer's first token: selected visible keys
over visible keys, the mean over layers, KV heads, classes and prompts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import BlockSelection
from .yoco import attention as cross

MODES = ("dense", "pair_mean", "per_class")
ANSWER_TOKENS = 12  # five digits and some room for a tokenizer or a model that begins otherwise


@dataclass(frozen=True)
class Answers:
    """What a model generated for a batch, and what that took.

    Attributes:
        texts: one per prompt.
        density: share of the visible keys read for the first token; None for a model that does not tell.
        prefill_s, decode_s: seconds that the whole batch takes.
        decoded: tokens generated in `decode_s`, over the batch; the first one comes with the prefill.
    """

    texts: list[str]
    density: float | None
    prefill_s: float
    decode_s: float
    decoded: int


def ask(
    model,
    tokenizer,
    modes: Sequence[str],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:
    """Continue a batch of prompts greedily by ANSWER_TOKENS tokens, in each of some modes.

    A model of ours (see `has_modes`) reads the prompts once: modes differ in the cross-decoder, which runs for the last
    token only. Any other Transformers model answers through its `generate`.

    Args:
        input_ids, attention_mask: int64 [B, T], padded on the left; no mask where there is no padding.
        progress: called with (tokens done, tokens in all) of the prefill.

    Returns:
        Answers by mode; `prefill_s` is what a prefill in this mode alone takes.

    Raises:
        ValueError: a mode that the model does not have.
    """
    for mode in modes:
        check_mode(model, mode)
    with torch.inference_mode():
        if not has_modes(model):
            return {mode: _ask_generate(model, tokenizer, input_ids, attention_mask) for mode in modes}
        B, T = input_ids.shape
        whole = math.lcm(model.config.sparse_block_m, model.config.sparse_block_n)  # no row, no key block is left open
        common = (T - 1) // whole * whole if attention_mask is None else 0
        cache = model.new_cache(B, T + ANSWER_TOKENS)
        start = _now(input_ids.device)
        if common:
            nothing = torch.empty(0, dtype=torch.long)
            model.prefill(input_ids[:, :common], cache=cache, logits_to_keep=nothing, progress=progress)
        common_s = _now(input_ids.device) - start
        rest, answers = input_ids[:, common:], {}
        for mode in modes:
            fork = cache.fork()  # writes to blocks of its own, which it gives back to the next
            answers[mode] = _ask_in_mode(model, tokenizer, mode, rest, attention_mask, fork, common_s)
        return answers


def _ask_in_mode(model, tokenizer, mode, input_ids, attention_mask, cache, before_s) -> Answers:
    """The end of the prompts, input_ids [B, ≥ 1], and the answers; the rest is in the cache and took `before_s`."""
    device = input_ids.device
    with in_mode(model, mode):
        start = _now(device)
        with _cross_reads() as reads:
            logits, _ = model.prefill(input_ids, attention_mask, cache, logits_to_keep=1)
            tokens = [logits[:, -1:].argmax(-1)]  # [B, 1]
        prefilled = _now(device)
        for _ in range(ANSWER_TOKENS - 1):
            tokens.append(model.decode(tokens[-1], cache)[:, -1:].argmax(-1))
        decode_s = _now(device) - prefilled
    texts = _texts(tokenizer, torch.cat(tokens, dim=1))
    decoded = len(texts) * (ANSWER_TOKENS - 1)
    return Answers(texts, _density(reads), before_s + prefilled - start, decode_s, decoded)


def has_modes(model) -> bool:
    """Whether the model is one of ours: `prefill`, `decode` and a `config.sparse_mode` to switch."""
    return hasattr(model, "prefill") and hasattr(model, "decode") and hasattr(model.config, "sparse_mode")


def check_mode(model, mode: str) -> None:
    """ValueError for an unknown mode, or one that the model does not have."""
    if mode not in MODES:
        raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {mode!r}")
    if mode != "dense" and not has_modes(model):
        raise ValueError(f"modes: {type(model).__name__} has no sparse modes, only 'dense'; got {mode!r}")


@contextmanager
def in_mode(model, mode: str):
    """Run one of our models in a mode, then set it back to its own."""
    own = model.config.sparse_mode
    model.config.sparse_mode = mode
    try:
        yield
    finally:
        model.config.sparse_mode = own


@contextmanager
def _cross_reads() -> Iterator[list[tuple[Tensor, BlockSelection | None]]]:
    """Watch the cross-decoder read the shared cache; yields a list that grows by (keys per sequence, block lists)."""
    attend, reads = cross.diff_attention_paged, []

    def watched(q, lam_logit, pages, selection=None, **options):
        reads.append((pages.lengths, selection))
        return attend(q, lam_logit, pages, selection, **options)

    cross.diff_attention_paged = watched
    try:
        yield reads
    finally:
        cross.diff_attention_paged = attend


def _density(reads: list[tuple[Tensor, BlockSelection | None]]) -> float | None:
    """The mean, over sequences and layers, of selected visible keys over visible keys at each sequence's last token."""
    if not reads:
        return None
    each = [1.0 if lists is None else float(lists.density(1, keys)) for keys, lists in reads]
    return sum(len(keys) * density for (keys, _), density in zip(reads, each)) / sum(len(keys) for keys, _ in reads)


def _ask_generate(model, tokenizer, input_ids, attention_mask) -> Answers:
    B, T = input_ids.shape
    stamps = []

    def stamp(ids, scores, **_):
        stamps.append(_now(ids.device))
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = _now(input_ids.device)
    tokens = model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=padding,
        stopping_criteria=[stamp],
    )
    texts = _texts(tokenizer, tokens[:, T:])
    return Answers(texts, None, stamps[0] - start, stamps[-1] - stamps[0], B * (len(stamps) - 1))


def _texts(tokenizer, tokens: Tensor) -> list[str]:
    """Generated tokens [B, n] as text, each row up to its end of sequence."""
    rows = tokens.tolist()
    ends = [row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row) for row in rows]
    return [tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(rows, ends)]


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
