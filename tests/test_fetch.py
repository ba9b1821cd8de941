"""Kernels that move an offloaded cache's pages: slot for slot what plain torch does, whatever is read and written."""

import random
from contextlib import suppress

import pytest
import torch

from diffv2_sparse import BlockSelection, offload
from diffv2_sparse.cache import SharedKVCache
from diffv2_sparse.offload import selected_pages
from diffv2_sparse.yoco.layout import spans
from tests.test_cache import contents
from tests.test_cache_sharing import spec
from tests.tiny_yoco import VOCAB, ragged_tokens, tiny_model

pytest.importorskip("triton")

BOOKS = ("slot_of", "page_in", "order", "last_read", "clock")


@pytest.fixture
def moved_by(monkeypatch):
    """Has kernels move pages, in the interpreter, or torch."""

    def choose(kernels: bool):
        monkeypatch.setattr(offload, "by_kernels", lambda slots: kernels)

    return choose


def random_lists(rng: random.Random, cache: SharedKVCache, C: int, T: int, NB: int) -> BlockSelection:
    """Any number of blocks a list, behind which stands what must not be read; rows may name the same ones."""
    B, H, block_n = cache.batch_size, cache.spec.kv_heads, cache.spec.block_n
    indices = torch.randint(-(2**31), 2**31 - 1, (B, C, H, T, NB))
    counts = torch.zeros(B, C, H, T, dtype=torch.int32)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        blocks = range(-(-cache.tokens[at[0]] // block_n))
        own = sorted(rng.sample(blocks, rng.randint(0, min(NB, len(blocks)))))
        indices[tuple(at)][: len(own)] = torch.tensor(own)
        counts[tuple(at)] = len(own)
    return BlockSelection(indices.int().to(cache.spec.device), counts.to(cache.spec.device), 1, block_n)


def kept(cache: SharedKVCache, b: int) -> tuple[torch.Tensor, ...]:
    """`contents`, on the host."""
    position, block_n = torch.arange(cache.tokens[b]), cache.spec.block_n
    page = cache.page_table.cpu()[b, :, position // block_n].long()
    summaries = cache.full_summaries()[b, : cache.tokens[b] // block_n].cpu()
    return *(pages[page, position % block_n] for pages in (cache.k_pages, cache.v_pages)), summaries


@pytest.mark.parametrize(
    ("sizes", "C", "T", "NB", "resident"),
    [
        ({"kv_heads": 2, "head_dim": 4}, 1, 1, 3, 6),
        ({"kv_heads": 2, "head_dim": 4}, 2, 2, 3, 8),
        ({"kv_heads": 1, "head_dim": 3, "dtype": torch.float16, "block_n": 3}, 2, 1, 4, 9),  # 16-bit words
        ({"kv_heads": 3, "head_dim": 6, "block_n": 2}, 1, 2, 4, 9),
    ],
)
def test_the_same_slots_as_in_torch(sizes, C, T, NB, resident, device, moved_by, monkeypatch):
    """Two caches, one moved by kernels, through appends, copies on write, truncation, growth and reads; tiles so small
    that every loop goes round.
    """
    from diffv2_sparse.kernels import fetch

    monkeypatch.setattr(offload, "WRITTEN_SINGLY", 6)
    for name, size in (("LIST_TILE", 4), ("GIVE_TILE", 8), ("PAGE_TILE", 8), ("PROGRAMS", 3)):
        monkeypatch.setattr(fetch, name, size)
    rng = random.Random(f"{sizes} {C} {T}")
    options = {"blocks": 120, "max_rollback": 5, "offload": "cpu", "resident_blocks": resident}
    caches = [SharedKVCache(spec(**sizes, device=device), 2, 100, **options) for _ in range(2)]
    H, D, dtype = caches[0].spec.kv_heads, caches[0].spec.head_dim, caches[0].spec.dtype
    for i in range(50):
        act = rng.choice(("append", "append", "read", "read", "read", "truncate", "reorder", "grow")) if i else "append"
        if max(caches[0].tokens) > 90:
            act = "reset"
        counts = rng.choice(((1, 1), (rng.randint(0, 7), rng.randint(1, 7)))) if i else (41, 60)
        k, v = torch.randn(2, sum(counts), H, D, device=device).to(dtype)
        room = min(n - floor for n, floor in zip(caches[0].tokens, caches[0].floors))
        order, taken = torch.tensor([rng.randrange(2) for _ in range(2)]), rng.randint(0, room)
        lists = random_lists(rng, caches[0], C, T, NB)
        views = []
        for cache, kernels in zip(caches, (True, False)):
            moved_by(kernels)
            if act == "append":
                cache.append(k, v, *spans(counts, cache.tokens, device), counts, max(counts))
            elif act == "read" and max(cache.tokens):
                with suppress(ValueError):  # of more pages than there are slots
                    views.append(cache.pages(selection=lists))
            elif act == "truncate":
                cache.truncate(taken)
            elif act == "reorder":
                cache.reorder_cache(order)
            elif act == "reset":
                cache.reset([0] if i % 2 else None)
            elif act == "grow":
                cache.grow(100, len(cache.pool.holders) + i % 2)
        pools = [cache.pool for cache in caches]
        for name in BOOKS:
            assert torch.equal(*(getattr(pool, name) for pool in pools)), (i, act, name)
        assert torch.equal(pools[0].summaries, pools[1].summaries)
        for b in range(2):
            assert all(map(torch.equal, *(kept(cache, b) for cache in caches)))
        assert len(views) != 1
        if views:
            pages = selected_pages(caches[0].page_table, lists, len(pools[0].slot_of))
            held = pages >= 0
            view = views[0].page_table
            assert torch.equal(view, views[1].page_table)
            sequence, _, head, _, _ = held.nonzero().unbind(1)
            slot = view[sequence, head, lists.indices[held].long()].long()
            assert torch.equal(pools[0].page_in[slot].long(), pages[held])
            assert torch.equal(pools[0].k_slots[slot].cpu(), pools[0].k_pages[pages[held].cpu()])
            assert torch.equal(pools[0].v_slots[slot].cpu(), pools[0].v_pages[pages[held].cpu()])
    assert pools[0].fetched == pools[1].fetched > 2 * resident * H


@pytest.mark.parametrize("self_decoder", ["sliding_window", "gated_retention"])
def test_a_model_computes_the_same_bits(self_decoder, moved_by):
    moved_by(True)
    model = tiny_model(torch.float32, self_decoder=self_decoder, sparse_mode="per_class")
    caches = [model.new_cache(2, 60, max_rollback=2, offload=where) for where in (None, "cpu")]
    tokens, mask = ragged_tokens(40, (0, 9))
    assert torch.equal(*(model.prefill(tokens, mask, cache, chunk_tokens=17)[0] for cache in caches))
    for T in (1, 1, 3, 1, 2):
        ids = torch.randint(1, VOCAB, (2, T))
        assert torch.equal(*(model.decode(ids, cache) for cache in caches))
        for cache in caches:
            cache.truncate((0, 1))
    for b in range(2):
        assert all(map(torch.equal, contents(caches[0], b), contents(caches[1], b)))


@pytest.mark.parametrize("entry", [-1, -(2**31), 12, 10**6, 2**31 - 1])  # of 12 pages
def test_no_entry_leads_beyond_the_pages(entry, moved_by):
    """A page table or a list that names what is not there: nothing of it is fetched or shown."""
    moved_by(True)
    cache = SharedKVCache(spec(), 2, 12, offload="cpu", resident_blocks=6)
    k, counts = torch.randn(20, 2, 3), (10, 10)
    cache.append(k, -k, *spans(counts, (0, 0), torch.device("cpu")), counts, 10)
    cache.page_table[0, 0, 1] = entry
    indices = torch.tensor([0, 1, 2], dtype=torch.int32).expand(2, 1, 2, 1, 3).clone()
    indices[1, 0, 1, 0, 2] = entry
    view = cache.pages(selection=BlockSelection(indices, torch.full_like(indices[..., 0], 3), 1, 4)).page_table
    assert view[0, 0].tolist()[1] == -1
    assert view[1, 1].tolist()[2] == -1
    assert (view >= 0).sum() == cache.pool.fetched == 10


def test_an_interrupted_fetch_leaves_nothing_wrong(moved_by, monkeypatch):
    from diffv2_sparse.kernels import fetch

    moved_by(True)
    cache = SharedKVCache(spec(), 1, 40, offload="cpu", resident_blocks=3)
    k = torch.randn(40, 2, 3)
    cache.append(k, -k, *spans((40,), (0,), torch.device("cpu")), (40,), 40)

    def read(*blocks):
        indices = torch.tensor(blocks, dtype=torch.int32).expand(1, 1, 2, 1, 3).contiguous()
        selection = BlockSelection(indices, torch.full_like(indices[..., 0], 3), 1, 4)
        pages = cache.pages(selection=selection)
        slot = pages.page_table[:, :, list(blocks)].long()
        assert torch.equal(pages.k_pages[slot], cache.k_pages[cache.page_table[:, :, list(blocks)].long()])

    class Stopped:
        def __getitem__(self, grid):
            raise KeyboardInterrupt

    for kernel in ("_look_up_kernel", "_give_kernel", "_copy_kernel", "_view_kernel"):
        read(0, 1, 2)
        with monkeypatch.context() as patch:
            patch.setattr(fetch, kernel, Stopped())
            with pytest.raises(KeyboardInterrupt):
                read(2, 3, 4)
        read(2, 3, 4)
        read(0, 4, 9)
