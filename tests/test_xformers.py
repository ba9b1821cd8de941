"""Backend "xformers" within the error budget of the oracle, and equal to the torch backend over the same lists.

Where xFormers can be imported: without a GPU through Triton's interpreter, in float16; cases marked gpu add bfloat16,
long caches and CUDA graphs. What it refuses, and what it says where xFormers is missing, is checked everywhere.
"""

import os
import subprocess
import sys

import pytest
import torch

from diffv2_sparse import BlockSelection, diff_attention_paged
from diffv2_sparse.cache import PagedKV
from tests.oracle import assert_within_budget, error
from tests.test_decode import case, lists_for, lists_without, one_sequence

if not torch.cuda.is_available():
    os.environ.setdefault("XFORMERS_ENABLE_TRITON", "1")  # before the first `import xformers`


@pytest.fixture(scope="module")
def xformers():
    """Imports it; a test that asks for this is skipped where that fails."""
    from diffv2_sparse.xformers_paged import load_fmha

    try:
        return load_fmha()
    except ImportError as error:
        pytest.skip(str(error))


def check(lengths, T, HQ, H, D, block_n, *, C=None, NB=4, block_m=1, scale=None, dtype=torch.float16, **options):
    device = options.get("device", "cpu")
    q, lam, keys, values, pages = case(lengths, T, HQ, H, D, block_n, dtype=dtype, **options)
    selection = lists_for(lengths, T, H, block_n, C=C, NB=NB, block_m=block_m, device=device)
    o = diff_attention_paged(q, lam, pages, selection, scale=scale, backend="xformers")
    assert o.dtype == dtype
    for b in range(len(lengths)):
        own = q[b : b + 1], keys[b][None], values[b][None], None if lam is None else lam[b : b + 1]
        got = (o[b : b + 1],)
        assert_within_budget(lambda *_, got=got: got, own, one_sequence(selection, b), scale=scale, gradients=False)


SHAPES = [  # lengths, T, HQ, H, D, block_n, block_m, C
    ((150, 7, 64), 1, 4, 2, 32, 64, 1, 1),
    ((150, 70), 1, 4, 2, 16, 64, 1, 2),
    ((201, 90), 3, 12, 2, 16, 64, 1, 2),  # three pairs a group; a list per token
    ((300, 130), 2, 4, 1, 64, 128, 1, 1),  # a page is two tiles
    ((270, 33), 5, 8, 2, 16, 64, 2, 2),  # rows that the tokens do not fill
    ((150, 70), 1, 4, 2, 16, 64, 1, None),
    ((60,), 2, 4, 1, 16, 64, 1, None),  # one page
]


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_sequences(shape):
    *sizes, block_m, C = shape
    check(*sizes, C=C, block_m=block_m)


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize(("HQ", "C"), [(6, 1), (2, None)])
def test_ordinary_attention_with_any_group(HQ, C):
    check((100, 37), 2, HQ, 2, 16, 64, C=C, differential=False)


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(scale):
    check((200, 130), 1, 4, 1, 16, 64, scale=scale)


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize(("block_m", "C"), [(1, 2), (4, 1), (1, None)])
def test_sequences_shorter_than_the_call(block_m, C):
    """Queries before a sequence's first key get 0."""
    T, lengths = 3, (0, 2, 140)
    q, lam, keys, values, pages = case(lengths, T, 4, 1, 16, 64, dtype=torch.float16)
    selection = lists_for((140,) * 3, T, 1, 64, C=C, block_m=block_m)
    o = diff_attention_paged(q, lam, pages, selection, backend="xformers")
    assert (o[0] == 0).all()
    assert (o[1, :1] == 0).all()
    expected = diff_attention_paged(q, lam, finite(pages), selection, backend="torch")
    assert error(o, expected) < 2e-3


def finite(pages):
    return PagedKV(pages.k_pages.nan_to_num(), pages.v_pages.nan_to_num(), pages.page_table, pages.lengths)


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("selected", [True, False])
def test_pages_that_do_not_exist_are_never_read(selected):
    q, lam, keys, values, pages = case((256, 200), 2, 8, 2, 16, 64, dtype=torch.float16)
    broken = pages.page_table.clone()
    broken[:, :, 1], broken[:, 0, 2] = 10**6, -7
    kept = BlockSelection(*lists_without((1,), (1, 2), 2, 2), 64, 64)
    everything = BlockSelection(*lists_without((), (), 2, 2), 64, 64) if selected else None
    got = PagedKV(pages.k_pages, pages.v_pages, broken, pages.lengths)
    o = diff_attention_paged(q, lam, got, everything, backend="xformers")
    torch.testing.assert_close(o, diff_attention_paged(q, lam, pages, kept, backend="xformers"))
    assert o.isfinite().all()


