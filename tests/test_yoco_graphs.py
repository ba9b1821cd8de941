"""Steps of few tokens as CUDA graphs: the step equals the ordinary forward and asks nothing of the host, and what is
captured follows the cache through growth, truncation, forks and failures.

Without a GPU a graph is stood in for by the function that would be captured, run anew at every replay; cases marked gpu
capture it, in float32 for equal tokens.
"""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diffv2_sparse import offload, pages, selectors
from diffv2_sparse.yoco import DiffV2YocoForCausalLM, graphs, layout, modeling, reading, retention
from diffv2_sparse.yoco.graphs import StepTensors, can_capture, copied, step
from tests.test_cache import assert_same, contents, snapshot
from tests.tiny_yoco import VOCAB, ragged_tokens, tiny_config, tiny_model

SELF_DECODERS = ("sliding_window", "gated_retention")
MODES = ("dense", "pair_mean", "per_class")
PADS = (0, 7, 20)


class Replayed:
    """In place of `graphs.Captured`."""

    def __init__(self, function, device, beside):
        self.function, self.output = function, None

    def __call__(self):
        output = self.function()
        self.output = output if self.output is None else self.output.copy_(output)
        return self.output


def at_one_place(step):
    """`step`, refused where a captured one would read what is no longer there."""
    places = {}

    def checked(model, at):
        pool, table = at.table.pool, at.table
        tensors = at.lengths, table.pages, table.numbers, pool.k_pages, pool.v_pages, pool.summaries
        now = table.at_home, *(x.data_ptr() for x in tensors)
        assert places.setdefault(id(at), (now, at))[0] == now
        return step(model, at)

    return checked


class Counted:
    """What has been captured, and how often it was called."""

    def __init__(self, kind):
        self.kind, self.captures, self.calls = kind, 0, 0

    def __call__(self, *args):
        self.captures += 1
        one = self.kind(*args)

        def call():
            self.calls += 1
            return one()

        call.graph = getattr(one, "graph", None)
        return call


@pytest.fixture
def counted(device, monkeypatch):
    """Counts graphs, real ones on a GPU."""
    if device.type == "cpu":
        monkeypatch.setattr(modeling, "can_capture", lambda model, cache, tokens: tokens <= cache.max_rollback + 1)
        monkeypatch.setattr(graphs, "step", at_one_place(step))
    counted = Counted(Replayed if device.type == "cpu" else graphs.Captured)
    monkeypatch.setattr(graphs, "Captured", counted)
    return counted


def model_on(device, **changes):
    if device.type == "cpu":
        return tiny_model(**changes)
    return tiny_model(torch.float32, **{"head_dim": 16, "sparse_block_n": 16} | changes).to(device)


def assert_near(logits, expected):
    exact = logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9 if exact else 2e-3 * expected.abs().max().item())


@torch.no_grad()
def by_step(model, cache, ids):
    """Logits of `step` on tensors of its own."""
    cache.advance(ids.shape[1])
    cache.states = copied(cache.states)
    at = StepTensors.of(cache, ids.shape[1], cache.states)
    at.ids.copy_(ids)
    return model.lm_head(step(model.model, at))


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("max_rollback", "shared"), [(0, False), (3, False), (3, True)])
@torch.no_grad()
def test_a_step_is_the_ordinary_forward(self_decoder, mode, max_rollback, shared):
    """Also where pages are shared, and the same is in the cache afterwards, summaries and states included."""
    model = tiny_model(self_decoder=self_decoder, sparse_mode=mode)
    tokens, mask = ragged_tokens(60, PADS)
    caches = [model.new_cache(3, 64, blocks=96, max_rollback=max_rollback) for _ in range(2)]
    for cache in caches:
        model.prefill(tokens[:, :22], mask[:, :22], cache)
    if shared:
        origins, caches = caches, [cache.fork([2, 0, 0]) for cache in caches]
        tokens = torch.cat([tokens[:, :22][[2, 0, 0]], tokens[:, 22:]], 1)
        assert not caches[0].table.at_home
    at = 22
    while at < 40:
        T = 1 + at % (max_rollback + 1)
        ids = tokens[:, at : at + T]
        expected = model.decode(ids, caches[0])
        torch.testing.assert_close(by_step(model, caches[1], ids), expected, rtol=0, atol=1e-9)
        at += T
    for b in range(3):
        for mine, other in zip(contents(caches[0], b), contents(caches[1], b)):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)
    for state, other in zip(*(cache.states for cache in caches)):
        for x, y in zip(state, other):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    assert caches[0].tokens == caches[1].tokens == tuple(caches[1].lengths.tolist())
    assert (caches[0].floors, caches[0].columns) == (caches[1].floors, caches[1].columns)
    if shared:
        for b in range(3):
            for mine, other in zip(*(contents(cache, b) for cache in origins)):
                assert torch.equal(mine, other)


