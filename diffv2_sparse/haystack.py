"""Haystacks and needles: the text that the bundled model is trained and measured on.

A **needle** states a five-digit number for a city; a **haystack** is real text that hides it; the prompt ends in the
needle's question, so that the number is the only right continuation. One token is one byte of UTF-8, so every length
here counts bytes, and a prompt is exactly as long as asked.

Held out from training, by name: the cities in `TEST_CITIES`, and the documentation topics whose name has a CRC-32
divisible by five (about a fifth of them; a rule by name stays the same when a Python version adds a topic). Topics
quote one another, so the training text also drops each paragraph that occurs in a held-out topic.

Source: the city–number protocol of YOCO (microsoft/unilm); depth sweep after gkamradt's needle-in-a-haystack test.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NEEDLE = "The special magic {city} number is: {number}."
QUESTION = "What is the special magic {city} number? The special magic {city} number is: "
PREAMBLE = "Somewhere in the text below, cities are given special magic numbers. Remember each of them.\n\n"
NUMBER_DIGITS = 5

TRAIN_CITIES = (
    *("Accra", "Amsterdam", "Ankara", "Auckland", "Baku", "Bangkok", "Bogota", "Boston", "Brussels", "Budapest"),
    *("Buenos Aires", "Cairo", "Casablanca", "Chicago", "Copenhagen", "Dakar", "Denver", "Dublin", "Geneva", "Hanoi"),
    *("Havana", "Istanbul", "Jakarta", "Karachi", "Kathmandu", "Las Vegas", "Lima", "Lisbon", "Madrid", "Manila"),
    *(
        "Melbourne",
        "Mexico City",
        "Milan",
        "Mumbai",
        "Nairobi",
        "New Orleans",
        "Oslo",
        "Panama City",
        "Prague",
        "Tunis",
    ),
)
TEST_CITIES = (
    *("Athens", "Baghdad", "Barcelona", "Beijing", "Berlin", "Cape Town", "Caracas", "Delhi", "Edinburgh", "Florence"),
    *("Hamburg", "Helsinki", "Houston", "Johannesburg", "Kyoto", "Lagos", "London", "Marseille", "Montreal", "Moscow"),
    *("Munich", "New York", "Osaka", "Paris", "Philadelphia", "Reykjavik", "Riga", "Rio de Janeiro", "Rome"),
    *("San Francisco", "Santiago", "Seattle", "Seoul", "Singapore", "Stockholm", "Sydney", "Tokyo", "Toronto"),
    *("Vienna", "Warsaw"),
)

_SNAP_BYTES = 64  # how far a passage may move back to stand after a line, a sentence or a word


@dataclass(frozen=True)
class Needle:
    """One hidden fact: `city` is any text, `number` a string of five digits."""

    city: str
    number: str

    def __post_init__(self):
        if len(self.number) != NUMBER_DIGITS or not (self.number.isascii() and self.number.isdigit()):
            raise ValueError(f"number: expected a string of {NUMBER_DIGITS} digits, got {self.number!r}")

    @property
    def text(self) -> str:
        """The sentence that goes into the haystack."""
        return NEEDLE.format(city=self.city, number=self.number)

    @property
    def question(self) -> str:
        """The prompt's end; `number` is its right continuation."""
        return QUESTION.format(city=self.city)


def draw_needles(cities: Sequence[str], count: int, rng: random.Random) -> list[Needle]:
    """`count` needles of different cities with random numbers, all different.

    Raises:
        ValueError: fewer than `count` cities.
    """
    if not 1 <= count <= len(cities):
        raise ValueError(f"needles: expected 1 to {len(cities)} (one per city), got {count}")
    numbers = rng.sample(range(10**NUMBER_DIGITS), count)
    return [Needle(city, f"{number:0{NUMBER_DIGITS}d}") for city, number in zip(rng.sample(cities, count), numbers)]


@cache
def documentation(split: str) -> str:
    """CPython's own documentation, as `pydoc_data.topics` of the running Python carries it.

    Args:
        split: "test" for the held-out topics, "train" for the others without the paragraphs they share with those.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    from pydoc_data.topics import topics

    held_out = {name for name in topics if zlib.crc32(name.encode()) % 5 == 0}
    if split == "test":
        return "\n\n".join(topics[name].strip() for name in sorted(held_out))
    secret = {_squeezed(p) for name in held_out for p in topics[name].split("\n\n")}
    kept = (p.rstrip() for name in sorted(topics.keys() - held_out) for p in topics[name].split("\n\n"))
    return "\n\n".join(p for p in kept if _squeezed(p) not in secret)


def text_from_path(path: str | Path) -> str:
    """The text of a file, or of all files below a directory (sorted by path, hidden ones left out, joined by blank
    lines). Bytes that are not UTF-8 are dropped.

    Raises:
        ValueError: nothing there, no text in it, or not readable; names the path.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"haystack: expected a file or directory of text, found nothing at {path}")
    files = [path]
    if path.is_dir():
        visible = (f for f in path.rglob("*") if not any(part.startswith(".") for part in f.relative_to(path).parts))
        files = sorted(f for f in visible if f.is_file())
    try:
        texts = [f.read_bytes().decode("utf-8", errors="ignore").strip() for f in files]
    except OSError as error:
        raise ValueError(f"haystack: cannot read {error.filename or path}: {error.strerror}") from error
    joined = "\n\n".join(text for text in texts if text)
    if not joined:
        raise ValueError(f"haystack: expected text at {path}, found none")
    return joined


