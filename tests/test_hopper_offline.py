"""What of the Hopper kernels a CPU can test: results, barriers and walks in the interpreter (see gluon_on_cpu.py), how
they compile, and the probe, by faking each failure.
"""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffv2_sparse import attention, diff_attention, ops
from tests.oracle import qkv, random_selection

pytest.importorskip("triton")
import triton
import triton.language as tl

from diffv2_sparse.kernels.domain import Lists
from diffv2_sparse.kernels.hopper import probe
from diffv2_sparse.kernels.hopper.walk import (
    NOWHERE,
    Steps,
    begin_walk,
    bits_of,
    starts_of,
    unchosen_hidden,
    unseen_hidden,
)
from diffv2_sparse.kernels.primitives import sequence_of, tile_of
from diffv2_sparse.kernels.tiles import fixed_packing
from tests import gluon_on_cpu
from tests.compile_hopper import CASES, REGISTERS, faults, spilled_in_loops
from tests.test_kernels import Kernels, _poison, packed_case  # noqa: F401

DEVICE = 0
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it needs the interpreter")


HALF = Kernels(ops.hopper_attention, torch.float16, 64, 64)


@pytest.fixture
def room(request):
    """Powers of 2 by which sums may leave 1: what half precision bears, which stands here for bfloat16."""
    return getattr(request, "param", 15)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch, room):
    """The operators find the kernels as the interpreter takes them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        for name in "forward", "backward":
            monkeypatch.setitem(sys.modules, f"{gluon_on_cpu.PACKAGE}.{name}", gluon_on_cpu.load(name))
        monkeypatch.setitem(gluon_on_cpu.load("forward").ROOM, torch.float16, room)


def check(B, T, S, HQ, H, D=64, selection=None, *, differential=True, gradients=False, **options):
    """Of the gradients, those by keys have tests of their own."""
    inputs = qkv(B, T, S, HQ, H, D, dtype=torch.float16, differential=differential)
    HALF.check(inputs, selection, gradients=gradients, **options)


@interpreted
@pytest.mark.parametrize(
    ("T", "S", "G", "C", "block_m", "block_n", "D"),
    [
        (40, 300, 8, 1, 16, 64, 64),  # two blocks a tile
        (70, 261, 4, 1, 70, 128, 128),  # several tiles a row
        (40, 300, 8, 2, 16, 64, 64),  # both classes in one list
        (70, 300, 8, 2, 40, 64, 64),  # and apart
        (33, 200, 2, 2, 5, 64, 64),  # rows that do not fill a list, nor a list a tile
        (30, 500, 6, 1, 16, 128, 64),  # three pairs
        (9, 70, 140, 1, 4, 64, 64),  # more heads than a tile
    ],
)
def test_lists(T, S, G, C, block_m, block_n, D):
    selection = random_selection(2, T, S, 1, C=C, NB=5, block_m=block_m, block_n=block_n)
    check(2, T, S, G, 1, D, selection)


@interpreted
@pytest.mark.parametrize("room", [0], indirect=True)
@pytest.mark.parametrize(("C", "block_m"), [(1, 16), (2, 16), (2, 40)])
def test_online_softmax(C, block_m):
    """As half precision takes it."""
    check(1, 40, 300, 8, 1, 64, random_selection(1, 40, 300, 1, C=C, NB=4, block_m=block_m, block_n=64))


@pytest.fixture
def copies(monkeypatch):
    """What the copy engine is asked for."""
    asked = []
    copy = gluon_on_cpu.HOPPER.tma.async_copy_global_to_shared
    count = lambda *args: (asked.append(args), copy(*args))  # noqa: E731
    monkeypatch.setattr(gluon_on_cpu.HOPPER.tma, "async_copy_global_to_shared", count)
    return asked


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # in walks that are repeated
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(
    ("added", "tokens", "walks"),  # to the logits of the first tile of keys, of the second, of the others
    [
        ((0, 60, 70), slice(None), (5, 5, 5, 5)),
        ((0, 0, 40), slice(None), (5, 5, 5, 5)),
        ((0, 0, 40), slice(12, 13), (5, 5, 5)),  # one row of one consumer
        ((0, 0, 40), slice(18, 19), (5, 5, 5)),
        ((0, -60, -70), slice(None), (5, 5)),
        ((0, 3, -3), slice(None), (5, 5)),
    ],
)
def test_sums_out_of_range(added, tokens, walks, copies):
    """Two programs, by the tiles of their walks: a second follows if a row's first tile tells too little of it."""
    q, k, v, lam = qkv(1, 20, 556, 8, 1, 64, dtype=torch.float16)
    k[..., 0] = torch.tensor(added).repeat_interleave(torch.tensor([128, 128, 300]))[:, None]
    q[..., 0] = 0
    q[:, tokens, 2, 0] = 8  # of the scale
    HALF.check((q, k, v, lam), gradients=False)
    assert len(copies) == sum(1 + 2 * tiles for tiles in walks)  # K and V, and K once more


