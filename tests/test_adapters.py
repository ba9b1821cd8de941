"""SDPA, flash-attn and FlexAttention behind our contract, within the oracle's error budget."""

import math
import sys
import types

import pytest
import torch

from diffv2_sparse import adapters, diff_attention_paged
from diffv2_sparse.cache import PagedKV
from diffv2_sparse.reference import reference_attention
from tests.oracle import assert_within_budget, error, qkv, random_selection

SHAPES = [  # B, T, S, HQ, H, D
    (2, 48, 48, 4, 2, 16),  # T = S, G = 2
    (1, 37, 90, 8, 2, 24),  # T < S, ragged
    (3, 1, 33, 8, 1, 16),  # decode
    (1, 25, 25, 6, 3, 8),
]


def ours(function, *arguments, **options):
    """The adapter as `assert_within_budget` calls it: (q, k, v, lam) → (o, lse)."""

    def call(q, k, v, lam):
        return function(q, k, v, lam, *arguments, scale=q.shape[-1] ** -0.5, **options)

    return call


def test_combine_pairs_is_done_in_float32():
    o, lam = torch.randn(2, 5, 6, 8).bfloat16(), 4 * torch.randn(2, 5, 3).bfloat16()
    exact = o[:, :, 0::2].double() - torch.sigmoid(lam.double())[..., None] * o[:, :, 1::2].double()
    got = adapters.combine_pairs(o, lam)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.float().bfloat16())  # one rounding, at the end
    assert adapters.combine_pairs(o, None) is o
    assert adapters.combine_pairs(o.double(), lam.double()).dtype == torch.float64


@pytest.mark.parametrize("differential", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa(shape, differential, device, monkeypatch):
    monkeypatch.setattr(adapters, "QUERY_CHUNK", 16)  # several chunks, the last one shorter
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.float64]
    for dtype in dtypes:
        inputs = qkv(*shape, dtype=dtype, device=device, differential=differential)
        without_lse = ours(adapters.sdpa_attention)
        lse = reference_attention(*inputs, return_lse=True)[1]  # SDPA has none; not under test
        # torch's own float32 kernels on CUDA are a little rougher than plain PyTorch
        factor = 4.0 if device.type == "cuda" and dtype == torch.float32 else 2.0
        assert_within_budget(lambda *x, f=without_lse, lse=lse: (f(*x), lse), inputs, factor=factor)


@pytest.mark.gpu
def test_sdpa_keeps_nothing_quadratic():
    """16-bit, bottom-right: T × S booleans would be 64 MiB, T × S scores of 8 heads 1 GiB."""
    q, k, v, lam = qkv(1, 4096, 16384, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    adapters.sdpa_attention(q, k, v, lam, scale=0.125)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    adapters.sdpa_attention(q, k, v, lam, scale=0.125)
    assert torch.cuda.max_memory_allocated() - before < 32 << 20


@pytest.fixture
def fake_flash(monkeypatch):
    """A module `flash_attn` that computes by the oracle and records how it was called."""
    calls = []

    def dense(q, k, v, softmax_scale, window_size, **options):
        left, right = window_size
        assert right == 0
        window = None if left < 0 else left + 1
        return reference_attention(q, k, v, None, scale=softmax_scale, window=window, return_lse=True, **options)

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, return_attn_probs):
        calls.append("dense")
        assert causal
        o, lse = dense(q, k, v, softmax_scale, window_size)
        return (o, lse, None) if return_attn_probs else o

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, return_attn_probs
    ):
        calls.append("packed")
        assert causal
        assert isinstance(max_q, int)
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        bounds = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        o, lse = dense(q[None], k[None], v[None], softmax_scale, window_size, **bounds)
        return (o[0], lse[0], None) if return_attn_probs else o[0]

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal):
        calls.append("paged")
        assert causal
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        assert k_cache.shape[1] % 256 == 0
        out = torch.full_like(q, float("nan"))  # where there is no key, nothing is promised
        for own, table, length, o in zip(q, block_table, cache_seqlens.tolist(), out):
            T = min(len(own), length)
            if T:
                k, v = (x[table.long()].flatten(0, 1)[None, :length] for x in (k_cache, v_cache))
                o[-T:] = reference_attention(own[None, -T:], k, v, None, scale=softmax_scale)[0]
        return out

    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    adapters.flash_available.cache_clear()
    assert adapters.flash_available()
    monkeypatch.setattr(adapters, "_require_flash", lambda q: None)  # the CPU stands in for the GPU
    yield calls
    adapters.flash_available.cache_clear()


@pytest.mark.parametrize("differential", [True, False])
def test_flash_paged(differential, fake_flash):
    B, T, H, G, D, NP = 3, 4, 2, 6, 16, 2
    q, _, _, lam = qkv(B, T, T, H * G, H, D, differential=differential)
    k_pages, v_pages = torch.randn(2, B * H * NP, 256, D)
    table = torch.randperm(B * H * NP).int().view(B, H, NP)
    table[2, :, 1] = -1  # beyond its length
    pages = PagedKV(k_pages, v_pages, table, torch.tensor([512, 300, 2], dtype=torch.int32))
    got = diff_attention_paged(q, lam, pages, backend="flash", scale=0.3)
    assert fake_flash == ["paged"]
    torch.testing.assert_close(got, diff_attention_paged(q, lam, pages, backend="torch", scale=0.3))
    assert (got[2, :2] == 0).all()