def plant(
    background: str | bytes, passages: Sequence[str], depths: Sequence[float], length: int
) -> tuple[bytes, list[int]]:
    """Hides passages in a text of exactly `length` bytes of valid UTF-8.

    Each passage goes in where its depth falls in the remaining background (0 is the start, 1 the end), moved back to
    the end of a line or sentence, else of a word, where one is near. Background is cut at its end, or repeated.

    Args:
        background: the haystack; invalid UTF-8 in it is dropped.
        passages: texts to hide; those of equal depth keep their order.
        depths: one number in [0, 1] per passage.
        length: bytes of the result.

    Returns:
        The text, and the byte offset of each passage in it, in the order of `passages`.

    Raises:
        ValueError: a depth outside [0, 1], another number of depths, an empty background, or a `length` too short
            for the passages.
    """
    if len(depths) != len(passages):
        raise ValueError(f"depths: expected one per passage ({len(passages)}), got {len(depths)}")
    for depth in depths:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depths: expected numbers in [0, 1], got {depth}")
    encoded = [passage.encode() for passage in passages]
    room = length - sum(len(passage) + 1 for passage in encoded)  # one separator after each
    if room < 0:
        raise ValueError(f"length: expected at least {length - room} bytes for the passages alone, got {length}")
    filler = _filler(background, room)

    pieces, offsets = [], [0] * len(passages)
    taken = written = 0
    for i in sorted(range(len(passages)), key=lambda i: depths[i]):
        at = _boundary(filler, round(depths[i] * room))
        before = filler[taken:at]
        offsets[i] = written + len(before)
        separator = b"\n" if filler[at - 1 : at] == b"\n" else b" "
        pieces += [before, encoded[i], separator]
        taken, written = at, offsets[i] + len(encoded[i]) + 1
    return b"".join([*pieces, filler[taken:]]), offsets


def make_prompt(
    background: str, needles: Sequence[Needle], target: int, depth: float, context_tokens: int, rng: random.Random
) -> str:
    """A prompt that asks for one of the needles it hides.

    Args:
        background: the haystack; the prompt reads it from a random place on, going round at its end.
        needles: all needles to hide.
        target: index of the needle that is asked for.
        depth: where the target stands, in [0, 1]; the others stand at random depths.
        context_tokens: length of the tokenised prompt, its leading `<bos>` included.
        rng: draws the place in the background and the other depths.

    Returns:
        Text whose tokens, with `<bos>`, are exactly `context_tokens`, ending in the target's question.

    Raises:
        ValueError: no such target, or one of `plant`'s.
    """
    if not 0 <= target < len(needles):
        raise ValueError(f"target: expected the index of one of {len(needles)} needles, got {target}")
    start = rng.randrange(max(1, len(background)))
    start = background.rfind("\n", 0, start) + 1
    depths = [depth if i == target else rng.random() for i in range(len(needles))]
    question = needles[target].question
    length = context_tokens - 1 - len(PREAMBLE.encode()) - len(question.encode())  # <bos>
    body, _ = plant(background[start:] + "\n" + background[:start], [n.text for n in needles], depths, length)
    return PREAMBLE + body.decode() + question


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _filler(background: str | bytes, length: int) -> bytes:
    """Valid UTF-8 of exactly `length` bytes that ends a line."""
    if isinstance(background, str):
        background = background.encode(errors="ignore")
    if not background.strip():
        raise ValueError("background: expected some text, got none")
    if length == 0:
        return b""
    repeated = background if len(background) >= length else (background + b"\n") * (length // len(background) + 1)
    return repeated[: length - 1].decode("utf-8", errors="ignore").encode().ljust(length, b"\n")


def _boundary(filler: bytes, position: int) -> int:
    """The place at or closely before `position` where a passage disturbs the text least; later for a later position."""
    if position in (0, len(filler)):
        return position
    low = max(0, position - _SNAP_BYTES)
    sentence = max(filler.rfind(b"\n", low, position) + 1, filler.rfind(b". ", low, position) + 2)
    if sentence > low + 1:
        return sentence
    word = filler.rfind(b" ", low, position) + 1
    if word > low:
        return word
    while position > 0 and filler[position] & 0xC0 == 0x80:  # inside a character
        position -= 1
    return position
