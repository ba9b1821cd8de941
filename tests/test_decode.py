"""The decode kernels within the error budget of the oracle, on caches whose unused memory is NaN.

Without a GPU they run in Triton's interpreter, in float32 and float16; cases marked gpu add bfloat16, caches of a
million tokens and CUDA graphs. Outputs and workspaces are poisoned: memory that is allocated starts as NaN.
"""

import itertools

import pytest
import torch

from diffv2_sparse import BlockSelection, diff_attention, diff_attention_paged
from diffv2_sparse.cache import PagedKV
from tests.oracle import assert_within_budget, error, qkv, random_selection

pytest.importorskip("triton")
from diffv2_sparse import ops


@pytest.fixture(autouse=True)
def _poison():
    """Fills what `torch.empty` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def cache_of(keys, values, block_n, NP, *, waste=float("nan")):
    """Pages, in random order, that hold the keys and values `[S, H, D]` of each sequence; `waste` in every slot that
    holds none, and table entries past a sequence's end that name pages without keys, or none at all.
    """
    B, (_, H, D) = len(keys), keys[0].shape
    P = B * H * NP + 3
    order = torch.randperm(P)
    pools = []
    for parts in (keys, values):
        pool = torch.full((P, block_n, D), waste, dtype=parts[0].dtype)
        for b, x in enumerate(parts):
            for h, i in itertools.product(range(H), range(-(-len(x) // block_n))):
                own = x[i * block_n : (i + 1) * block_n, h]
                pool[order[(b * H + h) * NP + i], : len(own)] = own.cpu()
        pools.append(pool)
    table = order[: B * H * NP].view(B, H, NP).int()
    for b, x in enumerate(keys):
        beyond = table[b, :, -(-len(x) // block_n) :]
        beyond[:] = torch.tensor([P, -1, 2**31 - 1, int(order[-1])])[torch.randint(4, beyond.shape)]
    lengths = torch.tensor([len(x) for x in keys], dtype=torch.int32)
    device = keys[0].device
    return PagedKV(*(x.to(device) for x in (*pools, table, lengths)))


def case(lengths, T, HQ, H, D, block_n, *, dtype=torch.float32, device="cpu", differential=True):
    """q, lam_logit, the keys and values of each sequence, and the cache that holds them."""
    longest = max(lengths)
    q, k, v, lam = qkv(len(lengths), T, longest, HQ, H, D, dtype=dtype, device=device, differential=differential)
    keys, values = ([x[b, :S] for b, S in enumerate(lengths)] for x in (k, v))
    return q, lam, keys, values, cache_of(keys, values, block_n, -(-longest // block_n) + 1)


def lists_for(lengths, T, H, block_n, *, C=1, NB=4, block_m=1, device="cpu"):
    """Random lists over the blocks of each sequence, garbage after their ends; None for `C = None`."""
    if C is None:
        return None
    parts = [random_selection(1, T, S, H, C=C, NB=NB, block_m=block_m, block_n=block_n) for S in lengths]
    wide = [torch.nn.functional.pad(p.indices, (0, NB - p.indices.shape[-1]), value=-9) for p in parts]
    return BlockSelection(torch.cat(wide).to(device), torch.cat([p.counts for p in parts]).to(device), block_m, block_n)


def one_sequence(selection, b):
    if selection is None:
        return None
    return BlockSelection(
        selection.indices[b : b + 1], selection.counts[b : b + 1], selection.block_m, selection.block_n
    )


def check(lengths, T, HQ, H, D, block_n, *, C=None, NB=4, block_m=1, scale=None, device, **options):
    q, lam, keys, values, pages = case(lengths, T, HQ, H, D, block_n, device=device, **options)
    selection = lists_for(lengths, T, H, block_n, C=C, NB=NB, block_m=block_m, device=device)
    o = diff_attention_paged(q, lam, pages, selection, scale=scale, backend="triton")
    for b in range(len(lengths)):
        own = q[b : b + 1], keys[b][None], values[b][None], None if lam is None else lam[b : b + 1]
        got = (o[b : b + 1],)  # decoding returns no lse
        assert_within_budget(lambda *_, got=got: got, own, one_sequence(selection, b), scale=scale, gradients=False)


SHAPES = [  # lengths, T, HQ, H, D, block_n, block_m, C
    ((150, 7, 64), 1, 4, 2, 32, 16, 1, (1, None)),  # several pages fill a tile of keys
    ((201, 90), 2, 12, 2, 24, 64, 1, (1, 2)),  # a tile is a page; three pairs a group; a list per token
    ((300,), 2, 4, 1, 16, 128, 1, (2, None)),  # a page is several tiles
    ((70, 33), 5, 4, 2, 16, 20, 16, (1, 2)),  # pages that no tile divides; a row longer than the call
    ((40,), 7, 4, 2, 16, 1, 3, (2, None)),  # pages of one key; rows that the tokens do not fill
    ((130,), 16, 8, 1, 16, 48, 8, (1, 2)),
]


@pytest.mark.parametrize(("shape", "C"), [(shape[:-1], C) for shape in SHAPES for C in shape[-1]])
def test_ragged_sequences(shape, C, device):
    *sizes, block_m = shape
    check(*sizes, C=C, block_m=block_m, device=device)


@pytest.mark.parametrize(("D", "block_n", "C"), [(64, 64, 1), (96, 32, 2), (128, 64, None), (256, 256, 1)])
def test_half_precision(D, block_n, C, device):
    check((330, 140), 2, 8, 2, D, block_n, C=C, dtype=torch.float16, device=device)


@pytest.mark.parametrize("C", [1, None])
def test_ordinary_attention_with_any_group(C, device):
    check((100, 37), 2, 6, 2, 16, 16, C=C, differential=False, device=device)


@pytest.mark.parametrize(("T", "HQ"), [(20, 8), (1, 140)])
def test_more_rows_than_a_tile(T, HQ, device):
    check((60,), T, HQ, 1, 16, 16, device=device)


@pytest.mark.parametrize(("block_m", "C"), [(1, 1), (4, 2), (1, None)])
def test_sequences_shorter_than_the_call(block_m, C, device):
    """Queries before a sequence's first key get 0, as from the torch backend over pages without NaN."""
    T, lengths = 5, (0, 2, 40)
    q, lam, keys, values, pages = case(lengths, T, 4, 1, 16, 8, device=device)
    selection = lists_for((40,) * 3, T, 1, 8, C=C, block_m=block_m, device=device)
    o = diff_attention_paged(q, lam, pages, selection, backend="triton")
    assert (o[0] == 0).all()
    assert (o[1, :3] == 0).all()
    clean = cache_of([x.double() for x in keys], [x.double() for x in values], 8, 6, waste=0.0)
    exact = diff_attention_paged(q.double(), lam.double(), clean, selection, backend="torch")
    assert error(o, exact) < 1e-6


