"""The training recipe: a YAML file in, a checkpoint that finds needles out.

    loss = cross-entropy of every byte + answer_weight · cross-entropy of the digits that answer a question

Resume, gradient accumulation, mixed precision, sharding and logging are those of `transformers.Trainer`; this file
adds the recipe, the choice of length and attention mode per step (sparse selection is on while it trains, as in
native sparse attention), the accuracy of the answers in the log, and slices of bounded time.
"""

import dataclasses
import inspect
import json
import time
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from .curriculum import Lesson, LessonBatches, Phase, draw_lesson
from .haystack import NUMBER_DIGITS
from .tokenizer import byte_tokenizer
from .yoco import DiffV2YocoConfig, DiffV2YocoForCausalLM

BUNDLED_RECIPE = Path(__file__).with_name("recipe.yaml")

_SET_BY_TRAIN = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
    "data_seed",
    "remove_unused_columns",
    "save_strategy",
    "save_total_limit",
    "logging_strategy",
}
_SAVE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainRecipe:
    """All that decides a training.

    Attributes:
        model: fields of `DiffV2YocoConfig`.
        phases: what is trained, one phase after the other.
        trainer: fields of `transformers.TrainingArguments`: optimizer, precision, workers, sharding, logging.
        tokens_per_batch: tokens of one forward pass on one device.
        answer_weight: weight of the answers' digits beside the loss of all text.
        save_dtype: "float32", "bfloat16" or "float16", of the final checkpoint.
        seed: of the data and of the initial weights.
    """

    model: dict
    phases: tuple[Phase, ...]
    trainer: dict = dataclasses.field(default_factory=dict)
    tokens_per_batch: int = 32768
    answer_weight: float = 1.0
    save_dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self):
        _refuse_ill_typed("", TrainRecipe, vars(self))
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        if self.save_dtype not in _SAVE_DTYPES:
            raise ValueError(f"save_dtype: expected one of {_SAVE_DTYPES}, got {self.save_dtype!r}")
        _refuse_unknown("model", self.model, set(inspect.get_annotations(DiffV2YocoConfig)))
        _refuse_unknown(
            "trainer", self.trainer, {f.name for f in dataclasses.fields(TrainingArguments)} - _SET_BY_TRAIN
        )
        vocab_size, tokens = DiffV2YocoConfig(**self.model).vocab_size, len(byte_tokenizer())
        if vocab_size < tokens:
            raise ValueError(f"vocab_size: expected at least the tokenizer's {tokens}, got {vocab_size}")

    @classmethod
    def from_yaml(cls, path: str | Path = BUNDLED_RECIPE) -> "TrainRecipe":
        """Reads a recipe.

        Raises:
            ValueError: the file is missing or not YAML, or lacks a key or has one that no recipe has, or a value is of
                another type or out of range.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"recipe: cannot read {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"recipe: {path} is not YAML: {error}") from error
        if not isinstance(content, dict) or not {"model", "phases"} <= content.keys():
            raise ValueError(f"recipe: expected a mapping with at least `model` and `phases` in {path}")
        _refuse_unknown("recipe", content, {f.name for f in dataclasses.fields(cls)})
        phases = content["phases"]
        if not _fits(phases, tuple[dict, ...]):
            raise ValueError(f"phases: expected a list of mappings, got {phases!r}")
        for i, phase in enumerate(phases):
            _refuse_unknown(f"phases[{i}]", phase, {f.name for f in dataclasses.fields(Phase)})
            _refuse_ill_typed(f"phases[{i}].", Phase, phase)
        return cls(**{**content, "phases": tuple(Phase(**phase) for phase in phases)})

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def lesson(self, step: int) -> Lesson:
        """Length, mode and budget of optimizer step `step`, counted from 0."""
        return draw_lesson(self.phases, self.seed, step)


def train(recipe: TrainRecipe, output: Path, *, max_minutes: float | None = None, resume: bool = True) -> Path:
    """Trains, or goes on training, and saves.

    The result does not depend on how often it was stopped between: a later call with the same output folder continues
    with the next step's data. The final checkpoint holds weights (safetensors) and tokenizer.

    Args:
        recipe: what to train.
        output: folder for checkpoints (the latest only) and the final model.
        max_minutes: stop and save before so many minutes have passed, after at least one step; None trains to the end.
        resume: continue from the latest checkpoint in `output`; False expects none there.

    Returns:
        `output / "final"` when the training is complete, else the folder of the checkpoint to continue from.

    Raises:
        ValueError: `output` has checkpoints of another training, or any at all without `resume`. Only the steps that
            are still to come may have changed, and `trainer` and `save_dtype`.
    """
    started = time.monotonic()
    output = Path(output)
    checkpoint = _latest_checkpoint(output)
    if checkpoint is not None:
        if not resume:
            raise ValueError(f"output: expected a folder without checkpoints when not resuming, got {output}")
        _refuse_other_training(recipe, checkpoint)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # an item is a whole batch
        seed=recipe.seed,
        remove_unused_columns=False,
        save_strategy="steps",
        save_total_limit=1,
        logging_strategy="steps",
        **{"report_to": "none", **recipe.trainer},
    )
    if args.n_gpu > 1:
        raise ValueError(f"devices: one process drives one GPU, got {args.n_gpu}; launch with torchrun or accelerate")

    set_seed(recipe.seed)
    model = DiffV2YocoForCausalLM(DiffV2YocoConfig(**recipe.model))
    batches_per_step = args.gradient_accumulation_steps * args.world_size
    batches = LessonBatches(recipe.phases, recipe.tokens_per_batch, recipe.seed, batches_per_step)
    limit = [] if max_minutes is None else [_TimeLimit(started + 60 * max_minutes)]
    trainer = NeedleTrainer(recipe, model=model, args=args, train_dataset=batches, callbacks=limit)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < recipe.steps:
        return _latest_checkpoint(output)
    return trainer.save_final(output / "final")


class NeedleTrainer(Trainer):
    """A Trainer whose every step has its own length, attention mode and budget, and that logs the answers' accuracy."""

    def __init__(self, recipe: TrainRecipe, **trainer_args):
        super().__init__(data_collator=_only_item, **trainer_args)
        self.model_accepts_loss_kwargs = False  # our loss is a mean; Trainer divides it by the accumulation steps
        self.recipe = recipe
        self._tally = _Tally()

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with _lesson_attention(self.model.config, self.recipe.lesson(self.state.global_step)):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]  # [B, T]
        rows, starts = inputs["answers"].T  # [N]
        outputs = model(input_ids=ids, use_cache=False)
        logits = outputs.logits[:, :-1].float()  # [B, T - 1, V]
        byte_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])

        digits = (
            starts[:, None] - 1 + torch.arange(NUMBER_DIGITS, device=ids.device)
        )  # [N, 5], where they are predicted
        places = rows[:, None], digits
        text_loss, answer_loss = byte_loss.mean(), byte_loss[places].mean()
        right = (logits.detach()[places].argmax(-1) == ids[:, 1:][places]).all(-1)  # [N]
        mode = self.recipe.lesson(self.state.global_step).mode
        self._tally.add(mode, ids.numel() * self.args.world_size, text_loss.detach(), answer_loss.detach(), right)

        loss = text_loss + self.recipe.answer_weight * answer_loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self._tally.read() | {"length": self.recipe.lesson(self.state.global_step - 1).length}
        super().log(logs, start_time)

    def save_final(self, folder: Path) -> Path:
        """Writes weights in the recipe's dtype and the tokenizer; returns the folder."""
        weights = self.accelerator.get_state_dict(self.model_wrapped)  # gathered, when sharded
        if self.args.should_save:
            model = DiffV2YocoForCausalLM(DiffV2YocoConfig(**self.recipe.model))
            model.load_state_dict(weights)
            model.to(getattr(torch, self.recipe.save_dtype)).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder


class _Tally:
    """Sums between two log lines, kept on the device so that no step waits for them."""

    def __init__(self):
        self._clear()

    def _clear(self):
        self.since, self.tokens, self.batches, self.losses = time.monotonic(), 0, 0, 0.0
        self.answers = {}  # mode: [right, asked]

    def add(self, mode, tokens, text_loss, answer_loss, right):
        self.tokens += tokens
        self.batches += 1
        self.losses = self.losses + torch.stack([text_loss, answer_loss])
        counted = self.answers.setdefault(mode, [0, 0])
        counted[0] = counted[0] + right.sum()
        counted[1] += right.numel()

    def read(self) -> dict[str, float]:
        if not self.batches:
            return {}
        text_loss, answer_loss = (self.losses / self.batches).tolist()
        accuracy = {f"right_{mode}": round(int(right) / asked, 4) for mode, (right, asked) in self.answers.items()}
        rate = round(self.tokens / (time.monotonic() - self.since))
        self._clear()
        return {"text_loss": round(text_loss, 4), "answer_loss": round(answer_loss, 4), "tokens_per_s": rate} | accuracy


class _TimeLimit(TrainerCallback):
    """Stops and saves when another step, and the saving, might end after the deadline (seconds of the monotonic
    clock). Ranks agree on it, as each has its own clock."""

    saving_s = 10.0

    def __init__(self, deadline: float):
        self.deadline, self.longest_s = deadline, 0.0

    def on_step_begin(self, args, state, control, **_):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.step_began)
        late = now + self.longest_s + self.saving_s > self.deadline
        if args.world_size > 1:
            agreed = torch.tensor(float(late), device=args.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            late = bool(agreed)
        if late:
            control.should_training_stop = control.should_save = True


@contextmanager
def _lesson_attention(config: DiffV2YocoConfig, lesson: Lesson):
    """The model attends as the lesson says, forward and backward."""
    before = config.sparse_mode, config.sparse_budget
    config.sparse_mode = lesson.mode
    config.sparse_budget = lesson.sparse_budget or config.sparse_budget
    try:
        yield
    finally:
        config.sparse_mode, config.sparse_budget = before


def _only_item(items: list[dict]) -> dict:
    return items[0]


def _latest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes its state file last."""
    complete = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _refuse_other_training(recipe: TrainRecipe, checkpoint: Path) -> None:
    """The checkpoint's steps must be those that `recipe` would have run."""
    output, done = checkpoint.parent, int(checkpoint.name.split("-")[1])
    kept = output / "recipe.json"
    if not kept.exists():
        return
    before, now = json.loads(kept.read_text()), json.loads(json.dumps(dataclasses.asdict(recipe)))
    for name in ("model", "seed", "tokens_per_batch", "answer_weight"):
        if before[name] != now[name]:
            raise ValueError(f"{name}: expected that of the checkpoints in {output}, {before[name]}, got {now[name]}")
    phases = tuple(Phase(**phase) for phase in before["phases"])
    if recipe.steps < done or any(draw_lesson(phases, recipe.seed, i) != recipe.lesson(i) for i in range(done)):
        raise ValueError(
            f"phases: expected those of the checkpoints in {output} for the {done} steps already run, {phases}, "
            f"got {recipe.phases}"
        )


def _refuse_ill_typed(where: str, cls: type, given: dict) -> None:
    """Of a dataclass: every field of `given` has its annotated type, and none without a default is missing."""
    for field in dataclasses.fields(cls):
        if field.name in given:
            if not _fits(given[field.name], field.type):
                kind = str(field.type) if typing.get_origin(field.type) else field.type.__name__
                raise ValueError(f"{where}{field.name}: expected {kind}, got {given[field.name]!r}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}{field.name}: expected, got none")


def _fits(value, kind) -> bool:
    """Whether a value from YAML is of an annotated type: a class, `X | None`, or `tuple[X, ...]`, which lists are."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, own) for own in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(own, typing.get_args(kind)[0]) for own in value)
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def _refuse_unknown(where: str, given: dict, known: set[str]) -> None:
    if unknown := sorted(set(given) - known, key=str):
        raise ValueError(f"{where}: expected keys among {sorted(known)}, got {unknown}")
