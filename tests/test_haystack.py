"""Haystacks: lengths exact to the byte, needles whole and in place, nothing of the test split in training."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffv2_sparse.haystack import (
    NEEDLE,
    PREAMBLE,
    QUESTION,
    TEST_CITIES,
    TRAIN_CITIES,
    Needle,
    documentation,
    draw_needles,
    make_prompt,
    plant,
    text_from_path,
)

PROSE = "One short line.\nAnother sentence follows. And one more, somewhat longer than the others are.\n" * 30
BACKGROUNDS = {
    "prose": PROSE,
    "no spaces": "x" * 3000,
    "multi-byte": "東京の地図は大きい。" * 200,
    "emoji": "🙂🙃" * 300,
    "short": "tiny",
}


def test_cities_are_held_out():
    assert len(TRAIN_CITIES) >= 40 <= len(TEST_CITIES)
    assert len({*TRAIN_CITIES, *TEST_CITIES}) == len(TRAIN_CITIES) + len(TEST_CITIES)


def test_held_out_documentation_is_nowhere_in_the_training_split():
    train, test = documentation("train"), documentation("test")
    assert len(test) > 50_000
    assert len(train) > 200_000
    in_train = {" ".join(p.split()) for p in train.split("\n\n")}
    assert not [p for p in test.split("\n\n") if p.strip() and " ".join(p.split()) in in_train]
    with pytest.raises(ValueError, match="'train' or 'test'"):
        documentation("dev")


@pytest.mark.parametrize("name", BACKGROUNDS)
@pytest.mark.parametrize("tokens", [300, 512, 777, 4096])
def test_prompt_is_exactly_as_long_as_asked(name, tokens):
    needles = draw_needles(TEST_CITIES, 2, random.Random(tokens))
    for trial in range(20):
        prompt = make_prompt(BACKGROUNDS[name], needles, 1, trial / 19, tokens, random.Random(trial))
        assert len(prompt.encode()) == tokens - 1  # <bos>
        assert prompt.startswith(PREAMBLE)
        assert prompt.endswith(QUESTION.format(city=needles[1].city))
        assert [prompt.count(needle.text) for needle in needles] == [1, 1]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_target_stands_at_its_depth(depth):
    needles = draw_needles(TEST_CITIES, 4, random.Random(3))
    for seed in range(10):
        prompt = make_prompt(PROSE, needles, 2, depth, 4096, random.Random(seed)).encode()
        others = sum(len(n.text.encode()) + 1 for n in needles)
        room = 4095 - len(PREAMBLE) - len(needles[2].question) - others
        before = prompt[len(PREAMBLE) : prompt.index(needles[2].text.encode())].decode()
        standing = len(before) - sum(len(n.text) + 1 for n in needles if n.text in before)
        assert 0 <= round(depth * room) - standing <= 64
        if depth in (0.0, 1.0):
            assert standing == depth * room


def test_prompt_depends_on_its_random_state_only():
    needles = draw_needles(TEST_CITIES, 3, random.Random(0))
    prompts = [make_prompt(PROSE, needles, 0, 0.5, 1024, random.Random(seed)) for seed in (5, 5, 6)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_needles_differ():
    needles = draw_needles(TEST_CITIES, 40, random.Random(1))
    assert len({n.city for n in needles}) == len({n.number for n in needles}) == 40
    assert needles[0].text == NEEDLE.format(city=needles[0].city, number=needles[0].number)
    with pytest.raises(ValueError, match="needles: expected 1 to"):
        draw_needles(TEST_CITIES, 41, random.Random(1))


@settings(max_examples=150, deadline=None)
@given(
    st.text(min_size=1).filter(lambda text: text.encode(errors="ignore").strip()),
    st.lists(st.tuples(st.text(min_size=1, max_size=20), st.floats(0, 1)), max_size=5),
    st.integers(0, 300),
)
def test_planting_is_exact(background, planted, extra):
    passages = ["<" + text.encode(errors="ignore").decode() + ">" for text, _ in planted]
    depths = [depth for _, depth in planted]
    length = sum(len(p.encode()) + 1 for p in passages) + extra
    text, offsets = plant(background, passages, depths, length)
    assert len(text) == length
    text.decode()  # valid UTF-8
    for passage, at in zip(passages, offsets):
        assert text[at : at + len(passage.encode())] == passage.encode()
    order = sorted(range(len(passages)), key=lambda i: depths[i])
    assert [offsets[i] for i in order] == sorted(offsets)
    bare = bytearray(text)
    for i in sorted(range(len(passages)), key=lambda i: -offsets[i]):
        del bare[offsets[i] : offsets[i] + len(passages[i].encode()) + 1]
    assert bytes(bare) == plant(background, [], [], extra)[0]  # nothing of the background lost or doubled


def test_passages_stand_after_a_line_a_sentence_or_a_word():
    for position in range(40):
        text, (at,) = plant(PROSE, ["@@"], [position / 39], 1500)
        assert text[:at].endswith((b"\n", b". ")) or at == 0
    text, (at,) = plant("word " * 400, ["@@"], [0.5], 1500)
    assert text[at - 5 : at + 7] == b"word @@ word"


def test_bad_arguments():
    with pytest.raises(ValueError, match="number: expected a string of 5 digits"):
        Needle("Rome", "123")
    needles = [Needle("Rome", "12345")]
    for arguments, message in [
        ((PROSE, needles, 0, 1.5, 512), r"depths: expected numbers in \[0, 1\], got 1.5"),
        ((PROSE, needles, 1, 0.5, 512), "target: expected the index of one of 1 needles, got 1"),
        ((PROSE, needles, 0, 0.5, 64), "length: expected at least"),
        (("  \n", needles, 0, 0.5, 512), "background: expected some text"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_prompt(*arguments, random.Random(0))


def test_text_from_path(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes(b"second \xff file")
    (tmp_path / "one.txt").write_text("first ü")
    (tmp_path / ".hidden").write_text("secret")
    assert text_from_path(tmp_path) == "second  file\n\nfirst ü"
    assert text_from_path(str(tmp_path / "one.txt")) == "first ü"
    (tmp_path / "empty").mkdir()
    for missing in ("nowhere.txt", "empty"):
        with pytest.raises(ValueError, match=missing):
            text_from_path(tmp_path / missing)
