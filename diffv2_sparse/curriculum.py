"""What the model reads while it trains: real text with needles planted in it and questions about them.

A **phase** fixes for some steps how long sequences are, how dense with needles, and which attention modes train. A
**lesson** is one step's draw from its phase. The stream of batches is a function of the seed and the batch number
alone, so an interrupted training continues with the very batches it would have seen.

One answer per text would teach slowly, so a sequence asks many questions: right after a needle, far behind it, and at
the end, where the evaluation asks. Most cities are invented, so that matching the name letter by letter is the only
way to be right, and some differ from another city of the sequence in a few letters.
"""

import random
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .haystack import NUMBER_DIGITS, PREAMBLE, QUESTION, TEST_CITIES, TRAIN_CITIES, Needle, documentation, plant
from .tokenizer import BOS, FIRST_BYTE

MODES = ("dense", "pair_mean", "per_class")
SHORTEST_SEQUENCE = 256  # a needle, its question and some text around them

_LONGEST_CITY = 18  # letters
_LONGEST_PASSAGE = len(QUESTION.format(city="")) + 2 * _LONGEST_CITY + NUMBER_DIGITS + 2  # "." and a separator
_LONELY = 0.15  # this share of the sequences hides one needle only
_BACKGROUNDS = {"code": 0.45, "prose": 0.25, "lines": 0.15, "words": 0.15}  # kind: share of the sequences
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "dr", "gr", "kl", "sh", "st", "th", "tr")
_VOWELS = (*"aeiouaeiouy", "ai", "ea", "ou")
_CODAS = (*"nrslmtk", "nd", "rg", "ck")


@dataclass(frozen=True)
class Phase:
    """Some steps of training of one kind; each step draws one of `lengths` and one of `modes`.

    Attributes:
        steps: optimizer steps.
        lengths: tokens per sequence.
        modes: values of the model's `sparse_mode`.
        needle_share: at most this share of a sequence is needles and questions, in (0, 1).
        sparse_budget: key blocks per query while this phase runs; None is the model's own budget.
    """

    steps: int
    lengths: tuple[int, ...]
    modes: tuple[str, ...] = ("dense",)
    needle_share: float = 0.4
    sparse_budget: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "modes", tuple(self.modes))
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not self.lengths or min(self.lengths) < SHORTEST_SEQUENCE:
            raise ValueError(f"lengths: expected tokens per sequence, each >= {SHORTEST_SEQUENCE}, got {self.lengths}")
        if not self.modes or not set(self.modes) <= set(MODES):
            raise ValueError(f"modes: expected some of {MODES}, got {self.modes}")
        if not 0.0 < self.needle_share < 1.0:
            raise ValueError(f"needle_share: expected a number between 0 and 1, got {self.needle_share}")


@dataclass(frozen=True)
class Lesson:
    """One optimizer step's draw from its phase."""

    length: int
    mode: str
    sparse_budget: int | None
    needle_share: float


def draw_lesson(phases: tuple[Phase, ...], seed: int, step: int) -> Lesson:
    """The lesson of optimizer step `step`, counted from 0.

    Raises:
        IndexError: the phases end before.
    """
    rng = random.Random(f"lesson {seed} {step}")
    for phase in phases:
        if step < phase.steps:
            return Lesson(rng.choice(phase.lengths), rng.choice(phase.modes), phase.sparse_budget, phase.needle_share)
        step -= phase.steps
    raise IndexError("step lies behind the last phase")


