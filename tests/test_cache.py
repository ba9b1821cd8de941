"""The shared cache: its pages and summaries, what it refuses, and that a failed call leaves no trace."""

import copy
import pickle
import random

import pytest
import torch

from diffv2_sparse.cache import CacheSpec, SharedKVCache
from diffv2_sparse.selectors import block_summaries
from diffv2_sparse.yoco.layout import WindowReach, spans
from tests.tiny_yoco import ragged_tokens, tiny_model

H, D, BLOCK_N = 2, 8, 6


def empty_cache(B: int = 3, capacity: int = 50, dtype: torch.dtype = torch.float32) -> SharedKVCache:
    spec = CacheSpec("sliding_window", 5, 1, 1, 4, H, D, "none", BLOCK_N, dtype, torch.device("cpu"))
    return SharedKVCache(spec, B, capacity)


def append(cache: SharedKVCache, k: list[torch.Tensor], v: list[torch.Tensor], counts: tuple[int, ...]) -> None:
    """Appends the next `counts[b]` of each sequence's keys `[S, H, D]`."""
    cuts = [slice(own, own + count) for own, count in zip(cache.tokens, counts)]
    news = [torch.cat([x[cut] for x, cut in zip(own, cuts)]) for own in (k, v)]
    cache.append(*news, *spans(counts, cache.tokens, torch.device("cpu")), counts, max(counts))


def snapshot(cache: SharedKVCache) -> dict:
    """Every tensor, copied, and every number of the cache."""
    states = [x.clone() for state in cache.states for x in (state if isinstance(state, tuple) else (state,))]
    held = [x.clone() for rows in cache.held if rows is not None for x in rows]
    read = [x for b in range(cache.batch_size) for x in contents(cache, b)]
    numbers = cache.tokens, cache.floors, cache.columns, cache.whole_columns, str(cache.held_choice)
    blocks = [list(own) for own in cache.table.blocks]
    return {"lengths": cache.lengths.clone(), "read": read, "states": states, "held": held, "numbers": numbers} | {
        "blocks": blocks,
        "free": len(cache.pool.free),
    }


