"""Blocks shared by forks, taken back by `truncate`, given back by `reset`: checked against plain lists, and with a
model against sequences that share nothing. What a caller can do wrong changes no other sequence.
"""

import copy
import gc
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from diffv2_sparse import diff_attention_paged
from diffv2_sparse.cache import CacheSpec, PagedKV, SharedKVCache
from diffv2_sparse.selectors import block_summaries
from diffv2_sparse.yoco.layout import spans
from tests.test_cache import assert_same, contents, snapshot
from tests.tiny_yoco import ROWS, VOCAB, ragged_tokens, tiny_model

H, D, BLOCK_N, CAPACITY, ROLLBACK = 2, 3, 4, 19, 5
SELF_DECODERS = ("sliding_window", "gated_retention")


def spec(**changes) -> CacheSpec:
    fields = {
        "self_decoder": "sliding_window",
        "window": 5,
        "self_layers": 1,
        "cross_layers": 1,
        "heads": 2,
        "kv_heads": H,
        "head_dim": D,
        "position": "none",
        "block_n": BLOCK_N,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return CacheSpec(**fields | changes)


def append(cache: SharedKVCache, rows: list[torch.Tensor]) -> None:
    """Appends keys `[n, H, D]` to each sequence; values are the keys' negatives."""
    counts = tuple(map(len, rows))
    k = torch.cat(rows)
    cache.append(k, -k, *spans(counts, cache.tokens, torch.device("cpu")), counts, max(counts))


def fresh(*counts: int) -> list[torch.Tensor]:
    return [torch.randn(n, H, D) for n in counts]


def assert_holds(cache: SharedKVCache, expected: list[torch.Tensor]) -> None:
    assert cache.tokens == tuple(map(len, expected)) == tuple(cache.lengths.tolist())
    for b, keys in enumerate(expected):
        k, v, summaries = contents(cache, b)
        assert torch.equal(k, keys)
        assert torch.equal(v, -keys)
        assert torch.equal(summaries, block_summaries(keys[None], BLOCK_N)[0])


class Operations(RuleBasedStateMachine):
    """Caches over one pool against lists of keys. The pool is too small for all, so some calls are refused."""

    @initialize(batch_size=st.integers(1, 3), blocks=st.integers(3, 16), seed=st.integers(0, 99))
    def begin(self, batch_size, blocks, seed):
        torch.manual_seed(seed)
        cache = SharedKVCache(spec(), batch_size, CAPACITY, blocks=blocks, max_rollback=ROLLBACK)
        self.pool, nothing = cache.pool, torch.empty(0, H, D)
        self.caches = [cache]
        self.models = [[nothing] * batch_size]
        self.floors = [[0] * batch_size]

    def pick(self, data) -> int:
        return data.draw(st.integers(0, len(self.caches) - 1))

    @rule(data=st.data())
    def append_tokens(self, data):
        i = self.pick(data)
        cache, model = self.caches[i], self.models[i]
        rows = fresh(*data.draw(st.tuples(*[st.integers(0, 9)] * len(model))))
        longer = [torch.cat(pair) for pair in zip(model, rows)]
        before = snapshot(cache)
        try:
            append(cache, rows)
        except ValueError as error:
            assert_same(before, snapshot(cache))
            if "capacity" in str(error):
                assert max(map(len, longer)) > CAPACITY
            else:
                taken = sum(-(-len(x) // BLOCK_N) - -(-len(y) // BLOCK_N) for x, y in zip(longer, model))
                assert taken + len(model) > before["free"]
            return
        self.models[i] = longer
        self.floors[i] = [max(floor, len(x) - ROLLBACK) for floor, x in zip(self.floors[i], longer)]

    @rule(data=st.data())
    def truncate(self, data):
        i = self.pick(data)
        counts = data.draw(st.tuples(*[st.integers(0, ROLLBACK + 1)] * len(self.models[i])))
        left = [len(x) - count for x, count in zip(self.models[i], counts)]
        if any(n < floor for n, floor in zip(left, self.floors[i])):
            before = snapshot(self.caches[i])
            with pytest.raises(ValueError, match="counts: expected at most"):
                self.caches[i].truncate(counts)
            assert_same(before, snapshot(self.caches[i]))
            return
        self.caches[i].truncate(counts)
        self.models[i] = [x[:n] for x, n in zip(self.models[i], left)]

    @rule(data=st.data())
    def reset(self, data):
        i = self.pick(data)
        chosen = data.draw(st.sets(st.integers(0, len(self.models[i]) - 1), min_size=1))
        self.caches[i].reset(chosen)
        for b in chosen:
            self.models[i][b], self.floors[i][b] = torch.empty(0, H, D), 0

    @rule(data=st.data())
    def reorder(self, data):
        i = self.pick(data)
        order = data.draw(st.lists(st.integers(0, len(self.models[i]) - 1), min_size=1, max_size=3))
        self.caches[i].reorder_cache(torch.tensor(order))
        self.models[i], self.floors[i] = ([x[i][b] for b in order] for x in (self.models, self.floors))

    @precondition(lambda self: len(self.caches) < 3)
    @rule(data=st.data())
    def fork(self, data):
        i = self.pick(data)
        order = data.draw(st.lists(st.integers(0, len(self.models[i]) - 1), min_size=1, max_size=3))
        self.caches.append(self.caches[i].fork(order))
        for x in (self.models, self.floors):
            x.append([x[i][b] for b in order])

    @precondition(lambda self: len(self.caches) > 1)
    @rule(data=st.data())
    def drop(self, data):
        i = self.pick(data)
        for x in (self.caches, self.models, self.floors):
            del x[i]

    @rule(more=st.integers(0, 2))
    def grow_the_pool(self, more):
        self.caches[0].grow(CAPACITY, len(self.pool.holders) + more)

    @invariant()
    def caches_hold_what_the_lists_do(self):
        for cache, model, floors in zip(self.caches, self.models, self.floors):
            assert_holds(cache, model)
            assert cache.floors == tuple(floors)

    @invariant()
    def books_balance(self):
        held = [block for cache in self.caches for own in cache.table.blocks for block in own]
        assert [held.count(block) for block in range(len(self.pool.holders))] == self.pool.holders
        assert set(self.pool.free) == set(range(len(self.pool.holders))) - set(held)
        for cache in self.caches:
            kept = tuple(-(-n // BLOCK_N) for n in cache.tokens)
            assert tuple(map(len, cache.table.blocks)) == kept


TestOperations = Operations.TestCase
TestOperations.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_overhead_is_small():
    """Of 16-bit pages of 64 keys, all full: everything but K and V, the self-decoder's state apart."""
    cache = SharedKVCache(spec(block_n=64, head_dim=128, kv_heads=8, dtype=torch.bfloat16), 2, 1 << 14)
    held = [x for part in (cache, cache.pool, cache.table) for x in vars(part).values() if isinstance(x, torch.Tensor)]
    sizes = {id(x): x.numel() * x.element_size() for x in held}
    kv = 2 * 2 * 8 * (1 << 14) * 128 * 2
    assert sizes[id(cache.k_pages)] + sizes[id(cache.v_pages)] == kv
    assert {id(cache.page_table), id(cache.lengths), id(cache.pool.summaries)} < set(sizes)
    assert sum(sizes.values()) <= 1.03 * kv


def test_addresses_stay_until_they_are_said_to_move():
    cache = SharedKVCache(spec(), 2, CAPACITY, blocks=12, max_rollback=ROLLBACK)

    def where():
        return [x.data_ptr() for x in (cache.lengths, cache.page_table, cache.k_pages, cache.v_pages)]

    def unchanged(act):
        before, count = where(), cache.addresses
        act()
        return where() == before and cache.addresses == count

    assert unchanged(lambda: append(cache, fresh(9, 3)))
    assert unchanged(lambda: cache.truncate((2, 1)))
    assert unchanged(lambda: cache.reorder_cache(torch.tensor([1, 0])))
    assert unchanged(lambda: cache.reset([0]))
    fork = cache.fork()
    for act in (lambda: cache.grow(2 * CAPACITY), lambda: cache.reorder_cache(torch.tensor([0, 1, 1]))):
        before, pages, moved = cache.addresses, cache.k_pages.data_ptr(), fork.addresses
        act()
        assert cache.addresses > before
        assert (fork.addresses > moved) == (cache.k_pages.data_ptr() != pages)


def test_summaries_are_a_view_while_nothing_is_shared():
    cache = SharedKVCache(spec(), 2, CAPACITY, blocks=20)
    append(cache, fresh(18, 9))
    assert cache.full_summaries().data_ptr() == cache.pool.summaries.data_ptr()
    append(cache.fork(), fresh(1, 1))
    assert cache.full_summaries().data_ptr() == cache.pool.summaries.data_ptr()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.full_summaries().data_ptr() != cache.pool.summaries.data_ptr()
    cache.reset()
    append(cache, fresh(18, 9))
    assert cache.full_summaries().data_ptr() == cache.pool.summaries.data_ptr()


def test_a_shared_prompt_is_kept_once():
    cache = SharedKVCache(spec(), 1, 1000, blocks=260)
    prompt = torch.randn(998, H, D)
    append(cache, [prompt])
    fork = cache.fork([0] * 4)
    assert len(cache.pool.free) == 10
    rows = fresh(2, 2, 2, 2)
    append(fork, rows)
    assert len(cache.pool.free) == 6  # each sequence has copied the open block, and nothing else
    assert_holds(fork, [torch.cat([prompt, row]) for row in rows])
    del fork
    gc.collect()
    assert len(cache.pool.free) == 10
    assert_holds(cache, [prompt])


def test_copies_of_shared_blocks_need_room_and_the_last_holder_needs_none():
    cache = SharedKVCache(spec(), 3, CAPACITY, blocks=2)
    prompt = torch.randn(3, H, D)
    append(cache, [prompt, *fresh(0, 0)])
    cache.reorder_cache(torch.tensor([0, 0, 0]))  # one block for three, one free
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"expected 2 free key blocks \(4 pages\), got 1 \(2 pages\) of a pool of 2"):
        append(cache, fresh(1, 1, 1))
    assert_same(before, snapshot(cache))
    rows = fresh(1, 0, 0)
    append(cache, rows)  # a copy
    with pytest.raises(ValueError, match="expected 1 free key blocks"):
        append(cache, fresh(0, 1, 0))
    cache.reset([2])
    append(cache, [torch.empty(0, H, D), rows[0], torch.empty(0, H, D)])  # in place
    assert_holds(cache, [torch.cat([prompt, rows[0]])] * 2 + [torch.empty(0, H, D)])


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("failing", ["copy", "publish"])
def test_a_copy_that_fails_is_no_copy(offload, failing, monkeypatch):
    """Neither the books nor the device name the copy, and later writes harm no one."""
    cache = SharedKVCache(spec(), 1, CAPACITY, blocks=6, offload=offload)
    prompt, rows = torch.randn(6, H, D), fresh(1, 2, 3)
    append(cache, [prompt])
    fork = cache.fork([0, 0])
    before = [snapshot(cache), snapshot(fork)]

    def fail(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        target = (cache.pool, "copy") if failing == "copy" else (fork.table, "_publish")
        patch.setattr(*target, fail)
        with pytest.raises(torch.OutOfMemoryError), fork.transaction():
            append(fork, fresh(2, 2))
    for old, new in zip(before, (snapshot(cache), snapshot(fork))):
        assert_same({k: v for k, v in old.items() if k != "free"}, {k: v for k, v in new.items() if k != "free"})
    append(fork, rows[:2])
    append(cache, rows[2:])
    assert_holds(cache, [torch.cat([prompt, rows[2]])])
    assert_holds(fork, [torch.cat([prompt, row]) for row in rows[:2]])


@pytest.mark.parametrize(
    "call",
    [lambda c: c.reset([0]), lambda c: c.truncate((2, 1)), lambda c: c.reorder_cache(torch.tensor([1, 1]))],
    ids=["reset", "truncate", "reorder"],
)
def test_a_call_that_finds_no_memory_changes_nothing(call, monkeypatch):
    """At whichever of its tensors memory runs out."""
    cache = SharedKVCache(spec(), 2, CAPACITY, max_rollback=ROLLBACK)
    append(cache, fresh(9, 6))
    cache.states = tuple(type(state)(*map(torch.randn_like, state)) for state in cache.states)
    before, sent, refused = snapshot(cache), cache._sent, 0

    def fail(*_):
        raise torch.OutOfMemoryError

    for working in range(3):
        steps = iter([sent] * working + [fail])
        monkeypatch.setattr(cache, "_sent", lambda *options, steps=steps: next(steps)(*options))
        try:
            call(cache)
        except torch.OutOfMemoryError:
            refused += 1
            assert_same(before, snapshot(cache))
    assert 1 <= refused < 3


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("working", [0, 1])
def test_a_pool_that_cannot_grow_stays_as_it_is(offload, working, monkeypatch):
    cache = SharedKVCache(spec(), 2, CAPACITY, offload=offload)
    rows = fresh(9, 6)
    append(cache, rows)
    before, pool, addresses = snapshot(cache), cache.pool, cache.addresses
    pages = pool.k_pages.data_ptr(), pool.v_pages.data_ptr()
    steps = iter([pool._new_pages] * working)

    def fail(*options):
        for step in steps:
            return step(*options)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_new_pages", fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.grow(4 * CAPACITY)
    assert_same(before, snapshot(cache))
    assert cache.capacity == CAPACITY
    assert len(pool.k_pages) == len(pool.v_pages) == len(pool.holders) * H
    assert cache.addresses > addresses or pages == (pool.k_pages.data_ptr(), pool.v_pages.data_ptr())
    cache.grow(2 * CAPACITY)
    more = fresh(CAPACITY, CAPACITY)
    append(cache, more)
    assert_holds(cache, [torch.cat(both) for both in zip(rows, more)])


def test_an_exhausted_pool_says_what_is_missing_and_what_helps():
    model = tiny_model(sparse_mode="pair_mean")
    cache = model.new_cache(2, 40, blocks=12)
    tokens = torch.randint(1, VOCAB, (2, 30))
    model.prefill(tokens[:, :22], cache=cache)  # 6 blocks of 4 each
    before = snapshot(cache)
    for call in (lambda: model.decode(tokens[:, 22:26], cache), lambda: model.prefill(tokens[:, 22:], cache=cache)):
        with pytest.raises(ValueError, match=r"expected \d free key blocks \(\d pages\), got 0 .* pool of 12.*`grow`"):
            call()
    assert_same(before, snapshot(cache))
    expected = model.new_cache(2, 40)
    model.prefill(tokens[:, :22], cache=expected)
    cache.grow(40, 20)
    assert torch.equal(model.decode(tokens[:, 22:], cache), model.decode(tokens[:, 22:], expected))


@pytest.mark.parametrize("entry", [-1, -(2**31), 10**6, 2**31 - 1])
@pytest.mark.parametrize("selected", ["dense", "pair_mean"])
def test_a_corrupted_page_table_harms_its_own_sequence_alone(entry, selected):
    model = tiny_model(sparse_mode=selected)
    tokens, mask = ragged_tokens(30, (0, 7))
    clean, broken = (model.prefill(tokens[:, :22], mask[:, :22], model.new_cache(2, 60))[1] for _ in range(2))
    broken.reorder_cache(torch.tensor([0, 1]))
    broken.table.at_home = False  # as after sharing: summaries go through the table, too
    broken.page_table[0] = entry
    expected, got = (model.decode(tokens[:, 22:], cache) for cache in (clean, broken))  # from inside a block
    assert got.isfinite().all()
    assert torch.equal(got[1], expected[1])
    assert (got[0] - expected[0]).abs().max() > 1e-3
    for mine, other in zip(contents(clean, 1), contents(broken, 1)):  # no write went astray
        assert torch.equal(mine, other)


def test_a_corrupted_page_table_in_the_kernels():
    pytest.importorskip("triton")
    cache = SharedKVCache(spec(head_dim=16), 2, CAPACITY)
    counts = (14, 11)
    k = torch.randn(sum(counts), H, 16)
    cache.append(k, -k, *spans(counts, (0, 0), torch.device("cpu")), counts, 14)
    q, lam_logit = torch.randn(2, 1, 8, 16), torch.randn(2, 1, 4)
    expected = diff_attention_paged(q, lam_logit, cache.pages(), backend="triton")
    cache.page_table[0, 1] = 10**6
    o = diff_attention_paged(q, lam_logit, cache.pages(), backend="triton")
    assert torch.equal(o[1], expected[1])
    assert torch.equal(o[0, :, :2], expected[0, :, :2])
    assert not o[0, :, 2:].any()


def test_nothing_changes_for_zero_tokens():
    cache = SharedKVCache(spec(), 2, CAPACITY)
    append(cache, fresh(7, 3))
    before = snapshot(cache)
    append(cache, fresh(0, 0))
    cache.truncate(0)
    cache.crop(0)
    assert_same(before, snapshot(cache))
    model = tiny_model()
    with pytest.raises(ValueError, match="input_ids: expected"):
        model.decode(torch.ones(2, 0, dtype=torch.long), model.new_cache(2, 8))


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "block_m"), ROWS)
def test_sequences_finish_at_different_times(self_decoder, mode, block_m):
    """One is reset and begins anew beside another that goes on; each computes what it would alone."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    first, second, other = (torch.randint(1, VOCAB, (1, n)) for n in (30, 34, 40))
    cache = model.new_cache(2, 40)
    model.prefill(torch.cat([first[:, :24], other[:, :24]]), cache=cache)
    model.decode(torch.cat([first[:, 24:], other[:, 24:30]]), cache)
    cache.reset([0])
    mask = torch.tensor([[1] * 30, [0] * 30])
    logits, _ = model.prefill(torch.cat([second[:, :30], second[:, :30]]), mask, cache, chunk_tokens=7)
    torch.testing.assert_close(logits[:1], model(second[:, :30], logits_to_keep=1).logits, rtol=0, atol=1e-9)
    logits = model.decode(torch.cat([second[:, 30:], other[:, 30:34]]), cache)
    for own, tokens in zip(logits, (second, other[:, :34])):
        torch.testing.assert_close(own, model(tokens, logits_to_keep=4).logits[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_prefill_is_taken_back(error):
    """Also where it had copied shared blocks; the fork and the origin go on as if nothing had happened."""
    model = tiny_model(sparse_mode="pair_mean", sparse_block_m=3)
    tokens, mask = ragged_tokens(30, (0, 9))
    cache = model.prefill(tokens[:, :21], mask[:, :21], model.new_cache(2, 40, blocks=30))[1]
    fork = cache.fork([1, 0, 1])
    caches = (cache, fork)
    before = [snapshot(x) for x in caches]

    def interrupt(done, _):
        if done >= 6:
            raise error

    ragged = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [1] * 5 + [0] * 4])
    with pytest.raises(error):
        model.prefill(torch.ones(3, 9).long(), ragged, fork, chunk_tokens=3, progress=interrupt)
    for x, old in zip(caches, before):  # the copies stay: which blocks hold what may differ
        new = snapshot(x)
        assert_same(*({k: v for k, v in y.items() if k not in ("blocks", "free")} for y in (old, new)))
    more, order = tokens[:, 21:], torch.tensor([1, 0, 1])
    expected = model.decode(more, model.prefill(tokens[:, :21], mask[:, :21], model.new_cache(2, 40))[1])
    torch.testing.assert_close(model.decode(more[order], fork), expected[order], rtol=0, atol=1e-11)
    torch.testing.assert_close(model.decode(more, cache), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("mode", ["dense", "per_class"])
def test_tokens_taken_back_leave_no_trace(self_decoder, mode):
    """Speculative decoding: read some, take some back, read others; ragged, and past the rings' ends."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode)
    tokens, mask = ragged_tokens(60, (0, 9, 3))
    cache = model.prefill(tokens[:, :20], mask[:, :20], model.new_cache(3, 80, max_rollback=4))[1]
    generator, at = torch.Generator().manual_seed(1), 20
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        while at < 55:
            right, wrong = (int(torch.randint(n, (1,), generator=generator)) for n in (4, 5))
            guess = torch.cat([tokens[:, at : at + right], torch.randint(1, VOCAB, (3, wrong), generator=generator)], 1)
            if guess.shape[1]:
                logits = model.decode(guess, cache)
                torch.testing.assert_close(logits[:, :right], whole[:, at : at + right], rtol=0, atol=1e-9)
            cache.crop(-wrong)
            at += right
            assert cache.get_seq_length() == at
        assert cache.tokens == (at, at - 9, at - 3)
        last = model.decode(tokens[:, at:], cache)
    torch.testing.assert_close(last, whole[:, at:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
def test_sequences_are_cut_back_each_by_its_own(self_decoder):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="pair_mean")
    tokens, mask = ragged_tokens(40, (0, 11, 4))
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        cache = model.prefill(tokens[:, :26], mask[:, :26], model.new_cache(3, 80, max_rollback=3), chunk_tokens=9)[1]
        cache.truncate((3, 0, 2))
        again = torch.stack([tokens[0, 23:26], torch.zeros(3).long(), torch.cat([tokens[2, 24:26], tokens[2, :1]])])
        logits, _ = model.prefill(again, torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0]]), cache, logits_to_keep=0)
        torch.testing.assert_close(logits[0], whole[0, 23:26], rtol=0, atol=1e-9)
        torch.testing.assert_close(logits[2, :2], whole[2, 24:26], rtol=0, atol=1e-9)
        torch.testing.assert_close(model.decode(tokens[:, 26:], cache), whole[:, 26:], rtol=0, atol=1e-9)


def test_what_cannot_be_taken_back_is_refused():
    model = tiny_model(sparse_mode="pair_mean", sparse_block_m=8)
    cache = model.prefill(torch.randint(1, VOCAB, (1, 21)), cache=model.new_cache(1, 40, max_rollback=8))[1]
    with pytest.raises(ValueError, match="at most 8 tokens of sequence 0, which has 21 and is kept back to 13"):
        cache.truncate(9)
    with pytest.raises(ValueError, match="an earlier row's blocks are not kept"):
        cache.truncate(6)
    with pytest.raises(ValueError, match="tokens_to_remove: expected a number ≤ 0"):
        cache.crop(3)
    cache.truncate(5)  # where a row ends
    with pytest.raises(ValueError, match="at most 0 tokens of sequence 0"):
        model.new_cache(1, 8).truncate(1)
    tokens, mask = ragged_tokens(12, (0, 3), "right")
    cache = model.prefill(tokens, mask, model.new_cache(2, 40, max_rollback=8))[1]
    with pytest.raises(ValueError, match="expected columns without padding, the last 0, got 1"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.reset([2]), r"sequences: expected some of 0 … 1, got \[2\]"),
        (lambda c: c.reset(0), "sequences: expected some of 0 … 1, got 0"),
        (lambda c: c.reset([0.5]), "sequences: expected some of"),
        (lambda c: c.fork([]), "sequences: expected some of"),
        (lambda c: c.reorder_cache(torch.tensor([0, -1])), "sequences: expected some of"),
        (lambda c: c.truncate((1,)), "counts: expected 2 numbers ≥ 0"),
        (lambda c: c.truncate(-1), "counts: expected 2 numbers ≥ 0"),
        (lambda c: c.truncate(1.5), "counts: expected 2 numbers ≥ 0"),
        (lambda c: c.truncate([1, None]), "counts: expected 2 numbers ≥ 0"),
        (lambda c: c.grow(3), "capacity: expected at least the 19 tokens"),
        (lambda c: SharedKVCache(spec(), 1, 8, blocks=0), "blocks: expected a positive int"),
        (lambda c: SharedKVCache(spec(), 1, 8, max_rollback=-1), "max_rollback: expected an int ≥ 0"),
        (lambda c: c.append(*[torch.zeros(3, H, D)] * 2, *[torch.zeros(3).long()] * 2, (2, 2), 2), "k: expected"),
        (lambda c: c.append(*[torch.zeros(2, H, D)] * 2, *[torch.zeros(2).long()] * 2, (3, -1), 3), "counts: expected"),
    ],
)
def test_calls_that_are_refused(call, message):
    cache = SharedKVCache(spec(), 2, CAPACITY, max_rollback=ROLLBACK)
    append(cache, fresh(6, 3))
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert_same(before, snapshot(cache))


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
def test_forks_of_every_kind_go_on_as_their_origin_would(self_decoder):
    model = tiny_model(self_decoder=self_decoder, sparse_mode="pair_mean", sparse_block_m=3)
    tokens, mask = ragged_tokens(26, (0, 9))
    cache = model.prefill(tokens, mask, model.new_cache(2, 40, blocks=40, max_rollback=2))[1]
    more = torch.randint(1, VOCAB, (4, 5))
    repeated = cache.fork()
    repeated.batch_repeat_interleave(2)
    selected = cache.fork([1, 1, 0])
    selected.batch_select_indices(torch.tensor([2, 0]))
    copies = {"fork": cache.fork(), "copy": copy.copy(cache), "pickle": pickle.loads(pickle.dumps(cache))}
    expected = model.prefill(tokens.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), model.new_cache(4, 40))[1]
    expected = model.decode(more, expected)
    torch.testing.assert_close(model.decode(more, repeated), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(model.decode(more[[0, 2]], selected), expected[[0, 2]], rtol=0, atol=1e-11)
    for name, one in copies.items():
        assert (one.pool is cache.pool) == (name != "pickle")
        torch.testing.assert_close(model.decode(more[[0, 2]], one), expected[[0, 2]], rtol=0, atol=1e-11)
    torch.testing.assert_close(model.decode(more[[0, 2]], cache), expected[[0, 2]], rtol=0, atol=1e-11)


def test_pages_are_views_of_the_cache():
    cache = SharedKVCache(spec(), 2, CAPACITY)
    append(cache, fresh(7, 3))
    pages = cache.pages()
    assert isinstance(pages, PagedKV)
    assert pages.page_table.shape == (2, H, 2)
    assert pages.lengths.data_ptr() == cache.lengths.data_ptr()
    assert pages.page_table.data_ptr() == cache.page_table.data_ptr()


@pytest.fixture
def _no_waiting():
    """Any wait of the host for the GPU raises, once the test calls `torch.cuda.set_sync_debug_mode("error")`."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("_no_waiting")
def test_appending_waits_for_nothing_and_a_graph_reads_what_is_appended():
    device = torch.device("cuda")
    cache = SharedKVCache(
        spec(head_dim=64, block_n=64, dtype=torch.bfloat16, device=device), 2, 400, blocks=20, max_rollback=3
    )
    options = {"dtype": torch.bfloat16, "device": device}

    def append_some(*counts):
        k, v = (torch.randn(sum(counts), H, 64, **options) for _ in range(2))
        sequence, position = spans(counts, cache.tokens, device)
        cache.append(k, v, sequence, position, counts, max(counts))

    append_some(126, 7)
    q, lam_logit = torch.randn(2, 1, 8, 64, **options), torch.randn(2, 1, 4, **options)

    def attend():
        pages = PagedKV(cache.k_pages, cache.v_pages, cache.page_table, cache.lengths)
        return diff_attention_paged(q, lam_logit, pages, backend="triton")

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend()
    seen = []
    for act in (
        lambda: append_some(1, 1),
        lambda: append_some(1, 130),  # into new pages
        lambda: cache.truncate((2, 1)),
        lambda: append_some(5, 0),
    ):
        torch.cuda.set_sync_debug_mode("error")
        act()
        cache.full_summaries()
        torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        assert torch.equal(o, attend())
        seen.append(o.clone())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    cache.reorder_cache(torch.tensor([1, 1]))
    append_some(1, 1)  # one of them copies the open page
    graph.replay()
    assert torch.equal(o, attend())


@pytest.mark.gpu
@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("mode", ["dense", "pair_mean"])
def test_decoding_waits_for_nothing(mode):
    model = tiny_model(torch.bfloat16, sparse_mode=mode, head_dim=16, sparse_block_n=16).cuda()
    tokens = torch.randint(1, VOCAB, (2, 70), device="cuda")
    cache = model.prefill(tokens[:, :60], cache=model.new_cache(2, 100))[1]
    model.decode(tokens[:, 60:61], cache)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    for t in range(61, 70):
        model.decode(tokens[:, t : t + 1], cache)