class LessonBatches(Dataset):
    """The batches of a training: item i is the whole i-th batch, for optimizer step `i // batches_per_step`.

    An item has `input_ids`, int64 [tokens_per_batch // length, length], and `answers`, int64 [N, 2]: row and position
    of the first digit of each number that can be known from the text before it.
    """

    def __init__(self, phases: tuple[Phase, ...], tokens_per_batch: int, seed: int, batches_per_step: int = 1):
        longest = max(length for phase in phases for length in phase.lengths)
        if tokens_per_batch < longest:
            raise ValueError(
                f"tokens_per_batch: expected at least the longest sequence, {longest}, got {tokens_per_batch}"
            )
        self.phases, self.tokens_per_batch, self.seed = phases, tokens_per_batch, seed
        self.batches_per_step = batches_per_step
        self.corpus = training_corpus()

    def __len__(self) -> int:
        return self.batches_per_step * sum(phase.steps for phase in self.phases)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        lesson = draw_lesson(self.phases, self.seed, index // self.batches_per_step)
        rows = self.tokens_per_batch // lesson.length
        input_ids = np.full((rows, lesson.length), BOS, dtype=np.int64)
        answers = []
        for row in range(rows):
            rng = random.Random(f"text {self.seed} {index} {row}")
            text, places = draw_text(self.corpus, lesson.length - 1, lesson.needle_share, rng)
            input_ids[row, 1:] = np.frombuffer(text, dtype=np.uint8)
            input_ids[row, 1:] += FIRST_BYTE
            answers += [(row, place + 1) for place in places]
        return {"input_ids": torch.from_numpy(input_ids), "answers": torch.tensor(answers, dtype=torch.int64)}


def draw_text(
    corpus: dict[str, bytes], length: int, needle_share: float, rng: random.Random
) -> tuple[bytes, list[int]]:
    """A text of `length` bytes that asks for the needles it hides.

    Returns:
        The text, and the offset of the first digit of each number that the text before it determines.
    """
    tail_questions = 1 if length < 1024 else rng.randint(1, 4)
    spend = 0 if rng.random() < _LONELY else length * needle_share * rng.random() ** 0.5
    needles = [_draw_needle([], rng)]
    stated_at = [rng.random()]
    passages, depths, known = [needles[0].text], [stated_at[0]], [False]
    room = length - (tail_questions + 1) * _LONGEST_PASSAGE  # for the tail, and for one passage more
    while (used := sum(len(passage) + 1 for passage in passages)) < spend and used <= room:
        if rng.random() < 0.4:
            needles.append(_draw_needle(needles, rng))
            stated_at.append(rng.random())
            passages.append(needles[-1].text)
            depths.append(stated_at[-1])
            known.append(False)
        else:
            i = rng.randrange(len(needles))
            question = needles[i].question + needles[i].number + "."
            passages.append(question if rng.random() < 0.5 else needles[i].text)
            depths.append(rng.uniform(stated_at[i], 1.0))
            known.append(True)

    asked = rng.sample(needles, min(tail_questions, len(needles)))
    tail = "\n".join(needle.question + needle.number + "." for needle in asked).encode()
    head = PREAMBLE.encode() if rng.random() < 0.9 and used + len(tail) + len(PREAMBLE) <= length else b""
    body_length = length - len(head) - len(tail)
    body, offsets = plant(draw_background(corpus, body_length, rng), passages, depths, body_length)

    ends = [len(head) + at + len(passage) for at, passage, later in zip(offsets, passages, known) if later]
    end = len(head) + len(body) - 1
    for needle in asked:
        end += 1 + len(needle.question) + NUMBER_DIGITS + 1
        ends.append(end)
    return head + body + tail, [end - 1 - NUMBER_DIGITS for end in ends]


def draw_background(corpus: dict[str, bytes], length: int, rng: random.Random) -> bytes:
    """About `length` bytes of text of a random kind: code, prose, either with its lines shuffled, or random words."""
    kind = rng.choices(list(_BACKGROUNDS), list(_BACKGROUNDS.values()))[0]
    if kind == "words":
        words = rng.choices(_vocabulary(), k=length // 4 + 1)
        ends = rng.choices((b" ", b", ", b". ", b".\n", b"\n"), (80, 6, 6, 4, 4), k=len(words))
        return b"".join(piece for pair in zip(words, ends) for piece in pair)
    text = corpus[kind] if kind in corpus else corpus[rng.choice(sorted(corpus))]
    start = rng.randrange(max(1, len(text) - length))
    piece = text[start : start + length]
    if kind == "lines":
        lines = piece.split(b"\n")
        rng.shuffle(lines)
        piece = b"\n".join(lines)
    return piece if piece.strip() else draw_background(corpus, length, rng)


def invent_city(rng: random.Random) -> str:
    """A capitalised name of one to three words and 3 to 18 letters; never one of `TEST_CITIES`."""
    while True:
        words = rng.choices((1, 2, 3), (6, 3, 1))[0]
        city = " ".join(_invent_word(rng) for _ in range(words))
        if 3 <= len(city) <= _LONGEST_CITY and city not in TEST_CITIES:
            return city


@cache
def training_corpus() -> dict[str, bytes]:
    """Real text by kind: "code", the standard library's Python sources, and "prose", `documentation("train")`.

    A source file that repeats a line of the held-out documentation is left out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    secret = {line for line in map(str.strip, documentation("test").split("\n")) if len(line) >= 60}
    sources = []
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "pydoc_data"} & set(path.relative_to(library).parts):
            source = path.read_bytes().decode("utf-8", errors="ignore")
            if secret.isdisjoint(map(str.strip, source.split("\n"))):
                sources.append(source)
    return {"code": "\n\n".join(sources).encode(), "prose": documentation("train").encode()}


@cache
def _vocabulary() -> list[bytes]:
    return sorted(set(re.findall(rb"[A-Za-z0-9'-]+", documentation("train").encode())))


def _draw_needle(others: list[Needle], rng: random.Random) -> Needle:
    """A needle for a city that the sequence does not have yet."""
    taken = {needle.city for needle in others}
    while True:
        kind = rng.random()
        if others and kind < 0.2:
            city = _sibling(rng.choice(others).city, rng)
        else:
            city = rng.choice(TRAIN_CITIES) if kind < 0.4 else invent_city(rng)
        if city not in taken:
            return Needle(city, f"{rng.randrange(10**NUMBER_DIGITS):0{NUMBER_DIGITS}d}")


def _sibling(city: str, rng: random.Random) -> str:
    """A city that is easily taken for another: it shares the beginning, the end, or one word."""
    other = invent_city(rng)
    cut = rng.randint(1, len(city))
    candidates = (city[:cut] + other[-2:].lower(), other[:2] + city[cut:], f"{city.split()[0]} {other.split()[-1]}")
    sibling = rng.choice(candidates).strip()
    return sibling if 3 <= len(sibling) <= _LONGEST_CITY and sibling not in TEST_CITIES else other


def _invent_word(rng: random.Random) -> str:
    syllables = (
        (rng.choice(_ONSETS) if rng.random() < 0.8 else "")
        + rng.choice(_VOWELS)
        + (rng.choice(_CODAS) if rng.random() < 0.5 else "")
        for _ in range(rng.choices((1, 2, 3, 4), (2, 5, 3, 1))[0])
    )
    return "".join(syllables).capitalize()