@pytest.mark.usefixtures("xformers")
def test_lists_outside_the_keys_are_skipped():
    q, lam, keys, values, pages = case((187, 128), 1, 2, 1, 16, 64, dtype=torch.float16)
    used = torch.where(pages.page_table == pages.page_table.clamp(0, len(pages.k_pages) - 1), pages.page_table, 0)
    pages = PagedKV(pages.k_pages, pages.v_pages, used[:, :, :3].contiguous(), pages.lengths)  # no block to spare

    def run(blocks, count):
        indices = torch.tensor(blocks, dtype=torch.int32).expand(2, 2, 1, 1, len(blocks))
        counts = torch.full((2, 2, 1, 1), count, dtype=torch.int32)
        return diff_attention_paged(q, lam, pages, BlockSelection(indices, counts, 1, 64), backend="xformers")

    exact = run([0, 1], 2)
    assert exact.abs().sum() > 0
    for broken in (run([-5, 0, 1, 7, 2**31 - 1], 5), run([0, 1], 2**31 - 1), run([-(2**31), 0, 1], 3)):
        torch.testing.assert_close(broken, exact)
    for nothing in (run([0, 1], 0), run([0, 1], -3), run([9, -1], 2)):
        assert (nothing == 0).all()


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("C", [1, 2, None])
def test_three_backends_agree(C):
    q, lam, _, _, pages = case((330, 129), 1, 8, 2, 32, 64, dtype=torch.float16)
    selection = lists_for((330, 129), 1, 2, 64, C=C)
    pages = finite(pages)
    exact = diff_attention_paged(
        q.double(),
        lam.double(),
        PagedKV(pages.k_pages.double(), pages.v_pages.double(), pages.page_table, pages.lengths),
        selection,
        backend="torch",
    )
    for backend in ("torch", "triton", "xformers"):
        assert error(diff_attention_paged(q, lam, pages, selection, backend=backend), exact) < 1e-3


@pytest.mark.parametrize(
    ("D", "block_n", "dtype", "message"),
    [
        (16, 64, torch.float32, "float16 and bfloat16, got torch.float32"),
        (16, 96, torch.float16, "block_n a multiple of 64, got 96"),
        (24, 64, torch.float16, r"D one of \(16, .*\), got 24"),
        (8, 64, torch.float16, r"D one of \(16, .*\), got 8"),
    ],
)
def test_what_it_cannot_do_is_refused(D, block_n, dtype, message):
    q, lam, _, _, pages = case((100,), 1, 4, 2, D, block_n, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        diff_attention_paged(q, lam, pages, backend="xformers")


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, lam, _, _, pages = case((100,), 1, 4, 2, 16, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r'"xformers" needs tensors on a GPU, got them on cpu; "torch" would do'):
        diff_attention_paged(q, lam, pages, backend="xformers")


ATTEND = """
import torch
from diffv2_sparse import diff_attention_paged
from diffv2_sparse.cache import PagedKV
half = dict(dtype=torch.float16)
pages = PagedKV(*(torch.zeros(1, 64, 16, **half) for _ in range(2)), torch.zeros(1, 1, 1).int(), torch.ones(1).int())
try:
    diff_attention_paged(torch.zeros(1, 1, 2, 16, **half), None, pages, backend="xformers")
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("sys.modules['xformers'] = None", "which is not installed: pip install 'diffv2-sparse[xformers]'"),
        (
            "class Finder:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'xformers':\n"
            "            raise ModuleNotFoundError('No module', name='flash_attn.flash_attn_interface')\n"
            "sys.meta_path.insert(0, Finder())",
            "the bare namespace package flash_attn, as FlashAttention-4 installs it",
        ),
    ],
)
def test_without_it_the_error_says_what_to_install(broken, message):
    code = f"import os, sys\n{broken}\n{ATTEND}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "backend: 'xformers' needs the package xformers" in done.stdout
    assert message in done.stdout
    assert "'triton' would do" in done.stdout


@pytest.mark.gpu
@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("D", "block_n", "G", "C", "T"),
    [(128, 64, 8, 1, 1), (128, 128, 4, 2, 4), (64, 64, 2, None, 1), (256, 64, 2, 2, 2), (16, 256, 8, 1, 3)],
)
def test_grid(D, block_n, G, C, T, dtype):
    check((3000, 16, 700), T, 3 * G, 3, D, block_n, C=C, NB=9, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize(("C", "T"), [(1, 1), (2, 4), (None, 1)])
def test_graph_follows_what_changes_in_place(C, T):
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q, lam, _, _, pages = case((900, 300), T, 16, 2, 64, 64, **options)
    selection = lists_for((900, 300), T, 2, 64, C=C, NB=6, device="cuda")
    diff_attention_paged(q, lam, pages, selection, backend="xformers")  # compiles, and makes the bias
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = diff_attention_paged(q, lam, pages, selection, backend="xformers")
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
        assert torch.equal(o, diff_attention_paged(q, lam, pages, selection, backend="xformers"))
        assert error(o, diff_attention_paged(q, lam, pages, selection, backend="triton")) < 1e-2
        seen.append(o.clone())
    assert not torch.equal(seen[0], seen[1])


HELD = """
import gc, weakref
from diffv2_sparse.xformers_paged import load_fmha

class Cache: ...

def decode(cache):
    load_fmha()

cache = Cache()
seen = weakref.ref(cache)
decode(cache)
del cache
gc.collect()
assert seen() is None, "held"
"""


@pytest.mark.usefixtures("xformers")
def test_importing_it_keeps_nothing_of_the_caller():
    """In a process of its own, as it is imported once."""
    subprocess.run([sys.executable, "-c", HELD], check=True, timeout=300)
