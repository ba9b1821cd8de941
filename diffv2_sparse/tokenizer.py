"""A tokenizer without a vocabulary file: one token is one byte of UTF-8.

Byte `b` has id `FIRST_BYTE + b`, after the three specials `<pad>`, `<bos>`, `<eos>`; encoding begins with `<bos>`.
It is a byte-level BPE with no merges, so that Transformers saves it with a checkpoint and `AutoTokenizer` loads it.
Text goes through unchanged: specials spelled out in it (`<eos>` in a web page) are bytes like any other.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
VOCAB_SIZE = FIRST_BYTE + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the bundled model: 259 ids, exact round trip for every text."""
    specials = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    letters = {letter: FIRST_BYTE + byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=specials | letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in ByteLevel's alphabet: printable Latin-1 bytes stand for
    themselves, the others take the letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]
