"""Needle in a haystack: can a model, in each attention mode, find the number that a long text hides?

A **cell** is (mode, context length, depth, number of needles). Each of its trials hides city–number needles in real
text, one of them (the target) at the cell's depth, asks for the target, and continues greedily; the trial is correct
when the generated text contains the number. Prompts depend on (seed, length, depth, needles, trial) alone, so all modes
read the very same texts.

Beside the accuracy stands its price: **density**, the share of the visible keys that the cross-decoder reads for the
answer's first token (measured on the lists it used: the mean over layers, KV heads, classes and trials), and the time
of the prefill and of a decoded token.

Source: the city–number protocol of YOCO (microsoft/unilm); resumable cells and the heat map as in gkamradt's test.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import haystack
from .environment import hardware, versions
from .niah_answers import ANSWER_TOKENS, MODES, Answers, ask, check_mode
from .niah_cells import Cell, CellStore, sources_digest, tensor_bytes, weights_digest

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Prompts:
    """The trials of a cell, whatever its mode.

    Attributes:
        input_ids, attention_mask: int64 [trials, context_tokens]. Byte-level prompts fill a row exactly; another
            tokenizer's may begin with padding.
        answers: the number that each trial asks for.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answers: tuple[str, ...]

    def digest(self) -> str:
        told = hashlib.sha256(tensor_bytes(self.input_ids))
        told.update(tensor_bytes(self.attention_mask))
        told.update(" ".join(self.answers).encode())
        return told.hexdigest()


# Prompts


def cell_prompts(
    tokenizer, background: str, *, context_tokens: int, depth: float, needles: int, trials: int, seed: int
) -> Prompts:
    """The prompts of a cell. Each is drawn from (seed, context_tokens, depth, needles, trial) and nothing else.

    Raises:
        ValueError: the context is too short for the needles and the question, or no prompt of that length can be made.
    """
    sample = background[:10_000]
    bytes_per_token = len(sample.encode()) / max(1, len(tokenizer(sample, add_special_tokens=False)["input_ids"]))
    rows, answers = [], []
    for trial in range(trials):
        key = f"{seed} {context_tokens} {float(depth)} {needles} {trial}"
        rng = random.Random(key)
        drawn = haystack.draw_needles(haystack.TEST_CITIES, needles, rng)
        target = rng.randrange(needles)

        def text(length: int, drawn=drawn, target=target, key=key) -> str:
            return haystack.make_prompt(background, drawn, target, depth, length, random.Random(f"{key} text"))

        try:
            rows.append(_tokens_of_length(tokenizer, text, context_tokens, bytes_per_token))
        except ValueError as error:
            raise ValueError(
                f"lengths: cannot hide {needles} needle(s) and ask for one in {context_tokens} tokens ({error})"
            ) from error
        answers.append(drawn[target].number)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = torch.full((trials, context_tokens), padding)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, context_tokens - len(row) :] = torch.tensor(row)
        attention_mask[i, context_tokens - len(row) :] = 1
    return Prompts(input_ids, attention_mask, tuple(answers))


def _tokens_of_length(tokenizer, text: Callable[[int], str], context_tokens: int, bytes_per_token: float) -> list[int]:
    """The tokens of a text made to fill `context_tokens`. `text` takes a number of bytes: `context_tokens` of them for
    the byte-level tokenizer; for another one that number is sought, and a prompt within 2 % below is accepted."""
    length, best = int(context_tokens * bytes_per_token), []
    for _ in range(10):
        tokens = tokenizer(text(length))["input_ids"]
        if len(best) < len(tokens) <= context_tokens:
            best = tokens
        if len(best) >= 0.98 * context_tokens:
            return best
        length = int(length * 0.99 * context_tokens / len(tokens))
    raise ValueError(f"the nearest prompt has {len(best)} tokens")


# Cells


