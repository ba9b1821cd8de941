"""Byte tokenizer: ids are bytes, the round trip is exact, and a saved one loads as itself."""

import pytest

pytest.importorskip("transformers")
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from diffv2_sparse.tokenizer import BOS, EOS, FIRST_BYTE, PAD, VOCAB_SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer()
HARD_TEXTS = [
    "",
    " ",
    "  a  b \n\n",
    "it 's n't . ,",
    "Zürich 東京 🙂",
    "\x00\x7f\xa0\u200b",
    "<bos>a<eos> <pad>",
    "\r\n\t",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_are_bytes_and_come_back(text):
    ids = TOKENIZER(text).input_ids
    assert ids == [BOS, *(FIRST_BYTE + byte for byte in text.encode())]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert bytes(i - FIRST_BYTE for i in ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_its_own_id():
    spelled = TOKENIZER.convert_ids_to_tokens(list(range(VOCAB_SIZE)))
    assert len(TOKENIZER) == VOCAB_SIZE == len(set(spelled)) == 259
    two_byte = "".join(chr(point) for point in range(0x80, 0x800))
    assert set(TOKENIZER(two_byte, add_special_tokens=False).input_ids) >= {
        FIRST_BYTE + b for b in range(0x80, 0xE0) if b not in (0xC0, 0xC1)
    }


def test_specials():
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (PAD, BOS, EOS) == (0, 1, 2)
    assert TOKENIZER.decode([BOS, FIRST_BYTE + ord("a"), EOS, PAD], skip_special_tokens=True) == "a"


def test_a_batch_is_padded_on_the_left():
    batch = TOKENIZER(["a", "abc"], padding=True)
    assert batch.input_ids[0] == [PAD, PAD, BOS, FIRST_BYTE + ord("a")]
    assert batch.attention_mask[0] == [0, 0, 1, 1]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_saved_tokenizer_loads_as_itself(tmp_path, text):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert (loaded.padding_side, loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == ("left", 0, 1, 2)