@interpreted
@pytest.mark.parametrize(("added", "walks"), [(-20, 2), (-40, 2), (-3, 1)])
def test_sums_too_small(added, walks, copies):
    """A list that shares a tile of queries, and sees nothing in that tile's first keys, and little in later ones."""
    selection = random_selection(1, 32, 556, 1, NB=2, block_m=16, block_n=64)
    selection.indices[:] = torch.tensor([[0, 1], [4, 5]])
    selection.counts[:] = 2
    q, k, v, lam = qkv(1, 32, 556, 4, 1, 64, dtype=torch.float16)
    q[..., 0], k[..., 0] = 8, 0
    k[:, 4 * 64 : 6 * 64, :, 0] = added
    HALF.check((q, k, v, lam), selection, gradients=False)
    assert len(copies) == walks * 2 * (3 + 2)  # blocks of K, and of K once more, and of V


@interpreted
def test_rows_that_are_not_there_have_no_say(copies, monkeypatch):
    selection = random_selection(1, 20, 300, 1, C=2, NB=4, block_m=5, block_n=64)
    selection.indices[..., 0] = torch.where(selection.counts == 0, 0, selection.indices[..., 0])
    selection.counts.clamp_(min=1)  # a row that sees nothing does ask for another walk
    asked = []
    for room in (0, 15):
        monkeypatch.setitem(gluon_on_cpu.load("forward").ROOM, torch.float16, room)
        check(1, 20, 300, 6, 1, 64, selection)
        asked.append(len(copies))
    assert asked[1] == 2 * asked[0]  # in all


@interpreted
@pytest.mark.parametrize(("G", "block_m"), [(1, 64), (3, 16), (5, 100)])
def test_ordinary_attention_with_any_group(G, block_m):
    selection = random_selection(1, 50, 300, 2, NB=4, block_m=block_m, block_n=64)
    check(1, 50, 300, 2 * G, 2, 64, selection, differential=False)


@interpreted
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"scale": -0.3}, {"differential": False}])
def test_without_lists(options):
    check(2, 40, 300, 8, 2, **options)


@interpreted
@pytest.mark.parametrize("ahead", [63, 64, 127, 128])
def test_diagonals(ahead):
    """With the tile's first token just before and on the last key of a tile of keys."""
    check(1, 33, 33 + ahead, 8, 1)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("kind", ["selection", "window", "dense"])
def test_packed_sequences_do_not_meet(kind):
    options, selection = packed_case(kind, "cpu", block_m=16, block_n=64)
    q, k, v, lam = qkv(1, 100, 176, 4, 2, 64, dtype=torch.float16)
    HALF.check((q, k, v, lam), selection, gradients=False, **options)
    clean, _ = HALF(selection, **options)(q, k, v, lam)
    q[:, 33:34], k[:, 40:110], v[:, 40:110] = float("nan"), float("inf"), float("nan")  # the second sequence
    o, _ = HALF(selection, **options)(q, k, v, lam)
    assert torch.equal(o[:, :33], clean[:, :33])
    assert torch.equal(o[:, 34:], clean[:, 34:])


@interpreted
def test_any_strides():
    q, k, v, lam = qkv(1, 40, 90, 8, 2, 64, dtype=torch.float16)
    o, lse = HALF()(q, k, v, lam)
    wide = torch.empty(1, 90, 2, 68, dtype=torch.float16)
    wide[..., :64] = k  # rows of 136 bytes, which the copy engine does not take
    for strided in (
        (q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2), v, lam.mT),
        (q, wide[..., :64], v, lam.mT),
    ):
        strided = *strided[:3], strided[3].contiguous().mT
        assert all(torch.equal(x, y) for x, y in zip(HALF()(*strided), (o, lse)))