def no_host(*_):
    raise AssertionError("a step must send nothing from the host")


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("T", "where"), [(1, None), (3, None), (1, "cpu"), (3, "cpu")])
def test_a_step_asks_nothing_of_the_host(self_decoder, mode, T, where, monkeypatch):
    """With tensors that have no values, whatever reads one raises; choosing and attending go to the kernels."""
    pytest.importorskip("triton")
    if where and mode == "dense":
        pytest.skip("dense attention is refused")
    with FakeTensorMode(), torch.no_grad():
        config = tiny_config(self_decoder=self_decoder, sparse_mode=mode, attn_backend="triton", paged_backend="triton")
        model = DiffV2YocoForCausalLM(config).eval()
        cache = model.new_cache(2, 100, max_rollback=2, offload=where)
        monkeypatch.setattr(offload, "by_kernels", lambda slots: True)
        monkeypatch.setattr(selectors, "_backend", lambda name, q: "triton")
        monkeypatch.setattr(selectors, "_check_number", lambda *_: None)  # of a CPU alone, and so is its maximum
        monkeypatch.setattr(torch.Tensor, "max", lambda x: 0)
        for module in (pages, offload, layout, reading, retention, modeling):
            monkeypatch.setattr(module, "sent", no_host)
        monkeypatch.setattr(torch, "tensor", no_host)
        for cache.table.at_home in (True, False):
            hidden = step(model.model, StepTensors.of(cache, T, copied(cache.states)))
            assert hidden.shape == (2, T, 32)
        with pytest.raises(DataDependentOutputException):  # what a step that asks would meet
            cache.lengths.sum().item()


def test_what_is_captured(monkeypatch):
    pytest.importorskip("triton")
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def allowed(tokens=1, max_rollback=0, dtype=torch.bfloat16, held_choice=(), device=cuda, offload=None, **changes):
        weight = SimpleNamespace(weight=SimpleNamespace(device=device))
        model = SimpleNamespace(config=tiny_config(**changes), embed_tokens=weight, norm=weight)
        k_pages = SimpleNamespace(dtype=dtype, shape=(9, 4, 8), is_cuda=device.type == "cuda")
        spec = SimpleNamespace(device=device)
        pool = SimpleNamespace(summaries=k_pages, holds=lambda places: places <= 10)
        cache = SimpleNamespace(spec=spec, max_rollback=max_rollback, held_choice=held_choice, pool=pool)
        cache.offload, cache.batch_size = offload, 2
        return can_capture(model, cache, tokens)

    assert allowed()
    assert not allowed(device=torch.device("cpu"))
    assert not allowed(tokens=2)
    assert allowed(tokens=3, max_rollback=2)
    assert not allowed(dtype=torch.float64)
    assert not allowed(held_choice={"block_m": 3})
    assert allowed(offload="cpu", sparse_mode="pair_mean")  # two lists of five blocks
    assert not allowed(offload="cpu", sparse_mode="pair_mean", tokens=2, max_rollback=1)
    assert not allowed(offload="cpu", sparse_mode="per_class")
    assert not allowed(offload="cpu")
    assert not allowed(sparse_mode="pair_mean", sparse_block_m=3)
    assert allowed(sparse_mode="dense", sparse_block_m=3)
    assert allowed(paged_backend="triton")
    assert not allowed(paged_backend="torch")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert not allowed()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not allowed()


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "batch"), [("dense", 3), ("pair_mean", 1), ("pair_mean", 3), ("per_class", 3)])
def test_generate(self_decoder, mode, batch, device, counted):
    """Greedy and sampled: token for token what it is without graphs; one graph serves all steps."""
    model = model_on(device, self_decoder=self_decoder, sparse_mode=mode)
    tokens, mask = (x[:batch].to(device) for x in ragged_tokens(27, PADS))
    for n, options in enumerate(({"do_sample": False}, {"do_sample": True, "top_k": 4})):
        generated = []
        for use_graphs in (True, False):
            torch.manual_seed(5)
            options |= {"max_new_tokens": 18, "use_graphs": use_graphs}
            generated.append(model.generate(tokens, attention_mask=mask, **options))
            assert (counted.captures, counted.calls) == (n + 1, 16 * (n + 1))  # the prompt and a first step are not
        assert torch.equal(*generated)


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("mode", ["dense", "pair_mean"])
def test_candidates(self_decoder, mode, device, counted):
    """Several tokens at once, and taken back: as many graphs as there are lengths."""
    model = model_on(device, self_decoder=self_decoder, sparse_mode=mode)
    tokens = torch.randint(1, VOCAB, (1, 6), device=device).repeat(1, 5)
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(tokens, use_graphs=False, **options)
    assert counted.captures == 0
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **options), expected)
    assert 1 <= counted.captures <= 4
    assert counted.calls > 4


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
def test_beams_and_several_samples(options, self_decoder, device, counted):
    model = model_on(device, self_decoder=self_decoder, sparse_mode="pair_mean")
    tokens, mask = (x.to(device) for x in ragged_tokens(27, PADS))
    generated = []
    for use_graphs in (True, False):
        torch.manual_seed(5)
        options |= {"max_new_tokens": 14, "use_graphs": use_graphs}
        generated.append(model.generate(tokens, attention_mask=mask, **options))
    assert torch.equal(*generated)
    assert counted.calls > 8


