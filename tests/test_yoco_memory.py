"""Out of memory inside a prompt: the error names a chunk to try, and the cache is as it was before the call."""

import re

import pytest
import torch

from diffv2_sparse.yoco.memory import ChunkMemory
from tests.test_cache import assert_same, snapshot
from tests.tiny_yoco import VOCAB, ragged_tokens, tiny_model

MIB = 1 << 20


class Device:
    """Stands in for CUDA's allocator."""

    def __init__(self, monkeypatch, free: int):
        self.held = self.peak = 7 * MIB
        self.free = free
        for name, value in (("_allocated", "held"), ("_peak", "peak"), ("_free", "free")):
            monkeypatch.setattr(ChunkMemory, name, lambda _, value=value: getattr(self, value))

    def take(self, n: int) -> None:
        self.peak = max(self.peak, self.held + n)


def fail(device: Device, chunks, failed: int, taken: int) -> str:
    """The message after `chunks` (columns, bytes) that go through and one of `failed` columns that takes `taken`."""
    watch = ChunkMemory(torch.device("cpu"))
    for columns, n in chunks:
        with watch.chunk(columns):
            device.take(n)
    cause = torch.OutOfMemoryError("Tried to allocate")

    def run_out():
        with watch.chunk(failed):
            device.take(taken)
            raise cause

    with pytest.raises(torch.OutOfMemoryError) as raised:
        run_out()
    assert raised.value.__cause__ is cause
    return str(raised.value)


def tried(message: str) -> int:
    a, b = re.search(r"chunk_tokens=(\d+) .*prefill_chunk_size=(\d+)", message).groups()
    assert a == b
    return int(a)


@pytest.mark.parametrize(
    ("chunks", "taken", "free", "expected", "says"),
    [
        ([], 40 * MIB, 40 * MIB, 512, "failed chunk, which may have needed more"),  # it had filled the device
        ([], 40 * MIB, 25 * MIB, 256, "failed chunk"),  # twice 40 for 1024, so 20 for 256
        ([], 2 * MIB, 40 * MIB, 512, "failed chunk"),  # one large request
        ([], 0, 40 * MIB, 512, "prefill_chunk_size=512)."),  # below an older peak: nothing is known
        ([(1024, 30 * MIB)], 5 * MIB, 40 * MIB, 512, "the chunk before it, and the 40 MiB free now"),
        ([(1024, 30 * MIB)], 5 * MIB, 4 * MIB, 128, "the chunk before it"),  # 3.75 MiB
        ([(1024, 10 * MIB), (512, 30 * MIB)], 5 * MIB, 4 * MIB, 64, "the chunk before it"),  # the last one's 60 KiB
        ([(1024, 30 * MIB)], 5 * MIB, 0, 1, "the chunk before it"),
    ],
)
def test_the_size_to_try(chunks, taken, free, expected, says, monkeypatch):
    message = fail(Device(monkeypatch, free), chunks, 1024, taken)
    assert tried(message) == expected
    assert says in message
    assert "chunk of 1024 columns; try" in message


def test_one_column_cannot_be_halved(monkeypatch):
    assert "fewer sequences at once" in fail(Device(monkeypatch, 0), [], 1, 0)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^other$"), ChunkMemory(torch.device("cpu")).chunk(8):
        raise RuntimeError("other")


@pytest.mark.parametrize("self_decoder", ["sliding_window", "gated_retention"])
@pytest.mark.parametrize(("mode", "block_m"), [("pair_mean", 1), ("per_class", 3)])
def test_a_prompt_is_read_again_in_smaller_chunks(self_decoder, mode, block_m, monkeypatch):
    """The third chunk fails after its keys are written; the one that is told goes through, from the cache as it was."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    tokens, mask = ragged_tokens(48, (0, 9))
    cache = model.prefill(tokens[:, :13], mask[:, :13], model.new_cache(2, 60))[1]
    expected = model.prefill(tokens, mask, model.new_cache(2, 60), logits_to_keep=0)[0][:, 13:]
    before, seen, decoder = snapshot(cache), [], model.model
    norm = decoder.norm.forward

    def short(x):
        seen.append(x.shape[-2])
        if len(seen) == 3:
            raise torch.OutOfMemoryError("as if")
        return norm(x)

    monkeypatch.setattr(decoder.norm, "forward", short)
    call = {"attention_mask": mask, "cache": cache, "logits_to_keep": 0}
    with pytest.raises(torch.OutOfMemoryError) as raised:
        model.prefill(tokens[:, 13:], chunk_tokens=12, **call)
    assert len(seen) == 3
    assert_same(before, snapshot(cache))
    size = tried(str(raised.value))
    assert size == 5  # the third chunk has 11 columns
    logits, _ = model.prefill(tokens[:, 13:], chunk_tokens=size, **call)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_what_the_failed_chunk_held_is_let_go(monkeypatch):
    """Before free memory is measured: else the layers' tensors, alive in the traceback, would count as taken."""
    model, alive = tiny_model(), []
    last = model.model.cross_layers[-1].mlp

    def short(x):
        alive.append(torch.utils.weak.WeakTensorKeyDictionary())
        alive[-1][x] = True
        raise torch.OutOfMemoryError("as if")

    monkeypatch.setattr(last, "forward", short)
    monkeypatch.setattr(ChunkMemory, "_advice", lambda *_: f"{len(alive[-1])} alive")
    with pytest.raises(torch.OutOfMemoryError, match=r"^0 alive"):
        model.prefill(torch.ones(1, 8, dtype=torch.long))


def test_generate_says_it_too(monkeypatch):
    model = tiny_model()

    def short(_):
        raise torch.OutOfMemoryError("as if")

    monkeypatch.setattr(model.model.norm, "forward", short)
    for options, size in (({}, 10), ({"prefill_chunk_size": 8}, 4)):
        with pytest.raises(torch.OutOfMemoryError, match=f"prefill_chunk_size={size}"):
            model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=2, **options)


@pytest.mark.gpu
def test_the_advice_fits_on_a_device():
    """With little room left the size that is told goes through, or tells a smaller one. The room is this process's part
    of the device, so that others may use the rest meanwhile.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 64}
    model = tiny_model(torch.bfloat16, sparse_block_n=64, sliding_window=128, **sizes).cuda()
    tokens = torch.randint(1, VOCAB, (1, 1 << 17), device="cuda")
    cache = model.new_cache(1, 1 << 17)
    model.prefill(tokens[:, :256], cache=cache)  # compiles
    cache.reset()
    torch.cuda.empty_cache()
    sizes, size = [], 1 << 17
    room = torch.cuda.memory_reserved() + 512 * MIB
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        while True:
            try:
                model.prefill(tokens, cache=cache, chunk_tokens=size)
                break
            except torch.OutOfMemoryError as error:
                assert cache.tokens == (0,)
                size = tried(str(error))
                sizes.append(size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print("sizes told:", sizes)
    assert 1 <= len(sizes) <= 6
    assert cache.tokens == (1 << 17,)