@interpreted
def test_empty_lists_give_zero():
    selection = random_selection(1, 40, 90, 1, C=2, block_m=16, block_n=64)
    selection.counts.zero_()
    o, lse = HALF(selection)(*qkv(1, 40, 90, 8, 1, 64, dtype=torch.float16))
    assert (o == 0).all()
    assert (lse == float("-inf")).all()


@interpreted
@pytest.mark.parametrize(("C", "block_m"), [(1, 40), (2, 40), (1, 1)])  # the last with dk, dv of the portable kernel
def test_what_is_saved_serves_the_backward(C, block_m):
    selection = random_selection(1, 40, 200, 1, C=C, block_m=block_m, block_n=64)
    check(1, 40, 200, 8, 1, 64, selection, gradients=True)


@interpreted
def test_nothing_is_saved_unasked():
    q, k, v, lam = qkv(1, 40, 70, 4, 1, 64, dtype=torch.float16)
    lists = None, None, None, None, 0, 0, 0.125, None
    full, alone = (ops._attention(q, k, v, lam, *lists, save, save, True) for save in (True, False))
    assert torch.equal(full[0], alone[0])
    assert full[1].shape == (1, 4, 40)
    assert full[2].shape == full[0].shape
    assert alone[1].numel() == alone[2].numel() == 0


@dataclass(frozen=True)
class Form(Steps):
    LISTS: bool
    MEMBERS: bool
    PACKED: bool
    WINDOWED: bool
    LIST_TOKENS: int
    LIST_TILES: int
    BLOCK_M: int
    BLOCK_N: int
    TOKENS: int
    C: int
    KEYS: int


@triton.jit
def _walk_kernel(seen, walks, T, S, H, NL, NE, window, form: tl.constexpr):
    """Counts how often a tile's walk shows each key to each token and class: seen `[B, H, 2, T, S]`."""
    i_b, i_h, _, i_list, skipped = tile_of(NL, H, form.LIST_TILES, 1, form.TOKENS)
    own, _, q0, Tq, k0, Sk = sequence_of(i_list, walks.table, walks.cu_q, walks.cu_k, T, S, form.PACKED)
    first = own * form.LIST_TOKENS + skipped
    tokens = tl.minimum(form.LIST_TOKENS - skipped, Tq - first)
    pos_first = Sk - Tq + first
    pos_last = tl.minimum(pos_first + form.TOKENS, Sk) - 1
    walk = begin_walk(walks, (i_b * H + i_h) * NL + i_list, NE, tokens, pos_first, pos_last, window, form)
    rows = tl.arange(0, 2 * form.TOKENS)
    token = rows // 2
    KEYS: tl.constexpr = form.KEYS
    PER: tl.constexpr = form.PER
    PART: tl.constexpr = KEYS // PER
    key = tl.arange(0, KEYS)
    bit = (skipped + token) // form.BLOCK_M * form.C + rows % form.C
    at = seen + (((i_b * H + i_h) * 2 + rows % 2) * T + q0 + first + token)[:, None] * S + k0
    for i in range(walk.tiles):
        starts = starts_of(walk, i, form)
        logits = tl.zeros([2 * form.TOKENS, KEYS], tl.float32)
        if i >= walk.clear:
            logits = unseen_hidden(logits, starts, pos_first + token, key, walk, form)
        if form.MEMBERS:
            logits = unchosen_hidden(logits, bits_of(walk, i, form), bit, key, form)
        where = key * 0
        for part in tl.static_range(PER):
            where = tl.where(key // PART == part, starts[part] + key % PART, where)
        shown = (logits == 0) & (token < tokens)[:, None]
        tl.device_assert((where < Sk)[None, :] | (shown == 0))
        old = tl.load(at + where[None, :], mask=shown, other=0)
        tl.store(at + where[None, :], old + 1, mask=shown)


def shown_by_walks(domain, G, keys):
    packing = fixed_packing(128, G, domain.block_m)
    lists = Lists(domain, packing.tokens, packing.rows)
    walks, NL, NE = lists.built
    form = Form(TOKENS=packing.tokens, C=lists.classes, KEYS=keys, **lists.constants)
    seen = torch.zeros(domain.B, domain.H, 2, domain.T, domain.S, dtype=torch.int32)
    grid = (NL * lists.tiles * domain.B * domain.H,)
    _walk_kernel[grid](seen, walks, domain.T, domain.S, domain.H, NL, NE, domain.window or 0, form)
    return seen


def visible(T, S, window):
    pos, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    return (key <= pos) & (key > pos - (window or S + 1))


@interpreted
@pytest.mark.parametrize("keys", [64, 128])  # a block in pieces, blocks in a tile
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("T", "S", "G", "C", "block_m", "block_n"),
    [
        (64, 300, 8, 1, 64, 64),  # several tiles a row, two blocks a tile, an odd last one
        (70, 261, 8, 2, 16, 64),  # both classes in one list
        (50, 300, 2, 1, 16, 128),  # several rows in one list
        (33, 200, 4, 2, 5, 64),  # rows that do not fill a list
    ],
)
def test_walks_show_every_chosen_key_once(T, S, G, C, block_m, block_n, window, keys):
    selection = random_selection(2, T, S, 2, C=C, NB=4, block_m=block_m, block_n=block_n)
    q, k = torch.empty(2, T, 2 * G, 64), torch.empty(2, S, 2, 64)
    domain = ops._domain(q, k, selection.indices, selection.counts, None, None, block_m, block_n, window)
    chosen = selection.to_mask(T, S)  # [B, C, H, T, S]
    expected = (chosen & visible(T, S, window)).expand(-1, 2, -1, -1, -1).transpose(1, 2)
    assert torch.equal(shown_by_walks(domain, G, keys), expected.int())