class Twins:
    """Two caches that read the same tokens, one of them through graphs."""

    def __init__(self, model, device, **options):
        self.model, self.device = model, device
        self.caches = [model.new_cache(2, 64, **options) for _ in range(2)]
        tokens, mask = (x.to(device) for x in ragged_tokens(22, (0, 9)))
        for cache in self.caches:
            model.prefill(tokens, mask, cache)

    def both(self, act):
        self.caches = [act(cache) or cache for cache in self.caches]

    def decode(self, *counts):
        for T in counts:
            ids = torch.randint(1, VOCAB, (self.caches[0].batch_size, T), device=self.device)
            logits = [self.model.decode(ids, cache, use_graphs=i == 0) for i, cache in enumerate(self.caches)]
            assert_near(*logits)
            assert self.caches[0].tokens == tuple(self.caches[0].lengths.tolist()) == self.caches[1].tokens


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize(("mode", "where"), [("dense", None), ("pair_mean", None), ("pair_mean", "cpu")])
def test_graphs_follow_the_cache(self_decoder, mode, where, device, counted):
    model = model_on(device, self_decoder=self_decoder, sparse_mode=mode)
    twins = Twins(model, device, blocks=60, max_rollback=2, offload=where, resident_blocks=where and 45)
    twins.decode(1, 1, 1, 1)
    assert (counted.captures, counted.calls) == (1, 3)
    twins.decode(3, 3, 1, 3)
    assert (counted.captures, counted.calls) == (2, 6)
    twins.both(lambda cache: cache.truncate(2))
    twins.decode(1, 3)
    twins.both(lambda cache: cache.truncate((1, 2)))
    twins.decode(1)
    twins.decode(5)  # more than states can take at once
    assert counted.captures == 2
    twins.decode(1, 3)
    twins.both(lambda cache: cache.reset([0]))
    twins.decode(1)
    assert (counted.captures, counted.calls) == (2, 12)
    twins.both(lambda cache: cache.grow(80, 100))
    twins.decode(1)
    assert counted.captures == 2
    twins.decode(1, 1)
    assert counted.captures == 3
    twins.both(lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    twins.decode(1, 1, 1)
    assert counted.captures == 3
    twins.both(lambda cache: cache.grow(80, 120))  # the pool alone
    twins.decode(1, 1, 1)
    assert counted.captures == 4
    twins.both(lambda cache: cache.fork([1, 0, 1]))
    twins.decode(1, 1, 1, 3)
    assert counted.captures == 5
    twins.both(lambda cache: cache.reset())
    twins.decode(1, 1, 1, 1)
    assert twins.caches[0].tokens == (4, 4, 4)


def test_options_and_weights_are_followed(device, counted):
    model = model_on(device, sparse_mode="pair_mean")
    twins = Twins(model, device)
    twins.decode(1, 1, 1)
    for budget, share_layers, mode in ((6, 1, "pair_mean"), (6, 2, "pair_mean"), (6, 2, "per_class"), (6, 2, "dense")):
        model.config.sparse_budget, model.config.sparse_mode = budget, mode
        model.config.sparse_share_layers = share_layers
        twins.decode(1, 1, 1)
    assert counted.captures == 5
    weight = model.model.cross_layers[0].mixer.q_proj.weight
    weight.data = weight.data * 2  # elsewhere
    twins.decode(1, 1)
    weight.data.mul_(0.5)  # in place
    twins.decode(1)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 2)
    twins.decode(1, 1)
    assert counted.captures == 7


