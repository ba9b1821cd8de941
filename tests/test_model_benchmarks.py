"""Whole-model benchmarks: that they measure the models they name, their arithmetic, and that they run on a CPU."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from diffv2_sparse import diff_attention
from diffv2_sparse.yoco import DiffV2Attention, DiffV2YocoConfig
from diffv2_sparse.yoco.decoder import SelfDecoderLayer
from diffv2_sparse.yoco.layers import rotary_angles

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts import their neighbours

import bars
import cases
import figures
import generation
import models
import prefill
import records
import runner
import timing

SHAPE = prefill.CPU_SMOKE.shape
PREFILL_SMOKE, GENERATION_SMOKE = prefill.CPU_SMOKE, generation.CPU_SMOKE
ROWS = models.Sparsity(16, 16, 5)
CLOSE = {"rtol": 1e-8, "atol": 1e-8}  # float64


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Several parts even of short prompts."""
    monkeypatch.setattr(models, "PART_TOKENS", 24)
    monkeypatch.setattr(models, "HEAD_TOKENS", 10)


def sharper(model):
    """Weights so large that attention is far from even."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3)
    return model


def decoder(attention=models.Attention, sparsity=None):
    return sharper(models.random_decoder(SHAPE, attention, sparsity, "cpu", torch.float64))


def prompt(T):
    return torch.randint(SHAPE.vocab, (1, T))


# The models are what they are called


def test_the_transformer_is_llama():
    model = decoder()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=SHAPE.eps,
        rope_theta=SHAPE.theta,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).double().eval()
    names = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    names |= {f"{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    names |= {f"attention.{x}_proj.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"}
    weights = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm}
    weights["lm_head.weight"] = model.lm_head.weight
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.attention_norm.normal_()
            layer.mlp_norm.normal_()
            for own, theirs in names.items():
                weights[f"model.layers.{i}.{theirs}"] = layer.get_parameter(own)
    llama.load_state_dict(weights)
    ids = prompt(70)
    expected = llama(ids).logits[:, -1:]
    torch.testing.assert_close(model.prefill(ids, 70)[0], expected, rtol=1e-5, atol=1e-5)  # its angles are float32
    # in chunks, and as a prompt of 69 tokens and one step
    torch.testing.assert_close(model.prefill(ids, 17)[0], model.prefill(ids, 70)[0], **CLOSE)
    cache = model.new_cache(1, 70)
    model.extend(ids[:, :69], cache, 0)
    torch.testing.assert_close(model.extend(ids[:, 69:], cache, 69), model.prefill(ids, 70)[0], **CLOSE)


def test_a_dense_diff_layer_is_the_library_s():
    """After its rotary form: ours turns adjacent dimensions, Llama's those that are half a head apart."""
    model = decoder(models.DiffAttention)
    config = DiffV2YocoConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    layer = SelfDecoderLayer(config).double()
    layer.mixer = DiffV2Attention(config).double()
    own, adjacent = model.layers[0], torch.arange(16).view(2, 8).T.flatten()

    def turned(weight):
        return weight.unflatten(0, (-1, 16))[:, adjacent].flatten(0, 1)

    attention = own.attention.state_dict()
    layer.mixer.load_state_dict(
        attention | {f"{x}_proj.weight": turned(attention[f"{x}_proj.weight"]) for x in ("q", "k")}
    )
    layer.mlp.load_state_dict({name: own.get_parameter(name) for name in layer.mlp.state_dict()})
    hidden = torch.randn(1, 70, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(hidden, rotary_angles(torch.arange(70)[None], 16, SHAPE.theta, torch.float64), None)
    torch.testing.assert_close(model.one_layer(hidden.clone()), expected, rtol=1e-6, atol=1e-6)  # ours has eps 1e-5 too


def test_a_sparse_decoder_differs_by_its_lists_alone(monkeypatch):
    dense, ids = decoder(models.DiffAttention), prompt(150)
    all_blocks = decoder(models.SparseDiffAttention, replace(ROWS, blocks=10))
    few_blocks = decoder(models.SparseDiffAttention, ROWS)
    for model in (all_blocks, few_blocks):
        model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(all_blocks.prefill(ids, 150)[0], dense.prefill(ids, 150)[0], **CLOSE)
    whole = few_blocks.prefill(ids, 150)[0]
    assert not torch.allclose(whole, dense.prefill(ids, 150)[0], rtol=1e-3)
    torch.testing.assert_close(few_blocks.prefill(ids, 48)[0], whole, **CLOSE)  # chunks of whole rows
    monkeypatch.setattr(models, "diff_attention", lambda *args: diff_attention(*args, backend="reference"))
    torch.testing.assert_close(few_blocks.prefill(ids, 48)[0], whole, **CLOSE)


@pytest.mark.parametrize("T", [16, 150, 160])
def test_scores_are_those_of_forward(T):
    model = sharper(models.random_yoco(SHAPE, ROWS, "cpu", torch.float64))
    ids = prompt(T)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].float()
    for chunk in (48, 160):
        torch.testing.assert_close(models.score_prompt(model, ids, chunk), expected)
    with pytest.raises(ValueError, match="chunks of whole rows"):
        models.score_prompt(model, ids, 50)