@interpreted
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize(("T", "S", "window"), [(40, 300, None), (150, 150, None), (64, 400, 100), (130, 300, 300)])
def test_walks_without_lists_show_the_past_once(T, S, window, keys):
    q, k = torch.empty(1, T, 8, 64), torch.empty(1, S, 1, 64)
    domain = ops._domain(q, k, None, None, None, None, 0, 0, window)
    expected = visible(T, S, window).expand(1, 1, 2, T, S)
    assert torch.equal(shown_by_walks(domain, 8, keys), expected.int())


@interpreted
@pytest.mark.parametrize(("block_n", "keys"), [(64, 128), (128, 128), (128, 64)])
def test_packed_walks_stay_in_their_sequences(block_n, keys):
    lengths_q, lengths_k = (33, 1, 40), (170, 70, 40)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    parts = [random_selection(1, t, s, 1, NB=2, block_n=block_n) for t, s in zip(lengths_q, lengths_k)]
    wide = [torch.nn.functional.pad(p.indices, (0, 2 - p.indices.shape[-1])) for p in parts]
    indices, counts = torch.cat(wide, 3), torch.cat([p.counts for p in parts], 3)
    q, k = torch.empty(1, sum(lengths_q), 4, 64), torch.empty(1, sum(lengths_k), 1, 64)
    expected = torch.zeros(1, 1, 2, q.shape[1], k.shape[1], dtype=torch.int32)
    for i, (t, s) in enumerate(zip(lengths_q, lengths_k)):
        mask = parts[i].to_mask(t, s)[0, :, 0] & visible(t, s, None)
        expected[0, 0, :, cu_q[i] : cu_q[i + 1], cu_k[i] : cu_k[i + 1]] = mask.int()
    domain = ops._domain(q, k, indices, counts, cu_q, cu_k, 16, block_n, None)
    assert torch.equal(shown_by_walks(domain, 4, keys), expected)


def test_nowhere_is_past_everything():
    assert NOWHERE.value >= 1 << 30


@pytest.fixture
def hopper(monkeypatch):
    """A machine that would run the kernels, as far as the probe can tell."""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    trial = type(sys)("diffv2_sparse.kernels.hopper.trial")
    trial.compile_trial = lambda device: None
    monkeypatch.setitem(sys.modules, trial.__name__, trial)
    probe._find.cache_clear()
    yield monkeypatch
    probe._find.cache_clear()