def test_flash_paged_refuses_what_it_cannot_take(fake_flash):
    q, _, _, lam = qkv(1, 1, 1, 4, 2, 16)
    table, lengths = torch.arange(2, dtype=torch.int32).view(1, 2, 1), torch.tensor([9], dtype=torch.int32)
    small = PagedKV(*torch.randn(2, 2, 128, 16), table, lengths)
    with pytest.raises(ValueError, match="block_n a multiple of 256, got 128"):
        diff_attention_paged(q, lam, small, backend="flash")
    large = PagedKV(*torch.randn(2, 2, 256, 16), table, lengths)
    with pytest.raises(ValueError, match="takes no selection"):
        diff_attention_paged(q, lam, large, random_selection(1, 1, 9, 2, block_m=1, block_n=256), backend="flash")


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("differential", [True, False])
def test_flash_arguments(window, differential, fake_flash):
    for shape in SHAPES:
        inputs = qkv(*shape, differential=differential)
        got, lse = adapters.flash_attention(*inputs, scale=0.3, window=window, return_lse=True)
        exact, exact_lse = reference_attention(*inputs, scale=0.3, window=window, return_lse=True)
        assert torch.equal(got, exact)
        assert torch.equal(lse, exact_lse)
        assert torch.equal(adapters.flash_attention(*inputs, scale=0.3, window=window), exact)
    assert set(fake_flash) == {"dense"}


def test_flash_packed_arguments(fake_flash):
    bounds = {"cu_seqlens_q": torch.tensor([0, 5, 5, 26]).int(), "cu_seqlens_k": torch.tensor([0, 11, 41, 62]).int()}
    inputs = qkv(1, 26, 62, 8, 2, 16)
    got, lse = adapters.flash_attention(*inputs, scale=0.3, window=4, return_lse=True, **bounds)
    exact, exact_lse = reference_attention(*inputs, scale=0.3, window=4, return_lse=True, **bounds)
    assert error(got, exact) < 1e-6
    assert error(lse, exact_lse) < 1e-6
    assert torch.equal(adapters.flash_attention(*inputs, scale=0.3, window=4, **bounds), got)
    assert set(fake_flash) == {"packed"}


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 9])
def test_flash(window):
    if not adapters.flash_available():
        pytest.skip("flash-attn is not installed")
    for shape in SHAPES:
        inputs = qkv(*shape, dtype=torch.bfloat16, device="cuda")
        assert_within_budget(ours(adapters.flash_attention, window=window, return_lse=True), inputs, window=window)


def test_flash_that_is_not_there(monkeypatch):
    """An absent package, and FlashAttention-4's namespace without the functions, are the same to us."""
    inputs = qkv(1, 4, 4, 4, 2, 16, dtype=torch.bfloat16)
    for module in (None, types.ModuleType("flash_attn")):
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        adapters.flash_available.cache_clear()
        assert not adapters.flash_available()
        with pytest.raises(ImportError, match=r"flash_attn_func.*backend='torch'"):
            adapters.flash_attention(*inputs, scale=1.0)
    adapters.flash_available.cache_clear()


def test_flash_refuses_what_it_cannot_take(monkeypatch):
    monkeypatch.setattr(adapters, "flash_available", lambda: True)
    with pytest.raises(ValueError, match=r"got torch.bfloat16 on cpu; backend='torch'"):
        adapters.flash_attention(*qkv(1, 4, 4, 4, 2, 16, dtype=torch.bfloat16), scale=1.0)