def test_wrong_calls_change_nothing(device, counted):
    model = model_on(device, sparse_mode="pair_mean")
    cache = model.new_cache(2, 8, blocks=3)
    ids = torch.ones(2, 1, dtype=torch.long, device=device)
    for _ in range(3):
        model.decode(ids, cache)
    other = model.new_cache(2, 4)
    for _ in range(4):
        model.decode(ids, other)
    block_n = model.config.sparse_block_n
    cases = [
        (ids[:1], cache, "expected the 2 sequences that the cache holds, got a batch of 1"),
        (ids.float(), cache, "input_ids: expected int64"),
        (ids, other, "expected at most 4 tokens per sequence, its capacity, got 5"),
        (ids, tiny_model().new_cache(2, 8), "cache: expected"),
    ]
    if block_n == 4:
        model.decode(ids, cache)
        cases.append((ids, cache, "expected 2 free key blocks"))
    for tokens, one, message in cases:
        before = snapshot(one)
        with pytest.raises(ValueError, match=message):
            model.decode(tokens, one)
        assert_same(before, snapshot(one))


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_step_that_fails_is_taken_back(self_decoder, calls, device, counted, monkeypatch):
    """While it is warmed up or captured; the next one goes on as if nothing had happened."""
    model = model_on(device, self_decoder=self_decoder, sparse_mode="pair_mean")
    twins = Twins(model, device, max_rollback=1)
    twins.decode(*[2] * calls)
    cache = twins.caches[0]
    before = snapshot(cache)

    def fail(*_):
        raise torch.OutOfMemoryError("as if")

    T = 2 if calls < 2 else 1
    with monkeypatch.context() as patch:
        patch.setattr(model.model.norm, "forward", fail)
        if calls == 1 and device.type == "cpu":  # the stand-in would run
            patch.setattr(graphs, "Captured", fail)
        with pytest.raises(torch.OutOfMemoryError):
            model.decode(torch.ones(2, T, dtype=torch.long, device=device), cache)
    assert_same({**before, "free": 0, "blocks": 0}, {**snapshot(cache), "free": 0, "blocks": 0})
    twins.decode(T, T, T, 1)


def test_copies_of_a_model_capture_anew_and_caches_are_let_go(device, counted):
    model = model_on(device)
    twins = Twins(model, device)
    twins.decode(1, 1)
    assert len(model.model.graphs._caches) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.model.graphs._caches
    pool = twins.caches[0].pool
    twins.both(lambda cache: cache.fork())
    twins.decode(1, 1)
    assert len(model.model.graphs._caches) == 1
    del twins
    gc.collect()
    assert not model.model.graphs._caches
    assert len(pool.free) == len(pool.holders)


def test_inside_and_outside_of_inference_mode(device, counted):
    model = model_on(device, sparse_mode="pair_mean")
    tokens = torch.randint(1, VOCAB, (1, 20), device=device)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, use_graphs=False, **options)
    with torch.inference_mode():
        assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("B", [1, 3])
def test_a_replay_is_the_step_bit_for_bit_and_waits_for_nothing(B, mode, self_decoder):
    """Sizes as of a model, in bfloat16; 1 and 4 tokens at a time, over page boundaries."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "sliding_window": 128}
    blocks = {"sparse_block_n": 64, "sparse_budget": 8, "sparse_noise_budget": 4}
    model = tiny_model(torch.bfloat16, self_decoder=self_decoder, sparse_mode=mode, **sizes, **blocks).cuda()
    tokens = torch.randint(1, VOCAB, (B, 1200), device="cuda")
    caches = [model.new_cache(B, 1500, max_rollback=3) for _ in range(2)]
    for cache in caches:
        model.prefill(tokens, cache=cache)
    try:
        for i in range(140):
            T = 4 if i % 3 == 2 else 1
            ids = torch.randint(1, VOCAB, (B, T), device="cuda")
            torch.cuda.set_sync_debug_mode("error" if i > 6 else "default")
            logits = model.decode(ids, caches[0])
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(logits, by_step(model, caches[1], ids))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (own,) = model.model.graphs._caches.values()
    assert all(one.captured is not None for one in own.steps.values())
    assert set(own.steps) == {1, 4}


@pytest.mark.gpu
def test_a_graph_is_faster():
    model = tiny_model(torch.bfloat16, sparse_mode="pair_mean", num_hidden_layers=16, head_dim=16, sparse_block_n=16)
    model = model.cuda()
    ids, milliseconds = torch.ones(1, 1, dtype=torch.long, device="cuda"), []
    for use_graphs in (True, False):
        cache = model.prefill(torch.ones(1, 64, dtype=torch.long, device="cuda"), cache=model.new_cache(1, 500))[1]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for i in range(60):
            if i == 10:
                events[0].record()
            model.decode(ids, cache, use_graphs=use_graphs)
        events[1].record()
        torch.cuda.synchronize()
        milliseconds.append(events[0].elapsed_time(events[1]) / 50)
    print("a step with and without a graph:", milliseconds, "ms")
    assert milliseconds[0] < 0.5 * milliseconds[1]