def test_the_probe_finds_nothing_wrong(hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe.obstacle(DEVICE) is None


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0"])
def test_the_probe_wants_a_triton_with_gluon(hopper, version):
    hopper.setattr(triton, "__version__", version)
    assert version in probe.obstacle(DEVICE)


@pytest.mark.parametrize("version", ["3.10.0+git", "4.0"])
def test_the_probe_counts_versions_as_numbers(hopper, version):
    hopper.setattr(triton, "__version__", version)
    assert probe.obstacle(DEVICE) is None


def test_the_probe_wants_a_hopper_gpu(hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "not 10.0" in probe.obstacle(DEVICE)


@pytest.mark.parametrize("failure", [ImportError("no module"), AttributeError("no warpgroup_mma"), RuntimeError("bad")])
def test_a_changed_gluon_is_told_once(hopper, failure):
    def compile_trial(device):
        raise failure

    hopper.setattr(sys.modules["diffv2_sparse.kernels.hopper.trial"], "compile_trial", compile_trial)
    with pytest.warns(UserWarning, match='"auto" takes "triton"') as told:
        answers = {probe.obstacle(DEVICE) for _ in range(3)}
    assert len(told) == 1
    assert str(failure) in answers.pop()


def test_a_gluon_that_is_gone_is_told(hopper):
    hopper.setitem(sys.modules, "diffv2_sparse.kernels.hopper.trial", None)  # importing it raises ImportError
    with pytest.warns(UserWarning, match="fails its trial"):
        assert "ModuleNotFoundError" in probe.obstacle(DEVICE)


def fake_gpu(x):
    """x as far as the choice of a backend looks at it, on a GPU."""
    return type("Fake", (), {"dtype": x.dtype, "shape": x.shape, "is_cuda": True, "device": torch.device("cuda", 0)})()


@pytest.mark.parametrize(
    ("dtype", "D", "block_n", "message"),
    [
        (torch.float32, 64, 64, "float16 and bfloat16"),
        (torch.bfloat16, 96, 64, "64 or 128 dimensions, not 96"),
        (torch.bfloat16, 64, 32, "blocks of 64 or 128 keys, not 32"),
        (torch.bfloat16, 64, 64, "on cpu"),
    ],
)
def test_named_it_raises_and_says_what_is_missing(dtype, D, block_n, message):
    q, k, v, lam = qkv(1, 70, 70, 4, 2, D, dtype=dtype)
    selection = random_selection(1, 70, 70, 2, block_n=block_n)
    with pytest.raises(ValueError, match=f'backend: "hopper": .*{message}.*"triton" would do'):
        diff_attention(q, k, v, lam, selection, backend="hopper")


def test_a_backend_is_named_that_would_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for D, dtype in ((64, torch.float32), (320, torch.bfloat16)):
        with pytest.raises(ValueError, match=r'backend: "hopper": .*; "torch" would do'):
            diff_attention(*qkv(1, 70, 70, 4, 2, D, dtype=dtype), backend="hopper")


def test_auto_goes_on_to_the_next(hopper):
    q = fake_gpu(torch.empty(1, 4, 4, 64, dtype=torch.bfloat16))
    selection = random_selection(1, 128, 128, 2, block_m=64, block_n=64)
    assert attention._automatic(q, selection, plain=False) == "hopper"
    assert attention._automatic(q, None, plain=False) == "hopper"  # a window
    assert attention._automatic(q, random_selection(1, 128, 128, 2, block_m=64, block_n=16), plain=False) == "triton"
    short = random_selection(1, 128, 128, 2, block_m=63, block_n=64)
    assert attention._automatic(q, short, plain=False) == "triton"
    probe._find.cache_clear()
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert attention._automatic(q, selection, plain=False) == "triton"


def test_the_guard_sees_faults():
    clean = "ptxas info : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 168 registers"
    assert faults(clean, REGISTERS) == []
    assert faults(clean, REGISTERS + 1)
    assert faults(clean, 168, in_loops=1) == ["spills in loops: 1 instructions"]
    assert faults(clean.replace("0 bytes spill loads", "8 bytes spill loads"), 168) == ["spills: 8 bytes"]
    assert faults(clean + "\n(C7512) Potential Performance Loss: wgmma.mma_async ...", 168) == ["serialised: C7512"]
    assert faults("", 168) == ["no report"]
    step = [
        "/*0100*/ LDL R1, [R1] ;",
        "/*0110*/ HGMMA.64x128 R4 ;",
        "/*0120*/ STL [R1], R2 ;",
        "/*0130*/ @P1 BRA 0x{} ;",
    ]
    assert [spilled_in_loops("\n".join(step).format(to)) for to in ("100", "110")] == [2, 1]
    with pytest.raises(ValueError, match="found none"):
        spilled_in_loops("\n".join(step).format("120"))  # back, but after the product


def test_kernels_compile_well_for_hopper():
    """Without spills, with products in flight, within the budget of registers; see compile_hopper.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_hopper"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = done.stdout.splitlines()[1:]
    assert {line.split(" | ")[0] for line in told} == set(CASES)
    assert len(told) == 12