FLEX_CASES = [  # B, T, S, HQ, H, D, block_m, block_n; on CUDA the blocks must be multiples of 16
    (2, 48, 48, 4, 2, 16, 16, 16),
    (1, 37, 90, 8, 2, 32, 16, 32),
    (2, 150, 290, 8, 1, 64, 64, 64),
]


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("case", FLEX_CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_selection(case, window, C, device):
    *shape, block_m, block_n = case
    B, T, S, _, H, _ = shape
    selection = random_selection(B, T, S, H, C=C, NB=3, block_m=block_m, block_n=block_n, device=device)
    call = ours(adapters.flex_attention, selection, window=window, return_lse=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = qkv(*shape, dtype=dtype, device=device)
    assert_within_budget(call, inputs, selection, window=window, gradients=False)
    dense, biting = (reference_attention(*inputs, s, window=window) for s in (None, selection))
    assert error(dense, biting) > 0.1


@pytest.mark.parametrize("window", [None, 1, 21, 130])
@pytest.mark.parametrize("differential", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_dense_and_windowed(window, differential, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in ((1, 300, 300, 4, 2, 16), (2, 37, 290, 8, 2, 32), (1, 1, 140, 4, 1, 16)):
        inputs = qkv(*shape, dtype=dtype, device=device, differential=differential)
        call = ours(adapters.flex_attention, None, window=window, return_lse=True)
        assert_within_budget(call, inputs, window=window, gradients=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "C", "block_m", "block_n"), [(None, 1, 128, 128), (100, 2, 128, 128), (None, 2, 64, 32)]
)
def test_flex_gradients(window, C, block_m, block_n):
    inputs = qkv(2, 300, 410, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    selection = random_selection(2, 300, 410, 2, C=C, NB=3, block_m=block_m, block_n=block_n, device="cuda")
    call = ours(adapters.flex_attention, selection, window=window, return_lse=True)
    assert_within_budget(call, inputs, selection, window=window)
    assert_within_budget(ours(adapters.flex_attention, None, window=window, return_lse=True), inputs, window=window)


@pytest.mark.gpu
def test_flex_many_shapes():
    """More shapes than dynamo's default limit of recompilations; past it the lists would be lost."""
    for T in range(130, 146):
        selection = random_selection(1, T, T, 2, block_m=64, block_n=64, NB=2, device="cuda")
        inputs = qkv(1, T, T, 4, 2, 16, dtype=torch.bfloat16, device="cuda")
        call = ours(adapters.flex_attention, selection, return_lse=True)
        assert_within_budget(call, inputs, selection, gradients=False)


@pytest.mark.parametrize("T", [20, 128, 140])
@pytest.mark.parametrize("S", [140, 256, 400])
@pytest.mark.parametrize("window", [None, 1, 2, 60, 128, 200])
def test_flex_block_lists_are_exact(T, S, window):
    """What CUDA visits: partial blocks hold a visible and a hidden key, full ones only visible keys, others none."""
    S = max(T, S)
    selection = random_selection(1, T, S, 2, C=2, NB=3, block_m=32, block_n=16)
    for chosen, block_m, block_n in ((None, 128, 128), (selection, 32, 16)):
        block_mask = adapters._listed_blocks(chosen, T, S, 4, window, torch.device("cpu"))
        position = torch.arange(S - T, S)[:, None]
        key = torch.arange(S)
        visible = (key <= position) & (key > position - (window or math.inf))
        padded = torch.nn.functional.pad(visible, (0, -S % block_n, 0, -T % block_m))
        blocks = padded.unflatten(0, (-1, block_m)).unflatten(2, (-1, block_n)).movedim(2, 1)
        touched = blocks.any(-1).any(-1)[None, None]
        real = [block[:, : T - row * block_m] for row, block in enumerate(blocks)]  # queries that exist
        full = torch.stack([block.all(-1).all(-1) for block in real])[None, None]
        if chosen is not None:
            listed = torch.zeros(1, 4, *full.shape[2:], dtype=torch.bool)
            for h in range(4):
                for row in range(listed.shape[2]):
                    own = chosen.indices[0, h % 2, h // 2, row, : chosen.counts[0, h % 2, h // 2, row]]
                    listed[0, h, row, own.long()] = True
            touched, full = touched & listed, full & listed
        got_partial, got_full = (
            as_table(numbers, lists, touched.shape[-1])
            for numbers, lists in (
                (block_mask.kv_num_blocks, block_mask.kv_indices),
                (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
            )
        )
        assert torch.equal(got_full, full)
        assert torch.equal(got_partial, touched & ~full)
        t, s = torch.meshgrid(torch.arange(T), torch.arange(S), indexing="ij")
        said = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), t, s)
        assert torch.equal(said, visible)


def as_table(numbers, lists, columns):
    table = torch.zeros(*lists.shape[:-1], columns, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, numbers.shape)).tolist():
        table[tuple(at)][lists[tuple(at)][: numbers[tuple(at)]].long()] = True
    return table


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_refusals():
    q, k, v, lam = qkv(1, 32, 32, 4, 2, 16)
    short = random_selection(1, 32, 32, 2, block_m=8, block_n=16)
    with pytest.raises(ValueError, match=r"block_m.*got 8.*backend='torch'"):
        adapters.flex_attention(q, k, v, lam, short, scale=1.0)
    selection = random_selection(1, 32, 32, 2)
    leaf = q.requires_grad_()
    with pytest.raises(ValueError, match=r"no backward on a CPU; backend='torch'"):
        adapters.flex_attention(leaf, k, v, lam, selection, scale=1.0)
    with torch.no_grad():
        assert not adapters.flex_attention(leaf, k, v, lam, selection, scale=1.0).requires_grad
    for block_size in ((64, 24), (40, 64)):
        with pytest.raises(ValueError, match=r"divisible by 16.*backend='torch'"):
            adapters._kernel_options(block_size, learns=False)
    with pytest.raises(ValueError, match=r"divisible by 32 on CUDA for a backward.*backend='torch'"):
        adapters._kernel_options((16, 128), learns=True)