@pytest.mark.parametrize("selected", [True, False])
def test_pages_that_do_not_exist_are_never_read(selected, device):
    """A page id outside the pool is a block without keys."""
    q, lam, keys, values, pages = case((64, 50), 2, 8, 2, 16, 16, device=device)
    broken = pages.page_table.clone()
    broken[:, :, 1], broken[:, 0, 2] = 10**6, -7
    kept = BlockSelection(*(x.to(device) for x in lists_without((1,), (1, 2), 2, 2)), 16, 16)
    everything = BlockSelection(*(x.to(device) for x in lists_without((), (), 2, 2)), 16, 16) if selected else None
    got = PagedKV(pages.k_pages, pages.v_pages, broken, pages.lengths)
    o = diff_attention_paged(q, lam, got, everything, backend="triton")
    torch.testing.assert_close(o, diff_attention_paged(q, lam, pages, kept, backend="triton"))
    assert o.isfinite().all()


def lists_without(missing_1, missing_0, B, NM, blocks=4):
    """Lists of all blocks but those missing of KV head 1 and of head 0."""
    indices, counts = torch.zeros(B, 1, 2, 1, blocks).int(), torch.zeros(B, 1, 2, 1).int()
    for h, missing in enumerate((missing_0, missing_1)):
        left = [i for i in range(blocks) if i not in missing]
        indices[:, 0, h, 0, : len(left)] = torch.tensor(left).int()
        counts[:, 0, h] = len(left)
    return indices, counts