def contents(cache: SharedKVCache, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[n, H, D]` of sequence b and the summaries `[n // block_n, H, D]` of its full blocks, as
    attention would read them.
    """
    position = torch.arange(cache.tokens[b], device=cache.lengths.device)
    page = cache.page_table[b, :, position // cache.spec.block_n].long()  # [H, n]
    slot = position % cache.spec.block_n
    k, v = (pages[page, slot].transpose(0, 1).clone() for pages in (cache.k_pages, cache.v_pages))
    return k, v, cache.full_summaries()[b, : cache.tokens[b] // cache.spec.block_n].clone()


def assert_same(before: dict, after: dict) -> None:
    for name, old in before.items():
        new = after[name]
        if isinstance(old, torch.Tensor):
            old, new = [old], [new]
        if isinstance(old, list) and old and isinstance(old[0], torch.Tensor):
            assert len(old) == len(new), name
            assert all(torch.equal(x, y) for x, y in zip(old, new)), name
        else:
            assert old == new, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_chunking_gives_the_same_pages_and_the_same_bits_of_summaries(dtype):
    lengths = (50, 29, 6)
    k, v = ([torch.randn(n, H, D).to(dtype) for n in lengths] for _ in range(2))
    rng = random.Random(0)
    for most in (1, 4, 17, 50):
        cache = empty_cache(dtype=dtype)
        while cache.tokens != lengths:
            append(cache, k, v, tuple(min(rng.randint(0, most), n - own) for n, own in zip(lengths, cache.tokens)))
        assert cache.lengths.tolist() == list(lengths)
        for b, n in enumerate(lengths):
            own_k, own_v, summaries = contents(cache, b)
            assert torch.equal(own_k, k[b])
            assert torch.equal(own_v, v[b])
            assert torch.equal(summaries, block_summaries(k[b][None], BLOCK_N)[0])
            full = n // BLOCK_N
            plain = k[b][: full * BLOCK_N].double().view(full, BLOCK_N, H, D).mean(1)
            tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
            assert (summaries.double() - plain).abs().max() < tolerance


@pytest.mark.parametrize("max_rollback", [0, 3])
def test_ring_of_past_keys_follows_the_sequences(max_rollback):
    """Also where sequences are cut short in between."""
    window, B, rng = 5, 3, random.Random(1)
    ring_slots = window + max_rollback
    history, floors = [[], [], []], [0, 0, 0]
    ring = torch.full((B, 1, ring_slots, 1), float("nan"))
    for _ in range(90):
        for b, own in enumerate(history):
            del own[rng.randint(floors[b], len(own)) if rng.random() < 0.5 else len(own) :]
        counts = tuple(rng.choice((0, 1, 1, 2, 4, 5, 9)) for _ in range(B))
        if not sum(counts):
            continue
        starts = tuple(map(len, history))
        reach = WindowReach.of(counts, starts, window, ring_slots, torch.device("cpu"))
        new = [torch.randn(count) for count in counts]
        flat = torch.cat(new)[:, None, None]
        expected = [
            [*own[max(0, len(own) - window + 1) :], *fresh.tolist()] if len(fresh) else []
            for own, fresh in zip(history, new)
        ]
        assert reach.key_tokens == tuple(map(len, expected))
        assert reach.gather(ring, flat).flatten().tolist() == [x for own in expected for x in own]
        ring = reach.keep(ring, flat)
        for b, fresh in enumerate(new):
            history[b].extend(fresh.tolist())
            floors[b] = max(floors[b], len(history[b]) - max_rollback)


@pytest.mark.parametrize(
    ("batch_size", "capacity", "name"), [(0, 8, "batch_size"), (2, 0, "capacity"), (2, 2.5, "capacity")]
)
def test_sizes_are_checked(batch_size, capacity, name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive int"):
        tiny_model().new_cache(batch_size, capacity)


def filled(model, seed: int = 0) -> SharedKVCache:
    """A cache of two sequences, 22 and 15 tokens long, with room for 30."""
    torch.manual_seed(seed)
    cache = model.new_cache(2, 30)
    model.prefill(*ragged_tokens(22, (0, 7)), cache)
    return cache


@pytest.mark.parametrize("self_decoder", ["sliding_window", "gated_retention"])
@pytest.mark.parametrize("call", ["prefill", "decode", "forward"])
def test_overflow_and_a_wrong_batch_are_refused_and_change_nothing(self_decoder, call):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="pair_mean", sparse_block_m=3)
    cache = filled(model)
    before = snapshot(cache)
    calls = {
        "prefill": lambda tokens: model.prefill(tokens, cache=cache, chunk_tokens=4),
        "decode": lambda tokens: model.decode(tokens, cache),
        "forward": lambda tokens: model(tokens, past_key_values=cache),
    }
    with pytest.raises(ValueError, match="at most 30 tokens per sequence, its capacity, got 31"):
        calls[call](torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="the 2 sequences that the cache holds, got a batch of 3"):
        calls[call](torch.ones(3, 1, dtype=torch.long))
    assert_same(before, snapshot(cache))
    calls[call](torch.ones(2, 8, dtype=torch.long))  # exactly full
    assert cache.tokens == (30, 23)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": 6}, "self_layers = 3"),
        ({"num_key_value_heads": 4}, "kv_heads = 4"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"sparse_block_n": 8}, "block_n = 8"),
        ({"sliding_window": 9}, "window = 9"),
        ({"self_decoder": "gated_retention"}, "self_decoder = gated_retention"),
        ({"cross_position": "none"}, "position = none"),
        ({"dtype": torch.float32}, "dtype = torch.float32"),
    ],
)
def test_a_cache_of_another_model_is_refused(change, field):
    cache = filled(tiny_model())
    before = snapshot(cache)
    with pytest.raises(ValueError, match=field):
        tiny_model(**change).decode(torch.ones(2, 1, dtype=torch.long), cache)
    assert_same(before, snapshot(cache))


def test_a_cache_of_another_model_of_the_same_sizes_is_refused():
    model, token = tiny_model(), torch.ones(2, 1, dtype=torch.long)
    cache = filled(model)
    before = snapshot(cache)
    for other in (tiny_model(), copy.deepcopy(model)):
        for call in (lambda m: m.decode(token, cache), lambda m: m(token, past_key_values=cache)):
            with pytest.raises(ValueError, match="that of another model of the same sizes"):
                call(other)
    assert_same(before, snapshot(cache))
    orphan = filled(tiny_model())  # its model is gone, and may have left its address to another
    with pytest.raises(ValueError, match="that of another model of the same sizes"):
        tiny_model().decode(token, orphan)


def test_copied_and_pickled_caches_continue():
    model, token = tiny_model(sparse_mode="pair_mean"), torch.randint(1, 64, (2, 1))
    cache = filled(model)
    copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    expected = model.to("cpu").decode(token, cache)
    assert copied.tokens == (22, 15)  # it shares nothing with the cache
    assert torch.equal(model.decode(token, copied), expected)
    assert torch.equal(model.decode(token, pickled), expected)
    with pytest.raises(ValueError, match="that of another model of the same sizes"):
        tiny_model().decode(token, copied)


def test_a_cache_of_another_kind_is_refused():
    from transformers import DynamicCache

    model, token = tiny_model(), torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="expected a SharedKVCache, as from `new_cache`, got DynamicCache"):
        model(token, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache: expected a SharedKVCache"):
        model.decode(token, None)


@pytest.mark.parametrize("self_decoder", ["sliding_window", "gated_retention"])
@pytest.mark.parametrize("where", ["self_layers", "cross_layers", "progress"])
def test_a_failure_midway_is_taken_back(self_decoder, where, monkeypatch):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="pair_mean", sparse_block_m=3)
    cache = filled(model)
    again = torch.randint(1, 64, (2, 6))
    before = snapshot(cache)

    def fail(*_):
        raise RuntimeError("midway")

    progress = fail if where == "progress" else None
    with monkeypatch.context() as patch:
        if where != "progress":
            patch.setattr(getattr(model.model, where)[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="midway"):
            model.prefill(again, cache=cache, chunk_tokens=2, progress=progress)
    assert_same(before, snapshot(cache))
    assert torch.equal(model.decode(again, cache), model.decode(again, filled(model)))


@pytest.mark.parametrize("self_decoder", ["sliding_window", "gated_retention"])
def test_reordered_sequences_continue_as_their_ancestors_would(self_decoder):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="pair_mean", sparse_block_m=3)
    tokens, mask = ragged_tokens(26, (0, 9, 3))
    order = torch.tensor([2, 0, 0])
    cache, expected = model.new_cache(3, 40), model.new_cache(3, 40)
    model.prefill(tokens, mask, cache)
    cache.reorder_cache(order)
    model.prefill(tokens[order], mask[order], expected)
    more = torch.randint(1, 64, (3, 5))
    assert cache.tokens == expected.tokens == tuple(cache.lengths.tolist())
    torch.testing.assert_close(model.decode(more, cache), model.decode(more, expected), rtol=0, atol=1e-11)
