"""A cache whose pages live on the host: bit for bit what one on the device gives, whatever happens to its sequences."""

import copy
import gc
import pickle
import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from diffv2_sparse import BlockSelection, diff_attention_paged, offload
from diffv2_sparse.cache import PagedKV, SharedKVCache
from diffv2_sparse.offload import OffloadedPool, selected_pages
from diffv2_sparse.pinned import pinned_zeros
from diffv2_sparse.yoco.graphs import can_capture
from diffv2_sparse.yoco.layout import spans
from tests.test_cache import assert_same, contents, snapshot
from tests.test_cache_sharing import BLOCK_N, CAPACITY, ROLLBACK, D, H, Operations, append, fresh, spec
from tests.tiny_yoco import VOCAB, ragged_tokens, tiny_model

SELF_DECODERS = ("sliding_window", "gated_retention")
SPARSE = (("pair_mean", 1), ("per_class", 1), ("pair_mean", 3), ("per_class", 8))


def random_lists(data, cache: SharedKVCache, classes: int) -> BlockSelection:
    """For one token of each sequence: up to two of its blocks for every class and head."""
    B, NB = cache.batch_size, 2
    indices, counts = torch.full((B, classes, H, 1, NB), -1), torch.zeros(B, classes, H, 1)
    for b, n in enumerate(cache.tokens):
        blocks = list(range(-(-n // BLOCK_N)))
        for c in range(classes):
            for h in range(H):
                own = sorted(data.draw(st.sets(st.sampled_from(blocks), max_size=NB))) if blocks else []
                indices[b, c, h, 0, : len(own)] = torch.tensor(own)
                counts[b, c, h] = len(own)
    return BlockSelection(indices.int(), counts.int(), 1, BLOCK_N)


class OffloadedOperations(Operations):
    """The operations of any cache, and reads between them; slots are few, so that pages leave them all the time."""

    @initialize(
        batch_size=st.integers(1, 3), blocks=st.integers(3, 16), resident=st.integers(1, 6), seed=st.integers(0, 99)
    )
    def begin(self, batch_size, blocks, resident, seed):
        torch.manual_seed(seed)
        sizes = {"blocks": blocks, "max_rollback": ROLLBACK, "offload": "cpu", "resident_blocks": resident}
        cache = SharedKVCache(spec(), batch_size, CAPACITY, **sizes)
        self.pool = cache.pool
        self.caches, self.models, self.floors = [cache], [[torch.empty(0, H, D)] * batch_size], [[0] * batch_size]

    @rule(data=st.data(), classes=st.integers(1, 2))
    def read(self, data, classes):
        cache = self.caches[self.pick(data)]
        if not max(cache.tokens):
            return
        selection = random_lists(data, cache, classes)
        plain = PagedKV(cache.k_pages, cache.v_pages, cache.page_table, cache.lengths)
        needed = selected_pages(cache.page_table, selection, len(self.pool.slot_of))
        if len(needed[needed >= 0].unique()) > len(self.pool.last_read):
            before = self.pool.fetched
            with pytest.raises(ValueError, match="resident_blocks: expected at least"):
                cache.pages(selection=selection)
            assert self.pool.fetched == before
            return
        pages = cache.pages(selection=selection)
        q, lam_logit = torch.randn(cache.batch_size, 1, 4 * H, D), torch.randn(cache.batch_size, 1, 2 * H)
        o, expected = (diff_attention_paged(q, lam_logit, x, selection, backend="torch") for x in (pages, plain))
        assert torch.equal(o, expected)

    @invariant()
    def what_is_resident_is_what_the_host_has(self):
        """Of every token that a sequence holds."""
        page = self.pool.slot_of.long()
        resident = (page >= 0).nonzero()[:, 0]
        assert sorted(page[resident].tolist()) == (self.pool.page_in >= 0).nonzero()[:, 0].tolist()
        assert torch.equal(self.pool.page_in[page[resident]].long(), resident)
        for row in self.pool.order:
            assert torch.equal(row.sort().values.long(), torch.arange(len(self.pool.last_read)))
        for cache in self.caches:
            for b, n in enumerate(cache.tokens):
                position = torch.arange(n)
                at = cache.page_table[b, :, position // BLOCK_N].long()
                slot, offset = page[at], (position % BLOCK_N).expand(H, n)
                there = slot >= 0
                for slots, pages in ((self.pool.k_slots, cache.k_pages), (self.pool.v_slots, cache.v_pages)):
                    assert torch.equal(slots[slot[there], offset[there]], pages[at[there], offset[there]])


TestOffloadedOperations = OffloadedOperations.TestCase
TestOffloadedOperations.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "block_m"), SPARSE)
def test_a_model_computes_the_same_bits(self_decoder, mode, block_m):
    """Through prompts, steps, truncation, reordering, resets and forks, in float32."""
    model = tiny_model(torch.float32, self_decoder=self_decoder, sparse_mode=mode, sparse_block_m=block_m)
    rng = random.Random(f"{self_decoder} {mode} {block_m}")
    sizes = {"blocks": 150, "max_rollback": 3}
    caches = [model.new_cache(3, 120, **sizes), model.new_cache(3, 120, **sizes, offload="cpu", resident_blocks=30)]
    tokens, mask = ragged_tokens(40, (0, 11, 26))
    chunk_tokens = rng.randint(3, 40)
    logits = [model.prefill(tokens, mask, cache, chunk_tokens=chunk_tokens)[0] for cache in caches]
    assert torch.equal(*logits)

    def both(act):
        return [act(cache) for cache in caches]

    for _ in range(36):
        act = rng.choice(("decode", "decode", "prompt", "truncate", "reorder", "reset", "fork"))
        if max(caches[0].tokens) > 100:
            act = "reset"
        if act == "truncate":
            n = rng.randint(0, min(own - floor for own, floor in zip(caches[0].tokens, caches[0].floors)))
            if block_m == 1:
                both(lambda cache, n=n: cache.truncate(n))
            continue
        if act in ("reorder", "fork"):
            order = [rng.randrange(3) for _ in range(3)]
            for i, cache in enumerate(caches):
                if act == "reorder":
                    cache.reorder_cache(torch.tensor(order))
                else:
                    caches[i] = cache.fork(order)
            continue
        if act == "reset":
            chosen = [rng.randrange(3)] if max(caches[0].tokens) <= 100 else range(3)
            both(lambda cache, chosen=chosen: cache.reset(chosen))
        T = rng.randint(5, 20) if act in ("prompt", "reset") else rng.choice((1, 1, 2, 4))
        ids, chunk_tokens = torch.randint(1, VOCAB, (3, T)), rng.randint(1, 9)
        if act == "decode":
            logits = both(lambda cache, ids=ids: model.decode(ids, cache))
        else:
            logits = both(lambda cache, ids=ids, n=chunk_tokens: model.prefill(ids, cache=cache, chunk_tokens=n)[0])
        assert torch.equal(*logits)
    assert caches[1].pool.fetched > len(caches[1].pool.last_read)  # so that some had to go
    for b in range(3):
        assert all(map(torch.equal, contents(caches[0], b), contents(caches[1], b)))


def offloaded(model, tokens, mask=None, **options) -> SharedKVCache:
    cache = model.new_cache(len(tokens), 100, offload="cpu", **options)
    return model.prefill(tokens, mask, cache, chunk_tokens=16)[1]


@pytest.mark.parametrize("share_layers", [1, 2])
def test_what_the_last_step_read_stays(share_layers):
    """By default there is room for the lists of all layers, so that reading the same again fetches nothing."""
    model = tiny_model(num_hidden_layers=8, sparse_mode="per_class", sparse_share_layers=share_layers)
    cache = offloaded(model, torch.randint(1, VOCAB, (2, 90)), max_rollback=1)
    assert cache.pool.k_slots.shape[0] == 2 * (6 + 6) * max(4 // share_layers, 3) * 2 + 1
    token = torch.randint(1, VOCAB, (2, 1))
    logits = model.decode(token, cache)
    fetched = cache.pool.fetched
    assert 0 < fetched < 2 * 90
    cache.truncate(1)
    assert torch.equal(model.decode(token, cache), logits)
    assert cache.pool.fetched == fetched
    tight = offloaded(model, torch.randint(1, VOCAB, (2, 90)), max_rollback=1, resident_blocks=2 * 8)
    for _ in range(2):
        model.decode(token, tight)
        fetched = tight.pool.fetched
        tight.truncate(1)
    model.decode(token, tight)
    assert tight.pool.fetched > fetched  # one layer's pages drive another's out


def test_a_prompt_takes_memory_for_a_chunk_of_it(monkeypatch):
    model, blocks = tiny_model(sparse_mode="pair_mean"), []
    pool = offload.PagePool

    def watched(n, *args):
        blocks.append(n)
        return pool(n, *args)

    monkeypatch.setattr(offload, "PagePool", watched)
    tokens, mask = ragged_tokens(90, (0, 31))
    cache = model.new_cache(2, 100, offload="cpu")
    model.prefill(tokens, mask, cache, chunk_tokens=10)
    assert len(blocks) == 9
    assert max(blocks) <= 2 * 4  # 10 tokens lie in at most four blocks of 4
    on_device = [x for x in vars(cache.pool).values() if isinstance(x, torch.Tensor) and x.shape[1:] == (4, 8)]
    assert [len(x) for x in on_device] == [100, 100, 2 * 3 * 5 * 2 + 1, 2 * 3 * 5 * 2 + 1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_generate(options):
    model = tiny_model(torch.float32, sparse_mode="pair_mean")
    tokens = torch.randint(1, VOCAB, (1, 9)).repeat(1, 5)
    generated = []
    for where in (None, "cpu"):
        cache = model.new_cache(options.get("num_beams", 1), 80, max_rollback=3, offload=where)
        generated.append(model.generate(tokens, past_key_values=cache, max_new_tokens=14, do_sample=False, **options))
    assert torch.equal(*generated)
    assert cache.pool.fetched


def test_dense_attention_is_refused():
    model, tokens = tiny_model(sparse_mode="pair_mean"), torch.randint(1, VOCAB, (2, 50))
    cache = offloaded(model, tokens[:, :40])
    before = snapshot(cache)
    model.config.sparse_mode = "dense"
    match = "cache: expected sparse attention over a cache with offload, got dense"
    for call in (
        lambda: model.decode(tokens[:, 40:41], cache),
        lambda: model.prefill(tokens[:, 40:], cache=cache),
        cache.pages,
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert_same(before, snapshot(cache))
    model.prefill(tokens[:, 40:45], cache=cache, logits_to_keep=torch.tensor([], dtype=torch.long))  # reads nothing
    model.config.sparse_mode = "pair_mean"
    expected = model(tokens).logits[:, 45:]
    torch.testing.assert_close(model.decode(tokens[:, 45:], cache), expected, rtol=0, atol=1e-9)


def test_a_read_that_does_not_fit_says_what_would():
    model, tokens = tiny_model(sparse_mode="pair_mean"), torch.randint(1, VOCAB, (1, 60))
    cache = offloaded(model, tokens[:, :40], resident_blocks=7)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"resident_blocks: expected at least \d+ for a read of \d+ pages, got 7"):
        model.prefill(tokens[:, 40:], cache=cache, logits_to_keep=0)
    assert_same(before, snapshot(cache))
    logits, _ = model.prefill(tokens[:, 40:], cache=cache, logits_to_keep=0, chunk_tokens=1)
    torch.testing.assert_close(logits, model(tokens).logits[:, 40:], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "disk"}, "offload: expected 'cpu' or None, got 'disk'"),
        ({"resident_blocks": 4}, "resident_blocks: expected None without offload, got 4"),
        ({"offload": "cpu", "resident_blocks": 0}, "resident_blocks: expected a positive int, got 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SharedKVCache(spec(), 1, 8, **options)


def lists_of(blocks: list[list[list[int]]]) -> BlockSelection:
    """For one token of each sequence, the same blocks for every head: `[B][C][NB]`."""
    indices = torch.tensor(blocks, dtype=torch.int32)[:, :, None, None].expand(-1, -1, H, 1, -1).contiguous()
    return BlockSelection(indices, torch.full_like(indices[..., 0], indices.shape[-1]), 1, BLOCK_N)


def assert_reads(cache: SharedKVCache, selection: BlockSelection) -> None:
    """What a selection names is what the host has of it."""
    q, lam_logit = torch.randn(cache.batch_size, 1, 4 * H, D), torch.randn(cache.batch_size, 1, 2 * H)
    plain = PagedKV(cache.k_pages, cache.v_pages, cache.page_table, cache.lengths)
    o, expected = (diff_attention_paged(q, lam_logit, x, selection) for x in (cache.pages(selection=selection), plain))
    assert torch.equal(o, expected)


class Short:
    """In place of pages, where there is no memory to gather some."""

    def __getitem__(self, _):
        raise torch.OutOfMemoryError("as if")


def test_a_failed_fetch_leaves_nothing_wrong(monkeypatch):
    """Wherever memory runs out while pages are fetched, the next reads are right."""
    cache = SharedKVCache(spec(), 1, CAPACITY, offload="cpu", resident_blocks=3)
    append(cache, fresh(18))
    first, second = lists_of([[[0, 1, 4]]]), lists_of([[[1, 2, 3]]])

    def fail():
        raise torch.OutOfMemoryError("as if")

    for name, failing in (("_wait", fail), ("k_pages", Short()), ("v_pages", Short())):
        assert_reads(cache, first)
        before = snapshot(cache)
        with monkeypatch.context() as patch:
            patch.setattr(cache.pool, name, failing)
            with pytest.raises(torch.OutOfMemoryError):
                cache.pages(selection=second)
        assert_same(before, snapshot(cache))
        for lists in (first, second, first):
            assert_reads(cache, lists)


def test_kernels_read_slots_as_they_read_pages():
    pytest.importorskip("triton")
    cache = SharedKVCache(spec(head_dim=16), 2, CAPACITY, offload="cpu", resident_blocks=5)
    counts = (18, 11)
    k = torch.randn(sum(counts), H, 16)
    cache.append(k, -k, *spans(counts, (0, 0), torch.device("cpu")), counts, 18)
    q, lam_logit = torch.randn(2, 1, 8, 16), torch.randn(2, 1, 4)
    plain = PagedKV(cache.k_pages, cache.v_pages, cache.page_table, cache.lengths)
    for lists in ([[0, 2, 4], [1, 2, 0]], [[1, 3, 4], [0, 2, 0]]):
        indices = torch.tensor(lists, dtype=torch.int32).view(2, 1, 1, 1, 3).expand(2, 1, H, 1, 3).contiguous()
        n = torch.tensor([3, 2], dtype=torch.int32).view(2, 1, 1, 1).expand(2, 1, H, 1).contiguous()
        selection = BlockSelection(indices, n, 1, BLOCK_N)
        pages = cache.pages(selection=selection)
        o, expected = (diff_attention_paged(q, lam_logit, x, selection, backend="triton") for x in (pages, plain))
        assert torch.equal(o, expected)


def test_a_copy_leaves_no_old_page_in_its_slot(monkeypatch):
    """A block is read, given back, and taken for a copy, after which the call fails: what was read is not the copy."""
    cache = SharedKVCache(spec(), 2, CAPACITY, blocks=3, offload="cpu", resident_blocks=3)
    append(cache, fresh(5, 4))
    (old,) = cache.table.blocks[1]
    lists = torch.zeros(2, 1, H, 1, 2, dtype=torch.int32)
    lists[..., 1] = 1
    selection = BlockSelection(lists, torch.tensor([2, 1], dtype=torch.int32).view(2, 1, 1, 1).expand(2, 1, H, 1), 1, 4)
    cache.pages(selection=selection)
    cache.reset([1])
    cache.reorder_cache(torch.tensor([0, 0]))

    def short(*_):
        raise torch.OutOfMemoryError("as if")

    def add():
        with cache.transaction():
            append(cache, fresh(1, 0))

    with monkeypatch.context() as patch:
        patch.setattr(offload, "PagePool", short)
        with pytest.raises(torch.OutOfMemoryError):
            add()
    assert cache.table.blocks[0][1] == old
    selection = BlockSelection(lists, torch.full_like(lists[..., 0], 2), 1, 4)
    q, lam_logit = torch.randn(2, 1, 4 * H, D), torch.randn(2, 1, 2 * H)
    plain = PagedKV(cache.k_pages, cache.v_pages, cache.page_table, cache.lengths)
    o, expected = (diff_attention_paged(q, lam_logit, x, selection) for x in (cache.pages(selection=selection), plain))
    assert torch.equal(o, expected)


@pytest.mark.parametrize("entry", [-1, -(2**31), 10**6, 2**31 - 1])
def test_a_corrupted_page_table_harms_its_own_sequence_alone(entry):
    model = tiny_model(torch.float32, sparse_mode="pair_mean")
    tokens, mask = ragged_tokens(30, (0, 7))
    clean, broken = (offloaded(model, tokens[:, :22], mask[:, :22]) for _ in range(2))
    broken.page_table[0] = entry
    expected, got = (model.decode(tokens[:, 22:], cache) for cache in (clean, broken))
    assert got.isfinite().all()
    assert torch.equal(got[1], expected[1])
    assert (got[0] - expected[0]).abs().max() > 1e-3


def test_copies_and_pickles_go_on_alone():
    model = tiny_model(torch.float32, sparse_mode="pair_mean")
    cache = offloaded(model, torch.randint(1, VOCAB, (2, 40)))
    more = torch.randint(1, VOCAB, (2, 5))
    model.decode(more, cache)
    others = {"deepcopy": copy.deepcopy(cache), "pickle": pickle.loads(pickle.dumps(cache)), "fork": cache.fork()}
    others["fork"].reset()
    others["fork"] = cache.fork()
    expected = model.decode(more, cache)
    for name, other in others.items():
        if name != "fork":
            assert isinstance(other.pool, OffloadedPool)
            assert other.pool is not cache.pool
            assert torch.equal(model.decode(more, other), expected)


def test_a_pool_that_grows():
    cache = SharedKVCache(spec(), 2, CAPACITY, offload="cpu", resident_blocks=3)
    rows = fresh(19, 9)
    append(cache, rows)
    cache.grow(40, 30)
    append(cache, fresh(15, 20))
    assert torch.equal(contents(cache, 0)[0][:19], rows[0])
    assert cache.pool.slot_of.shape == (30 * H,)
    indices = torch.tensor([[3, 8], [2, 6]], dtype=torch.int32).view(2, 1, 1, 1, 2).expand(2, 1, H, 1, 2)
    lists = BlockSelection(indices.contiguous(), torch.full((2, 1, H, 1), 2, dtype=torch.int32), 1, BLOCK_N)
    q, lam_logit = torch.randn(2, 1, 4 * H, D), torch.randn(2, 1, 2 * H)
    with pytest.raises(ValueError, match="expected at least 4 for a read of 8 pages, got 3"):
        cache.pages(selection=lists)
    lists = BlockSelection(lists.indices, lists.counts - 1, 1, BLOCK_N)
    plain = PagedKV(cache.k_pages, cache.v_pages, cache.page_table, cache.lengths)
    o, expected = (diff_attention_paged(q, lam_logit, x, lists) for x in (cache.pages(selection=lists), plain))
    assert torch.equal(o, expected)


def test_pinned_memory_is_registered_until_nothing_lies_in_it(monkeypatch):
    registered = {}

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            registered[address] = size
            return 0 if size < 4000 else 2

        def cudaHostUnregister(self, address):
            del registered[address]

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cpu")
    x = pinned_zeros(5, 4, 3, dtype=torch.bfloat16, device=device)
    assert registered == {x.data_ptr(): 120}
    assert x.shape == (5, 4, 3)
    assert not x.any()
    part = x[1:3]
    del x
    gc.collect()
    assert len(registered) == 1
    assert not waited
    part += 1
    del part
    gc.collect()
    assert not registered
    assert waited == [device]  # before it let go
    with pytest.raises(RuntimeError, match="cannot be pinned"):
        pinned_zeros(1000, dtype=torch.float32, device=device)
    registered.clear()  # which the call that failed has not done, nor has its memory
    with pytest.raises(RuntimeError, match="GiB of host memory are not to be had"):
        pinned_zeros(1 << 60, dtype=torch.float32, device=device)
    gc.collect()


def test_lists_are_sure_to_fit_with_a_place_each():
    pool = SharedKVCache(spec(), 1, CAPACITY, offload="cpu", resident_blocks=5).pool
    assert pool.holds(5)
    assert not pool.holds(6)


@pytest.mark.parametrize("kernels", [False, True])
def test_after_an_interrupted_read_nothing_is_taken_for_there(kernels, monkeypatch):
    cache = SharedKVCache(spec(), 1, CAPACITY, offload="cpu", resident_blocks=3)
    append(cache, fresh(CAPACITY))
    monkeypatch.setattr(offload, "by_kernels", lambda x: kernels)

    def there(*blocks):
        indices = torch.tensor(blocks, dtype=torch.int32).expand(1, 1, H, 1, -1).contiguous()
        counts = torch.full((1, 1, H, 1), len(blocks), dtype=torch.int32)
        table = cache.pages(selection=BlockSelection(indices, counts, 1, BLOCK_N)).page_table
        return bool((table[:, :, list(blocks)] >= 0).all())

    assert there(0, 1, 2)
    read = OffloadedPool._read

    def interrupted(*call):
        read(*call)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedPool, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            there(0, 1, 2)
    assert there(2)
    assert there(2, 3)
    assert there(2, 4)


def gpu_model(mode: str):
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "sliding_window": 128}
    blocks = {"sparse_block_n": 64, "sparse_budget": 8, "sparse_noise_budget": 6, "max_position_embeddings": 1 << 18}
    return tiny_model(torch.bfloat16, sparse_mode=mode, **sizes, **blocks).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["pair_mean", "per_class"])
@pytest.mark.parametrize("resident_blocks", [None, 60])
@pytest.mark.parametrize("use_graphs", [False, True])
def test_on_a_device_the_same_bits(mode, resident_blocks, use_graphs):
    """In bfloat16, through the kernels; also where pages drive each other out, and on a stream of one's own. Copies on
    write and truncation come between; nothing waits for the device but lists that might not fit.
    """
    model = gpu_model(mode)
    plain = model.new_cache(3, 3000, max_rollback=3)
    cache = model.new_cache(3, 3000, max_rollback=3, offload="cpu", resident_blocks=resident_blocks)
    pool = cache.pool
    assert pool.k_pages.is_pinned()
    assert pool.v_pages.is_pinned()
    assert {x.device.type for x in (pool.summaries, pool.k_slots, pool.slot_of, cache.page_table)} == {"cuda"}
    tokens = torch.randint(1, VOCAB, (3, 2000), device="cuda")
    logits = [model.prefill(tokens, cache=x, chunk_tokens=300)[0] for x in (plain, cache)]
    assert torch.equal(*logits)
    assert torch.equal(plain.full_summaries(), cache.full_summaries())
    torch.cuda.synchronize()
    assert torch.equal(pool.k_pages[: 3 * 4000 // 64].cuda(), plain.k_pages[: 3 * 4000 // 64])
    side, captured = torch.cuda.Stream(), 0
    for i in range(90):
        ids = torch.randint(1, VOCAB, (3, 1 + i % 2), device="cuda")
        graph = use_graphs and can_capture(model.model, cache, ids.shape[1])
        fits = pool.holds(ids.shape[1] * 3 * model.config.listed_blocks())
        captured += graph
        expected = model.decode(ids, plain, use_graphs=graph)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if i >= 30 else torch.cuda.current_stream()):
            torch.cuda.set_sync_debug_mode("error" if fits and i % 45 > 6 else "default")
            try:
                logits = model.decode(ids, cache, use_graphs=use_graphs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(logits, expected), i
        if i % 10 == 9:
            for x in (plain, cache):
                x.truncate((1, 0, 2))
        if i == 40:
            plain, cache = plain.fork([2, 0, 0]), cache.fork([2, 0, 0])
    assert captured == (use_graphs and (45 if resident_blocks and mode == "per_class" else 90))
    torch.cuda.synchronize()
    for b in range(3):
        k, v, summaries = contents(plain, b)
        page = cache.page_table[b, :, torch.arange(len(k)).cuda() // 64].cpu().long()
        for own, pages in ((k, cache.k_pages), (v, cache.v_pages)):
            assert torch.equal(pages[page, torch.arange(len(k)) % 64].transpose(0, 1), own.cpu())
        assert torch.equal(cache.full_summaries()[b, : len(summaries)], summaries)
    print("pages fetched:", pool.fetched, "slots:", len(pool.last_read))


@pytest.mark.gpu
def test_device_memory_does_not_grow_with_the_prompt_and_a_step_waits_for_nothing():
    model = gpu_model("pair_mean")
    peaks = []
    for n in (1 << 14, 1 << 17):
        cache = model.new_cache(1, n + 200, offload="cpu")
        tokens = torch.randint(1, VOCAB, (1, n), device="cuda")
        model.prefill(tokens[:, :2048], cache=cache, chunk_tokens=2048)  # compiles
        cache.reset()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.prefill(tokens, cache=cache, chunk_tokens=2048)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    kv = 2 * (1 << 17) * 2 * 64 * 2
    print("peaks:", peaks, "bytes; keys and values:", kv)
    assert peaks[1] < peaks[0] + 0.15 * kv
    token = tokens[:, :1]
    for use_graphs in (False, True):
        for _ in range(3):
            model.decode(token, cache, use_graphs=use_graphs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(70):  # over the end of a page
                model.decode(token, cache, use_graphs=use_graphs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