@pytest.mark.parametrize(("block_n", "C"), [(16, 2), (64, 1)])
def test_lists_outside_the_keys_are_skipped(block_n, C, device):
    q, lam, keys, values, pages = case((3 * block_n - 5, 2 * block_n), 1, 2, 1, 16, block_n, device=device)

    def run(blocks, count):
        indices = torch.tensor(blocks, dtype=torch.int32, device=device).expand(2, C, 1, 1, len(blocks))
        counts = torch.full((2, C, 1, 1), count, dtype=torch.int32, device=device)
        return diff_attention_paged(q, lam, pages, BlockSelection(indices, counts, 1, block_n), backend="triton")

    exact = run([0, 1], 2)
    assert exact.abs().sum() > 0
    for broken in (run([-5, 0, 1, 7, 2**31 - 1], 5), run([0, 1], 2**31 - 1), run([-(2**31), 0, 1, 2], 3)):
        torch.testing.assert_close(broken, exact)
    for nothing in (run([0, 1], 0), run([0, 1], -3), run([9, -1], 2)):
        assert (nothing == 0).all()


@pytest.mark.parametrize("C", [1, None])
def test_the_same_as_contiguous_keys(C, device):
    q, lam, keys, values, pages = case((77, 77), 3, 4, 2, 32, 16, device=device)
    selection = lists_for((77, 77), 3, 2, 16, C=C, block_m=2, device=device)
    k, v = torch.stack(keys), torch.stack(values)
    torch.testing.assert_close(
        diff_attention_paged(q, lam, pages, selection, backend="triton"),
        diff_attention(q, k, v, lam, selection, backend="torch"),
    )