def measure(
    model,
    tokenizer,
    modes: Sequence[str],
    prompts: Prompts,
    *,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict]:
    """Ask all prompts in each mode.

    Args:
        batch: how many prompts run together; None is all of them.
        progress: called with the prompt tokens done, of trials × context_tokens.

    Returns:
        By mode {correct, accuracy, density, prefill_s, decode_ms_per_token}. The two times are per prompt and per token
        of one prompt: a batch's time over its prompts.
    """
    trials, tokens = prompts.input_ids.shape
    step = batch or trials
    told: list[dict[str, Answers]] = []
    for first in range(0, trials, step):
        ids = prompts.input_ids[first : first + step].to(model.device)
        mask = prompts.attention_mask[first : first + step]
        mask = None if bool(mask.all()) else mask.to(model.device)

        def tell(done: int, total: int, first=first, ids=ids):
            progress(first * tokens + ids.numel() * done // total)

        told.append(ask(model, tokenizer, modes, ids, mask, tell if progress else None))
    return {mode: _measured(prompts, [answers[mode] for answers in told]) for mode in modes}


def _measured(prompts: Prompts, told: list[Answers]) -> dict:
    """The result of one mode over all batches."""
    trials = len(prompts.answers)
    texts = [text for answers in told for text in answers.texts]
    correct = sum(number in text for number, text in zip(prompts.answers, texts))
    decoded = sum(answers.decoded for answers in told)
    density = None
    if told[0].density is not None:
        density = sum(answers.density * len(answers.texts) for answers in told) / trials
    return {
        "correct": correct,
        "accuracy": correct / trials,
        "density": density,
        "prefill_s": sum(answers.prefill_s for answers in told) / trials,
        "decode_ms_per_token": 1000 * sum(answers.decode_s for answers in told) / decoded if decoded else None,
    }


def evaluate(
    model,
    tokenizer,
    background: str,
    *,
    output: Path,
    lengths: Sequence[int],
    depths: Sequence[float],
    needles: Sequence[int] = (1,),
    trials: int = 5,
    modes: Sequence[str] = MODES,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[dict]:
    """Measure every cell of modes × lengths × depths × needles that `output` does not hold yet.

    Args:
        model: a Transformers model in eval mode; sparse modes need one of ours, whose `config.sparse_mode` is switched
            while it is asked.
        tokenizer: the model's.
        background: the haystack's text.
        output: a folder, made if missing; finished cells are kept in `output/cells`.
        lengths: tokens of a prompt, question included.
        depths: where the target stands in the text, 0 … 1.
        needles: how many needles a prompt hides; one of them is asked for.
        trials: prompts per cell, run as one batch, or `batch` at a time.
        progress: called with (prompt tokens done, in all, what is being done); cells found on disk do not count.

    Returns:
        One record per cell, by mode, needles, length and depth: {mode, context_tokens, depth, needles, trials, correct,
        accuracy, density, prefill_s, decode_ms_per_token}; the last five as `measure` has them.

    Raises:
        ValueError: an argument is out of range, a prompt cannot be made, or the model lacks a mode.
        OSError: a cell cannot be written. Cells finished before stay.
    """
    _check(model, lengths, depths, needles, trials, modes, batch)
    ground = {"versions": versions(), "hardware": hardware(model.device), "batch": batch}
    ground |= {"weights": weights_digest(model), "sources": sources_digest()}
    store = CellStore(Path(output) / "cells", ground)

    def prompts_of(length: int, depth: float, count: int) -> Prompts:
        return cell_prompts(
            tokenizer, background, context_tokens=length, depth=depth, needles=count, trials=trials, seed=seed
        )

    records, missing = {}, []  # missing: ((length, depth, needles), digest of the prompts, cells), short prompts first
    for shared in itertools.product(sorted(set(lengths)), sorted(map(float, set(depths))), sorted(set(needles))):
        digest = prompts_of(*shared).digest()
        cells = [Cell(mode, *shared, trials) for mode in dict.fromkeys(modes)]
        records |= {cell: store.find(cell, digest) for cell in cells}
        if todo := [cell for cell in cells if records[cell] is None]:
            missing.append((shared, digest, todo))

    done, total = 0, sum(length * trials for (length, _, _), _, _ in missing)
    for shared, digest, todo in missing:
        prompts = prompts_of(*shared)  # made again rather than kept: long prompts would fill the memory
        own_modes = [cell.mode for cell in todo]
        if done == 0:  # the first call loads, allocates and compiles: no mode's price
            ask(model, tokenizer, modes, prompts.input_ids[:1, -256:].to(model.device))

        def tell(tokens: int, shared=shared, done=done):
            length, depth, count = shared
            progress(done + tokens, total, f"{length} tokens, {count} needle(s), depth {depth:.0%}")

        measured = measure(model, tokenizer, own_modes, prompts, batch=batch, progress=tell if progress else None)
        for cell in todo:
            records[cell] = {**asdict(cell), **measured[cell.mode]}
            store.keep(cell, digest, records[cell])
        done += trials * shared[0]
        if progress:
            progress(done, total, "")
    cells = sorted(records, key=lambda cell: (list(modes).index(cell.mode), cell.needles))  # stable: then length, depth
    return [records[cell] for cell in cells]


def _check(model, lengths, depths, needles, trials, modes, batch) -> None:
    for name, values in {"lengths": lengths, "depths": depths, "needles": needles, "modes": modes}.items():
        if not values:
            raise ValueError(f"{name}: expected at least one, got none")
    for mode in modes:
        check_mode(model, mode)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths: expected numbers from 0 to 1, got {depth}")
    counts = {"trials": trials, "needles": min(needles), "lengths": min(lengths)}
    for name, value in (counts if batch is None else counts | {"batch": batch}).items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    maximum = getattr(model.config, "max_position_embeddings", None)
    if maximum is not None and max(lengths) + ANSWER_TOKENS > maximum:
        need = f"{max(lengths)} tokens and an answer of {ANSWER_TOKENS}"
        raise ValueError(f"lengths: expected prompts that fit the model's {maximum} positions, got {need}")