def test_yoco_reads_its_prompt_as_forward_does():
    kind = prefill.Kind(replace(PREFILL_SMOKE, dtype=torch.float64), "yoco")
    sharper(kind.model)
    run = kind.prefill(150, 32).build()
    with torch.no_grad():
        expected = kind.model(kind.prompt(150), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(run(), expected, **CLOSE)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("S", [64, 65, 100])
def test_a_step_in_a_graph_is_a_step_of_decode(mode, S, device):
    """One as a captured step goes, the other as a user calls it, over the same cache."""
    on_gpu = device.type == "cuda"
    dtype = torch.float32 if on_gpu else torch.float64
    close = {"rtol": 2e-2, "atol": 2e-2} if on_gpu else CLOSE
    sizes = replace(GENERATION_SMOKE, device=device.type, dtype=dtype)
    problem = generation.Problem(generation.Models(sizes), 2, S)
    model = sharper(problem.models.yoco)
    cache = models.fill(model.new_cache(2, S + 8), S - 1)
    rings = [tuple(x.clone() for x in state) for state in cache.states]
    problem.cache = cache  # the eager step's
    expected = problem._eager(mode, "auto")()
    assert cache.tokens == (S, S)
    twin = models.fill(model.new_cache(2, S + 8), S - 1)
    for own, other in ((twin.k_pages, cache.k_pages), (twin.v_pages, cache.v_pages)):
        own.copy_(other)
    twin.pool.summaries.copy_(cache.pool.summaries)
    with torch.no_grad():  # room for the token, whose keys and values are wrong before the step
        one = torch.full((2, SHAPE.kv_heads, SHAPE.head_dim), 7.0, dtype=dtype, device=device)
        sequence = torch.arange(2, device=device)
        twin.append(one, one, sequence, torch.full_like(sequence, S - 1), (1, 1), 1)
    options = problem.sizes.sparsity.options() if mode == "sparse" else None
    step = generation.StaticStep(model, twin, rings, problem.ids, options, "auto")
    step = timing.captured(step) if on_gpu else step
    torch.testing.assert_close(step(), expected, **close)
    torch.testing.assert_close(step(), expected, **close)  # and again: a graph is replayed


def test_a_step_needs_full_windows():
    model = models.random_yoco(SHAPE, ROWS, "cpu", torch.float32)
    cache = models.fill(model.new_cache(1, 32), 15)
    with pytest.raises(ValueError, match="full sliding windows of 16 tokens, got 15 tokens"):
        generation.StaticStep(model, cache, [], prompt(1), None, "auto")


def test_a_model_that_makes_graphs_is_called_as_it_is(monkeypatch):
    problem = generation.Problem(generation.Models(GENERATION_SMOKE), 1, 64)
    model, called = problem.models.yoco, []

    def decode(ids, cache, *, use_graphs=True):
        called.append((use_graphs, model.config.sparse_mode, model.config.paged_backend))

    monkeypatch.setattr(model, "decode", decode)
    monkeypatch.setattr(generation, "makes_graphs", lambda model: True)
    for attention in ("sparse", "dense"):
        problem._graph(attention, "auto")()
        problem._eager(attention, "auto")()
    assert isinstance(problem._graph("sparse", "xformers"), generation.StaticStep)
    problem._eager("sparse", "xformers")()
    auto = [(graphs, mode, "auto") for mode in ("pair_mean", "dense") for graphs in (True, False)]
    assert called == [*auto, (False, "pair_mean", "xformers")]


def test_heats_of_a_problem_cover_every_way():
    problem = generation.Problem(generation.Models(replace(GENERATION_SMOKE, backends=("auto", "xformers"))), 1, 64)
    heats = [[(case.phase, case.kind, case.backend) for case in heat] for heat in problem.heats()]
    assert heats == [
        [("sparse, graph", "ours", "auto"), *((f"dense, {how}", "Transformer", None) for how in ("graph", "eager"))],
        [("dense, graph", "ours", "auto")],
        [
            *((f"sparse, {how}", "ours", "xformers") for how in ("graph", "eager")),
            *((f"{attention}, eager", "ours", "auto") for attention in ("sparse", "dense")),
        ],
    ]


def test_long_prompts_attend_by_heads(monkeypatch):
    model, ids = decoder(), prompt(50)
    expected = model.prefill(ids, 50)[0]
    monkeypatch.setattr(models, "LARGEST", 100)
    torch.testing.assert_close(model.prefill(ids, 50)[0], expected, **CLOSE)


class Largest(TorchDispatchMode):
    """The most numbers that one tensor made under it has; a model's weights do not count."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.numbers = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.weights:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("group", list(prefill.NAMES))
def test_nothing_is_as_large_as_the_prompt_squared_or_all_logits(group):
    T, shape = 1024, replace(SHAPE, layers=2, vocab=2048)
    kind = prefill.Kind(replace(PREFILL_SMOKE, shape=shape, repeated=1 << 20), group)
    chunks = (64, 1 << 20) if group in prefill.DENSE else (64,)
    for chunk in chunks:
        found = {}
        for tokens in (T, 2 * T):
            run = kind.prefill(tokens, min(chunk, tokens)).build()
            with Largest(kind.model) as largest:
                run()
            found[tokens] = largest.numbers
        assert found[T] <= T * T / 4
        assert found[T] <= T * shape.vocab / 4
        assert found[2 * T] <= 2 * found[T]  # with the tokens, not with their square


# Arithmetic


def test_a_dense_kind_is_completed_by_its_layer():
    facts = {"benchmark": "prefill", "group": "diff", "kind": "DIFF V2", "backend": None, "weights_gib": 5.0}

    def record(T, phase, ms, **more):
        shape = {"T": T, "layers": 26, "chunk": 8192}
        return facts | {"case": str(T), "phase": phase, "median_ms": ms, "shape": shape, "cache_gib": T / 1e4} | more

    whole, one = record(131072, "prefill", 500.0), record(131072, "one layer", 20.0)
    long, chunked = record(262144, "one layer", 70.0), record(16384, "chunked", 9.0, peak_gib=3.0)
    failed = {**record(524288, "one layer", 1.0), "error": "OutOfMemoryError: full"}
    del failed["median_ms"]
    (more,) = prefill.completed("diff", [whole, one, long, chunked, failed])
    assert (more["phase"], more["median_ms"], more["extrapolated"]) == ("prefill", 1820.0, "one layer × 26")
    assert "rounds" not in more
    assert more["total_gib"] == pytest.approx(5.0 + 26.2144 + (3.0 - 1.6384), abs=1e-3)
    assert whole["total_gib"] == pytest.approx(5.0 + 13.1072 + 1.3616, abs=1e-3)
    assert whole["total_is"] == "weights + cache + activations of chunks of 8192, measured at 16384 tokens"
    own = facts | {"phase": "prefill", "shape": {"T": 8}, "median_ms": 1.0, "peak_gib": 2.0, "cache_gib": 1.0}
    assert prefill.completed("yoco", [own]) == []
    assert own["total_gib"] == 7.0


def prompts(group, kind, backend, power, scale=1.0, **more):
    names = {"benchmark": "prefill", "group": group, "phase": "prefill", "kind": kind, "backend": backend}
    return [
        names
        | {"case": f"{records.tokens_name(T)} tokens", "shape": {"T": T}, "median_ms": scale * (T / 1024) ** power}
        | {"weights_gib": 5.0, "cache_gib": 1.0, "total_gib": scale}
        | more
        for T in (1 << n for n in range(13, 21))
    ]


def test_growth_is_fitted_to_long_prompts():
    found = prompts("yoco", records.OURS, "auto", 1.0)
    assert bars.exponent(found, "yoco") == 1.0
    found[0]["median_ms"] *= 100  # 8K: launches, not growth
    assert bars.exponent(found, "yoco") == 1.0
    assert bars.exponent(prompts("yoco", records.OURS, "auto", 1.9), "yoco", doubling=True) == round(2**1.9, 4)
    found[-1]["median_ms"] *= 1.5
    assert 1.05 < bars.exponent(found, "yoco") < 1.1
    assert bars.exponent(found[:3], "yoco") != bars.exponent(found[:3], "yoco")  # NaN: one length is no line


def test_prefill_bars():
    found = prompts("yoco", records.OURS, "auto", 1.0, 2.0)
    found += prompts("transformer", "Transformer", None, 1.5, 20.0) + prompts("diff", "DIFF V2", None, 2.0)
    rows = {row["row"]: row for row in bars.evaluate(bars.PREFILL, found)}
    assert rows["prefill, YOCO + DIFF V2: growth exponent, 32K → 1M"]["met"] is True
    assert rows["prefill, 32K: × Transformer"]["value"] == pytest.approx(10 * 32**0.5, abs=1e-3)
    assert rows["prefill, 1M: × DIFF V2, dense, extrapolated"]["value"] == 512
    assert rows["memory at 1M: Transformer's over YOCO's"]["value"] == 10
    assert rows["prefill, 1M: × DIFF V2, block-sparse"]["why"].startswith("not measured")
    short = [r for r in found if r["case"] != "1M tokens"]
    rows = {row["row"]: row for row in bars.evaluate(bars.PREFILL, short)}
    assert rows["prefill, YOCO + DIFF V2: growth exponent, 32K → 1M"]["value"] is None
    limits = [bar.bar for bar in bars.PREFILL if bar.bar is not None]
    assert limits == [1.05, 2.6, 22, 42, 4, 42, 85, 9.4]


def test_generation_bars():
    def step(group, case, kind, backend, phase, ms, B=1):
        names = {"benchmark": "generation", "group": group, "case": case, "kind": kind, "backend": backend}
        return names | {"phase": phase, "shape": {"T": 1, "B": B, "S": 1}, "median_ms": ms}

    found = [
        step("batch 1", "512K tokens, batch 1", records.OURS, "auto", "sparse, graph", 2.0),
        step("batch 1", "512K tokens, batch 1", "Transformer", None, "dense, graph", 14.0),
        step("batch 1", "1M tokens, batch 1", records.OURS, "auto", "sparse, graph", 2.2),
        step("batch 1", "32K tokens, batch 1", records.OURS, "auto", "sparse, graph", 1.8),
        step("equal memory", "512K tokens, equal memory", records.OURS, "auto", "sparse, graph", 5.0, B=50),
        step("equal memory", "512K tokens, equal memory", "Transformer", None, "dense, graph", 20.0, B=2),
    ]
    generation.completed("batch 1", found)
    assert found[0]["tokens_per_s"] == 500
    assert found[0]["ratios"] == {"Transformer": 7.0}
    assert "ratios" not in found[4]  # another batch size
    layer = prompts("prompt", "Transformer", None, 0.0, 4e3)[:1]
    layer[0] |= {"phase": "one layer", "case": "512K tokens", "shape": {"T": 1 << 19, "layers": 26}}
    found += layer + generation.completed("prompt", layer)
    found += [prompts("prompt", "YOCO + DIFF V2", None, 0.0, 4e3)[6]]
    values = [row["value"] for row in bars.evaluate(bars.GENERATION, found)]
    assert values == [round(2.2 / 1.8, 4), 7.0, 100.0, round((26 * 4000 + 1024 * 14) / (4000 + 1024 * 2), 4)]
    assert [bar.bar for bar in bars.GENERATION] == [1.3, 6.5, 50, 9.6]


def test_the_bytes_of_keys_and_values():
    """26 layers against one, its summaries and thirteen windows."""
    million = 1 << 20
    of_token = 2 * 8 * 128 * 2
    assert prefill.Kind(prefill.FULL, "transformer").cache_bytes(million) == 26 * of_token * million
    ours = prefill.Kind(prefill.FULL, "yoco")
    assert ours.cache_bytes(million) == of_token * (million + million // 64 // 2 + 13 * 1024)
    small = prefill.Kind(PREFILL_SMOKE, "yoco")
    cache = small.model.new_cache(1, 256)
    held = [cache.k_pages, cache.v_pages, cache.pool.summaries, *(x for state in cache.states for x in state)]
    assert small.cache_bytes(256) == sum(x.numel() * x.element_size() for x in held)
    weights = {group: prefill.Kind(prefill.FULL, group).weights_gib for group in ("transformer", "yoco")}
    assert weights["transformer"] == pytest.approx(5.25, abs=0.02)
    assert weights["yoco"] == pytest.approx(5.57, abs=0.02)


# The time limit


def test_what_the_time_limit_leaves_out_is_recorded(tmp_path, capsys):
    def never():
        raise AssertionError("this must not be built")

    def group(sizes):
        yield [cases.Case("c", "prefill", records.OURS, "auto", {"T": 1}, never)]

    benchmark = cases.Benchmark("prefill", {"g": (group, 0)}, PREFILL_SMOKE, PREFILL_SMOKE, lambda found: [])
    found = cases.measure(benchmark, "g", PREFILL_SMOKE, lambda *told: None, time.monotonic() - 1)
    assert [record["error"] for record in found] == [cases.SKIPPED] * 2  # and the matrix product
    benchmark = replace(prefill.BENCHMARK, smoke=PREFILL_SMOKE)
    options = ["--smoke", f"--output={tmp_path}"]
    assert runner.main(benchmark, "", [*options, "--time-limit=0"]) == 1
    assert "yoco: 4 cases were skipped" in capsys.readouterr().out
    content = json.loads((tmp_path / "prefill_smoke.json").read_text())
    assert {record["error"] for record in content["records"]} == {cases.SKIPPED}
    only_yoco = replace(benchmark, groups={"yoco": prefill.BENCHMARK.groups["yoco"]})
    assert runner.main(only_yoco, "", options) == 0  # the same command does what was left
    content = json.loads((tmp_path / "prefill_smoke.json").read_text())
    assert all("error" not in record for record in content["records"] if record["group"] == "yoco")


def test_the_best_batch_is_that_with_the_most_tokens_a_second():
    def step(group, B, ms, kind, phase="dense, graph"):
        backend = "auto" if kind == records.OURS else None
        what = {"group": group, "case": f"512K tokens, {group}", "phase": phase, "kind": kind, "backend": backend}
        return what | {"shape": {"B": B}} | ({"error": "no room"} if ms is None else {"median_ms": ms})

    theirs = [step("batch 1", 1, 15, "Transformer"), step("equal memory", 2, 20, "Transformer")]
    ours = [step(f"batch {B}", B, ms, records.OURS, "sparse, graph") for B, ms in ((1, 2), (32, 8))]
    best = bars.best_batch("512K")
    value = lambda *more: best(bars.Found([*theirs, *ours, *more]), "auto")  # noqa: E731
    assert value() == value(step("equal memory", 57, None, records.OURS, "sparse, graph")) == 4 / 0.1
    assert value(step("equal memory", 57, 10, records.OURS, "sparse, graph")) == 5.7 / 0.1
    with pytest.raises(LookupError, match="not measured: 512K tokens"):
        best(bars.Found(ours), "auto")


# From end to end


def test_prefill_from_end_to_end(tmp_path, capsys):
    assert runner.main(replace(prefill.BENCHMARK, smoke=PREFILL_SMOKE), "", ["--smoke", f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "prefill_smoke.json").read_text())
    assert not [record["error"] for record in content["records"] if "error" in record]
    found = bars.Found(content["records"])
    whole = found("transformer", "256 tokens", "prefill", ["Transformer"])
    layer = found("transformer", "256 tokens", "one layer", ["Transformer"])
    assert whole["extrapolated"] == "one layer × 4"
    assert whole["median_ms"] == pytest.approx(4 * layer["median_ms"], abs=0.06)
    assert "extrapolated" not in found("transformer", "128 tokens", "prefill", ["Transformer"])
    assert found("yoco", "256 tokens", "prefill", backend="auto")["shape"]["chunk"] == 32
    assert found("diff_sparse", "256 tokens", "prefill", ["DIFF V2, block-sparse"])["shape"]["row_queries"] == "first"
    titles = ["time to the first token, ms, and over yoco", "growth", "memory at 256 tokens"]
    assert list(content["tables"]) == titles
    assert [row["tokens"] for row in content["tables"][titles[0]]] == ["64", "128", "256"]
    assert {row["kind"]: row["KV bytes a token"] for row in content["tables"][titles[2]]}["transformer"] == 4 * 256
    said = capsys.readouterr().out
    assert all(title in said for title in titles)
    panels = figures.prompt_panels([r for r in content["records"] if "median_ms" in r])
    lines = panels[figures.TIME, "batch 1"]
    assert lines.keys() == {
        *("YOCO + DIFF V2", "YOCO + DIFF V2, all logits", "Transformer", "DIFF V2", "DIFF V2, block-sparse"),
        *("Transformer, extrapolated", "DIFF V2, extrapolated"),
    }
    assert lines["Transformer, extrapolated"].keys() == {128, 256}
    assert (tmp_path / "prefill_smoke.png").exists()


def test_generation_from_end_to_end(tmp_path):
    benchmark = replace(generation.BENCHMARK, smoke=GENERATION_SMOKE)
    assert runner.main(benchmark, "", ["--smoke", f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "generation_smoke.json").read_text())
    assert not [record["error"] for record in content["records"] if "error" in record]
    found = bars.Found(content["records"])
    step = found("batch 8", "64 tokens, batch 8", "sparse, graph", backend="auto")
    assert step["tokens_per_s"] == pytest.approx(8e3 / step["median_ms"], rel=0.01)
    best = found("equal memory", "256 tokens, equal memory", "dense, graph", ["Transformer"])["shape"]["B"]
    assert 1 < best < found("equal memory", "256 tokens, equal memory", "sparse, graph", backend="auto")["shape"]["B"]
    assert found("prompt", "256 tokens", "prefill", ["Transformer"])["extrapolated"] == "one layer × 4"
    assert found("prompt", "256 tokens", "prefill", ["YOCO + DIFF V2"])["median_ms"] > 0
    for choice, most in (("own", 2 * 2 * 5), ("shared", 2 * 5)):  # layers that choose, KV heads, blocks
        step = found("offloaded", f"1K tokens, offloaded, {choice} choice", "sparse, graph", backend="auto")
        assert 0 < step["pages_fetched"] <= most
        assert step["ratios"].keys() == {"ours, resident"}
        assert step["tokens_per_s"] > 0
    panels = figures.step_panels([r for r in content["records"] if "median_ms" in r])
    assert panels["one token, in a CUDA graph", "batch 1"].keys() == {
        *("sparse, ours (auto)", "dense, ours (auto)", "Transformer")
    }
    assert (tmp_path / "generation_smoke.png").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("benchmark", [prefill.BENCHMARK, generation.BENCHMARK], ids=lambda benchmark: benchmark.name)
def test_every_group_runs_on_a_gpu(benchmark, tmp_path, monkeypatch):
    monkeypatch.undo()  # whole parts
    runner.main(benchmark, "", ["--smoke", f"--output={tmp_path}"])
    content = json.loads((tmp_path / f"{benchmark.name}_smoke.json").read_text())
    failed = [r["error"] for r in content["records"] if "error" in r]
    assert not [error for error in failed if "xformers" not in error]  # which may not be installed
    assert content["environment"]["groups"].keys() == benchmark.groups.keys()
    assert all("peak_gib" in r for r in content["records"] if "rounds" in r)


def test_what_does_not_fit_is_recorded(tmp_path):
    sizes = replace(GENERATION_SMOKE, memory_gib=generation.RESERVE_GIB + 4e-4)
    benchmark = replace(generation.BENCHMARK, smoke=sizes, groups={"batch 1": generation.groups(sizes)["batch 1"]})
    assert runner.main(benchmark, "", ["--smoke", f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "generation_smoke.json").read_text())
    errors = {(r["kind"], r["shape"].get("S")): r["error"] for r in content["records"] if "error" in r}
    assert errors
    assert all(error.startswith("MemoryError: needs ") for error in errors.values())