@pytest.mark.parametrize("resident", [0, 1, 1000])
def test_any_number_of_splits(resident, device, monkeypatch):
    from diffv2_sparse.kernels import tiles

    monkeypatch.setattr(tiles, "RESIDENT", resident)
    check((700, 90), 1, 4, 1, 16, 16, device=device)
    check((700, 90), 1, 4, 1, 16, 16, C=2, NB=20, device=device)


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0, 40.0])
def test_scale(scale, device):
    check((200, 130), 1, 4, 1, 16, 16, scale=scale, device=device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_number_stays_where_it_was(device):
    q, lam, keys, values, pages = case((60, 40), 2, 4, 1, 16, 16, device=device)
    clean = diff_attention_paged(q, lam, pages, backend="triton")
    q[0, 1, 2] = float("nan")
    o = diff_attention_paged(q, lam, pages, backend="triton")
    assert o[0, 1, 1].isnan().all()
    o[0, 1, 1], clean[0, 1, 1] = 0, 0
    assert torch.equal(o, clean)


def test_any_strides(device):
    q, lam, keys, values, pages = case((60, 40), 2, 4, 2, 16, 16, device=device)
    selection = lists_for((60, 40), 2, 2, 16, C=2, device=device)
    around = torch.nn.functional.pad(pages.page_table, (2, 3), value=-5)
    strided = PagedKV(
        pages.k_pages.mT.contiguous().mT,
        torch.stack([pages.v_pages, pages.k_pages], 1)[:, 0],
        around[:, :, 2:-3],
        torch.stack([pages.lengths, pages.lengths], 1)[:, 0],
    )
    lists = BlockSelection(
        selection.indices.transpose(1, 2).contiguous().transpose(1, 2), selection.counts, 1, selection.block_n
    )
    o = diff_attention_paged(q, lam, pages, selection, backend="triton")
    q, lam = q.transpose(1, 2).contiguous().transpose(1, 2), lam.mT.contiguous().mT
    assert torch.equal(o, diff_attention_paged(q, lam, strided, lists, backend="triton"))


def test_same_inputs_same_bits(device):
    q, lam, _, _, pages = case((700, 90), 1, 4, 1, 16, 16, device=device)
    selection = lists_for((700, 90), 1, 1, 16, C=2, NB=16, device=device)
    for lists in (selection, None):
        first, second = (diff_attention_paged(q, lam, pages, lists, backend="triton") for _ in range(2))
        assert torch.equal(first, second)


def test_which_backend(device):
    q, lam, _, _, pages = case((60,), 1, 4, 2, 16, 16, device=device)
    auto, torch_backend, triton_backend = (
        diff_attention_paged(q, lam, cache_of_zeros(pages), backend=name) for name in ("auto", "torch", "triton")
    )
    assert torch.equal(auto, triton_backend if q.is_cuda else torch_backend)
    wide = PagedKV(pages.k_pages.double(), pages.v_pages.double(), pages.page_table, pages.lengths)
    with pytest.raises(ValueError, match=r"triton.*float64.*torch"):
        diff_attention_paged(q.double(), lam, wide, backend="triton")
    assert diff_attention_paged(q.double(), lam, cache_of_zeros(wide)).dtype == torch.float64


def cache_of_zeros(pages):
    return PagedKV(pages.k_pages.nan_to_num(), pages.v_pages.nan_to_num(), pages.page_table, pages.lengths)


@pytest.mark.parametrize("differential", [True, False])
def test_operator(differential, device):
    q, lam, _, _, pages = case((40,), 1, 2, 1, 16, 16, differential=differential, device=device)
    selection = lists_for((40,), 1, 1, 16, C=1, device=device)
    inputs = q, pages.k_pages, pages.v_pages, pages.page_table, pages.lengths, lam
    torch.library.opcheck(ops._decode, (*inputs, selection.indices, selection.counts, 1, 0.25))
    torch.library.opcheck(ops._decode, (*inputs, None, None, 0, 0.25))


@pytest.mark.parametrize("C", [2, None])
def test_compiles_whole(C, device):
    q, lam, _, _, pages = case((60, 40), 1, 4, 2, 16, 16, device=device)
    selection = lists_for((60, 40), 1, 2, 16, C=C, device=device)

    def attend(q, lam):
        return diff_attention_paged(2 * q, lam, pages, selection, backend="triton") + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, lam), attend(q, lam))


CELLS = itertools.product(enumerate((16, 64, 80, 96, 128, 256)), enumerate((1, 16, 48, 64, 128, 256)))
GRID = [  # every D with half of the page sizes, the others in turn
    (D, block_n, *rest)
    for (D, block_n), *rest in zip(
        [(D, block_n) for (i, D), (j, block_n) in CELLS if (i + j) % 2 == 0],
        itertools.cycle((torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)),
        itertools.cycle((8, 2, 4, 16, 6)),
        itertools.cycle((1, 2, 1, None)),
        itertools.cycle((1, 4, 16, 1, 7)),
        itertools.cycle((1, 1, 5)),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "block_n", "dtype", "G", "C", "T", "block_m"), GRID)
def test_grid(D, block_n, dtype, G, C, T, block_m):
    check((1500, 16, 700), T, 3 * G, 3, D, block_n, C=C, NB=9, block_m=block_m, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("C", [1, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ordinary_attention_in_every_dtype(C, dtype):
    check((1500, 16, 700), 3, 15, 3, 128, 64, C=C, NB=9, dtype=dtype, differential=False, device="cuda")


def long_cache(S, H, D, block_n, spread):
    """A sequence of S keys on the GPU; page i of head h is page `spread · (h · NP + i)` of the pool."""
    NP = S // block_n
    P = spread * H * NP
    generator = torch.Generator("cuda").manual_seed(0)
    pools = [torch.empty(P, block_n, D, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for pool in pools:
        for part in pool.split(1 << 16):
            part.normal_(generator=generator)
    table = torch.arange(0, P, spread, dtype=torch.int32, device="cuda").view(1, H, NP)
    return PagedKV(*pools, table, torch.tensor([S], dtype=torch.int32, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
def test_a_million_tokens(T):
    """In a pool of more than 2³¹ elements, against float64 over the selected keys alone."""
    S, H, D, block_n, NB = 1 << 20, 8, 128, 64, 32
    pages = long_cache(S, H, D, block_n, spread=3)
    assert pages.k_pages.numel() > 2**31
    q, _, _, lam = qkv(1, T, T, 64, H, D, dtype=torch.bfloat16, device="cuda")
    chosen = torch.rand(H, S // block_n, device="cuda").topk(NB).indices.sort(-1).values
    chosen[:, -1] = S // block_n - 1  # the block of the queries
    indices = chosen.int().expand(1, 1, 1, H, NB).movedim(3, 2).expand(1, 1, H, T, NB).contiguous()
    counts = torch.full((1, 1, H, T), NB, dtype=torch.int32, device="cuda")
    o = diff_attention_paged(q, lam, pages, BlockSelection(indices, counts, 1, block_n), backend="triton")
    own = pages.page_table[0].gather(1, chosen).long()
    k, v = (x[own].flatten(1, 2).movedim(0, 1)[None] for x in (pages.k_pages, pages.v_pages))
    assert_within_budget(lambda *_: (o,), (q, k, v, lam), gradients=False)


@pytest.mark.gpu
def test_dense_over_a_million_tokens():
    S, H, D = 1 << 20, 2, 128
    pages = long_cache(S, H, D, 64, spread=1)
    q, _, _, lam = qkv(1, 2, 2, 16, H, D, dtype=torch.bfloat16, device="cuda")
    k, v = (x.view(H, S, D).movedim(0, 1)[None] for x in (pages.k_pages, pages.v_pages))
    o = diff_attention_paged(q, lam, pages, backend="triton")
    assert_within_budget(lambda *_: (o,), (q, k, v, lam), gradients=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("C", "T"), [(1, 1), (2, 4), (None, 3)])
def test_graph_follows_what_changes_in_place(C, T):
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q, lam, _, _, pages = case((900, 300), T, 16, 2, 64, 64, **options)
    selection = lists_for((900, 300), T, 2, 64, C=C, NB=6, device="cuda")
    diff_attention_paged(q, lam, pages, selection, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = diff_attention_paged(q, lam, pages, selection, backend="triton")
    seen = []
    for lengths in ((900, 300), (10, 800), (0, 1)):
        other_q, other_lam, _, _, other = case((900, 900), T, 16, 2, 64, 64, **options)
        q.copy_(other_q)
        lam.copy_(other_lam)
        for old, new in ((pages.k_pages, other.k_pages), (pages.v_pages, other.v_pages)):
            old.copy_(new.nan_to_num())
        pages.page_table.copy_(other.page_table)
        pages.lengths.copy_(torch.tensor(lengths))
        if selection is not None:
            lists = lists_for((900, 900), T, 2, 64, C=C, NB=6, device="cuda")
            selection.indices.copy_(lists.indices)
            selection.counts.copy_(lists.counts)
        graph.replay()
        assert torch.equal(o, diff_attention_paged(q, lam, pages, selection, backend="triton"))
        exact = diff_attention_paged(
            q.double(),
            lam.double(),
            PagedKV(pages.k_pages.double(), pages.v_pages.double(), pages.page_table, pages.lengths),
            selection,
            backend="torch",
        )
        assert error(o, exact) < 1e-2
        seen.append(o.clone())
    assert not torch.equal(seen[0], seen[1])
    graph.replay()
    assert torch.equal(o, seen[-1])
