"""The benchmarks' own arithmetic, and that they run from end to end: tiny shapes, on a CPU."""

import contextlib
import itertools
import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffv2_sparse import BlockSelection, cli, diff_attention

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts import their neighbours

import attention  # noqa: E402
import bars  # noqa: E402
import cases  # noqa: E402
import decode  # noqa: E402
import figures  # noqa: E402
import peers  # noqa: E402
import records  # noqa: E402
import runner  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402
from lists import Lists  # noqa: E402

SMOKE = replace(attention.SMOKE, device="cpu", dtype=torch.float32, backends=("torch",))
DECODE_SMOKE = replace(decode.SMOKE, device="cpu", dtype=torch.float32)

# Lists


@pytest.mark.parametrize("pattern", ["random", "model-like"])
@pytest.mark.parametrize(
    ("block_m", "block_n", "blocks"), [(32, 32, 6), (16, 16, 8), (8, 16, 8), (1, 16, 8), (64, 16, 9)]
)
def test_lists_are_what_select_blocks_could_choose(pattern, block_m, block_n, blocks):
    T, H, shape = 1000, 3, Lists(block_m, block_n, blocks, pattern)
    selection = shape.draw(T, H, device="cpu")
    selection.validate(T, T)  # ascending, no repeats, existing
    assert selection.indices.shape == (1, 1, H, -(-T // block_m), blocks)
    for h, row in itertools.product(range(H), range(selection.indices.shape[3])):
        first, last = row * block_m, min(T, (row + 1) * block_m) - 1
        listed = set(selection.indices[0, 0, h, row, : selection.counts[0, 0, h, row]].tolist())
        own = set(range(first // block_n, last // block_n + 1))
        forced = {0} | own | {max(0, first // block_n - 1)}
        assert forced <= listed
        assert max(listed) <= last // block_n  # nothing from the future
        assert all((block + 1) * block_n <= first for block in listed - own)  # complete before the row
        if pattern == "random" or len(listed) == blocks:
            assert len(listed) == min(blocks - shape.forced + len(forced), last // block_n + 1)
    again, other = shape.draw(T, H, device="cpu"), shape.draw(T, H, device="cpu", seed=1)
    assert torch.equal(selection.indices, again.indices)
    assert not torch.equal(selection.indices, other.indices)
    assert not torch.equal(selection.indices[0, 0, 0], selection.indices[0, 0, 1])  # heads differ


@pytest.mark.parametrize(("pattern", "low", "high"), [("random", 0.0, 0.12), ("model-like", 0.75, 0.80)])
def test_neighbouring_rows_share(pattern, low, high):
    shape = Lists(1, 16, 35, pattern)
    indices = shape.draw(8192, 2, device="cpu").indices[0, 0, :, -1000:].long()
    rows = torch.zeros(*indices.shape[:2], 512, dtype=torch.bool).scatter_(-1, indices, True)
    together = (rows[:, 1:] & rows[:, :-1]).sum(-1) - shape.forced  # of 32 drawn; the forced are the same
    assert low <= float(together.float().mean()) / (35 - shape.forced) <= high
    if pattern == "model-like":  # nothing stays for ever
        assert float((rows[:, 8:] & rows[:, :-8]).sum(-1).float().mean()) < 0.15 * 35 + shape.forced


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_classes_have_in_common_what_was_asked(common):
    shape = Lists(32, 32, 16, common=common)
    selection = shape.draw(8192, 2, device="cpu")
    selection.validate(8192, 8192)
    assert selection.num_classes == 2
    signal, noise = (set(selection.indices[0, c, 1, -1].tolist()) for c in (0, 1))
    assert len(signal) == len(noise) == 16
    assert len(signal & noise) == max(shape.forced, round(16 * common))


def test_lists_refuse():
    with pytest.raises(ValueError, match="blocks: expected more than the 3 forced ones, got 3"):
        Lists(64, 64, 3)
    with pytest.raises(ValueError, match="pattern: expected one of random, model-like"):
        Lists(64, 64, 8, "sorted")


# Timing


def test_candidates_take_turns_and_failures_stay_out():
    called = []

    def runs(name, value):
        return timing.Candidate(lambda: lambda: called.append(name) or value, "the same")

    x = torch.randn(1, 4, 2)

    def missing():
        raise ModuleNotFoundError("No module named 'rival'\nand more lines")

    def full():
        raise torch.OutOfMemoryError("out of memory")

    outcomes = timing.compare(
        {
            "a": runs("a", x),
            "missing": timing.Candidate(missing),
            "full": timing.Candidate(lambda: full),
            "b": runs("b", x + 1e-3),
            "wrong": runs("wrong", x.flip(1)),
            "nan": runs("nan", x * float("nan")),
            "apart": timing.Candidate(lambda: lambda: (called.append("apart"), x.flip(1))[1], "other", steps=4),
        },
        budget_s=0,
        rounds=(3, 5),
    )
    assert all(sorted(called[-n:][:3]) == ["a", "apart", "b"] for n in (3, 6, 9))
    assert outcomes["missing"] == {"error": "ModuleNotFoundError: No module named 'rival'"}
    assert outcomes["full"] == {"error": "OutOfMemoryError: out of memory"}
    assert "computes something else" in outcomes["wrong"]["error"]
    assert "not finite" in outcomes["nan"]["error"]
    for name in ("a", "b", "apart"):
        assert outcomes[name]["rounds"] == 3
        assert 0 <= outcomes[name]["p20_ms"] <= outcomes[name]["median_ms"] <= outcomes[name]["p80_ms"]


def test_times_are_of_one_step(monkeypatch):
    taken = {"one": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "four": [4.0] * 6}
    monkeypatch.setattr(timing, "time_interleaved", lambda kinds, rounds, seconds: taken)
    candidates = {
        "one": timing.Candidate(lambda: lambda: None),
        "four": timing.Candidate(lambda: lambda: None, steps=4),
    }
    outcomes = timing.compare(candidates, budget_s=0)
    assert outcomes["one"] == {"median_ms": 3500.0, "p20_ms": 2000.0, "p80_ms": 5000.0, "rounds": 3}
    assert outcomes["four"]["median_ms"] == 1000.0


def test_a_heat_is_gone_before_the_next_is_made():
    alive = []

    def heat(sizes):
        x = torch.zeros(1)
        alive.append(weakref.ref(x))
        return [cases.Case("c", "select", records.OURS, "torch", {}, lambda: lambda: x)]

    def group(sizes):
        for _ in range(3):
            assert all(ref() is None for ref in alive)
            yield heat(sizes)

    benchmark = cases.Benchmark("attention", {"g": (group, 0)}, SMOKE, SMOKE, lambda found: [])
    assert len(cases.measure(benchmark, "g", SMOKE, lambda *told: None)) == 4  # and the matrix product
    assert len(alive) == 3


# Cases


def test_work_counts_selected_tiles():
    problem = attention.Problem(SMOKE, 128)
    lists = Lists(32, 32, 5)
    (case,) = problem.over("c", lists)
    selection = lists.draw(128, 2, device="cpu")
    tiles = sum(int(selection.counts[0, 0, h].sum()) * 2 for h in range(2))  # two heads read each list
    assert case.tflop == pytest.approx(4e-12 * SMOKE.D * tiles * 32 * 32)
    apart = replace(lists, common=0.0)
    (two_classes,) = problem.over("c", apart)
    tiles = int(apart.draw(128, 2, device="cpu").counts.sum())  # one head reads each of the four lists
    assert two_classes.tflop == pytest.approx(4e-12 * SMOKE.D * tiles * 32 * 32)
    (dense,) = problem.dense({}, ours=True)
    assert dense.tflop == pytest.approx(4e-12 * SMOKE.D * 4 * 128 * 128 / 2)
    learning = attention.Problem(SMOKE, 128, phase="fwd+bwd").over("c", lists)[0]
    assert learning.tflop == pytest.approx(3.5 * case.tflop)


@pytest.mark.parametrize("lists", [SMOKE.large, SMOKE.medium, SMOKE.token], ids=str)
def test_choice_is_as_long_as_assumed(lists):
    problem = attention.Problem(SMOKE, 120)
    select, fwd = problem.chosen("c", lists)
    chosen = select.build()()
    assert attention.selected_tiles(120, lists) == int(chosen.counts[0, 0, 0].sum())
    assert fwd.shape["lists"] == "chosen"


def test_a_rehearsal_is_short_but_laid_out_as_if_long():
    short = attention.Problem(replace(SMOKE, at_most=64), 1 << 20)
    for x in short.x.all:
        assert x.shape[1] == 64
        assert x.stride(0) == (1 << 20) * x.stride(1)
    plain = attention.Problem(SMOKE, 64)
    for build in (lambda p: p.over("c", SMOKE.large), lambda p: p.dense({}, ours=True)):
        assert torch.equal(build(short)[0].build()(), build(plain)[0].build()())
    long, other = short.over("c", SMOKE.large)[0], plain.over("c", SMOKE.large)[0]
    assert long.variant == other.variant  # 2²⁰ tokens of 4 × 16 numbers count in 32 bits
    wide = attention.Problem(replace(SMOKE, at_most=64), 1 << 25).over("c", SMOKE.large)[0]
    assert wide.variant != other.variant


def test_every_variant_is_compiled_ahead(monkeypatch):
    """In threads here, in processes there: each variant once, peers of one length at their length, errors told."""
    attended, wanted = (
        [],
        replace(attention.BENCHMARK, full=replace(SMOKE, at_most=None), groups=attention.BENCHMARK.groups),
    )
    monkeypatch.setattr(attention, "BENCHMARK", wanted)
    monkeypatch.setattr(cases, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))

    def attend(q, k, v, lam_logit, selection, backend):
        attended.append((q.shape[1], None if selection is None else (selection.block_m, selection.num_classes)))
        return q[:, :, ::2]

    def flex(x, selection):
        raise RuntimeError(f"flex was here, for {x.tokens}")

    monkeypatch.setattr(attention, "diff_attention", attend)
    monkeypatch.setattr(peers, "flex", flex)
    short = replace(SMOKE, at_most=32)
    monkeypatch.setattr(attention.Sizes, "rehearsal", lambda sizes: short)
    told = []
    errors = cases.compile_ahead(wanted, ["forward", "sweep"], SMOKE, lambda done, total: told.append((done, total)))
    assert sorted(attended, key=str) == sorted(
        [(32, (block_m, 1)) for block_m in (32, 16, 8, 1)] + [(32, (32, 2))] + [(32, (32, 1))], key=str
    )  # large, medium, short, token, per class; the sweep's other heads
    assert errors["large blocks, fwd: FlexAttention + subtraction"] == "RuntimeError: flex was here, for 128"
    assert told[-1] == (len(told), len(told))


def test_kernels_and_torch_agree_in_one_heat():
    sizes = replace(SMOKE, backends=("torch", "triton"))
    (heat,) = [attention.Problem(sizes, 64).over("c", sizes.large)]
    outcomes = timing.compare({case.title: case.candidate() for case in heat}, budget_s=0, rounds=(1, 1))
    assert all("median_ms" in outcome for outcome in outcomes.values()), outcomes


def test_a_backend_that_computes_something_else_is_told(monkeypatch):
    sizes = replace(SMOKE, backends=("torch", "triton"))
    swapped = lambda q, k, v, lam, selection, backend: diff_attention(  # noqa: E731
        q, k, v, lam if backend == "torch" else -lam, selection, backend="torch"
    )
    monkeypatch.setattr(attention, "diff_attention", swapped)
    heat = attention.Problem(sizes, 64).over("c", sizes.large)
    outcomes = timing.compare({case.title: case.candidate() for case in heat}, budget_s=0, rounds=(1, 1))
    assert "computes something else" in outcomes["c, fwd: ours (triton)"]["error"]


def test_extrapolation():
    T = torch.tensor([32768.0, 65536.0, 131072.0], dtype=torch.float64)
    a, b = attention.fitted(T, 3e-8 * T**2 + 2e-5 * T)
    assert (a, b) == (pytest.approx(3e-8), pytest.approx(2e-5))
    a, b = attention.fitted(T, 3e-8 * T**2 * torch.tensor([0.95, 1.0, 1.05]))  # it slows down: no negative term
    assert b == 0
    assert a == pytest.approx(3e-8, rel=0.01)


# Bars


def measured(group, case, phase, kind, backend, ms, **more):
    return {
        **{"group": group, "case": case, "phase": phase, "kind": kind, "backend": backend, "median_ms": ms},
        **{"shape": {}, "tflops": 100 / ms, **more},
    }


def test_bars_read_records():
    fwd, gib = ("forward", bars.LARGE, "fwd"), {"peak_gib": 5.0, "inputs_gib": 16.0, "output_gib": 4.0}
    found = [
        measured(*fwd, records.OURS, "triton", 40.0),
        measured(*fwd, "FlexAttention + subtraction", None, 44.0),
        measured("forward", "short rows", "fwd", records.OURS, "triton", 50.0),
        measured("forward", "per class, half common", "fwd", records.OURS, "triton", 70.0),
        measured("million", bars.LARGE, "fwd", records.OURS, "triton", 9.0, **gib),
        measured("selection", bars.LARGE, "select", records.OURS, "auto", 4.0),
        measured("selection", bars.LARGE, "fwd", records.OURS, "triton", 40.0),
        measured("selection", "medium blocks", "select", records.OURS, "auto", 1.0, error="OutOfMemoryError: full"),
    ]
    rows = {row["row"]: row for row in bars.evaluate(bars.ATTENTION, found)}
    assert len(rows) == sum(bar.backend is None for bar in bars.ATTENTION)
    flex = rows["fwd, 128 × 128 × 32: × FlexAttention"]
    assert (flex["value"], flex["bar"], flex["met"], flex["backend"]) == (1.1, 1.12, False, "triton")
    assert rows["fwd, block_m 16: rate of block_m 128"]["value"] == 0.8
    assert rows["fwd, per_class, half in common: time over pair_mean's"]["value"] == 1.75
    assert rows["fwd, per_class, half in common: time over pair_mean's"]["met"] is False
    memory = rows["peak memory, fwd at 1M: beyond inputs + output"]
    assert (memory["value"], memory["met"]) == (0.05, True)
    assert rows["selection, 128 × 128: share of its attention"]["value"] == 0.1
    failed = rows["selection, 64 × 64: share of its attention"]
    assert failed["value"] is None
    assert "OutOfMemoryError: full" in failed["why"]
    assert failed["met"] is None


def test_bars_of_one_backend():
    """What the Hopper kernels are to reach is asked of them alone."""
    fwd = ("forward", bars.LARGE, "fwd")
    found = [
        measured(*fwd, records.OURS, "hopper", 25.0),
        measured(*fwd, records.OURS, "triton", 40.0),
        measured("forward", "matrix product", "fwd", "cuBLAS", None, 20.0),
        measured("shapes", "few tokens", "fwd", records.OURS, "hopper", 50.0),
    ]
    values = {(row["row"], row["backend"]): row["value"] for row in bars.evaluate(bars.ATTENTION, found)}
    assert values["Hopper: fwd, 128 × 128 × 32: × triton", "hopper"] == 1.6
    assert values["Hopper: fwd, 128 × 128 × 32: rate of cuBLAS", "hopper"] == 0.8
    assert values["Hopper: fwd, 16K tokens: rate of the first row", "hopper"] == 0.5
    assert not any(row.startswith("Hopper") for row, backend in values if backend == "triton")


def test_every_number_to_reach_has_its_row():
    """The kernels' issue: fifteen bars of prefill and training, one of decoding; the Hopper kernels' own."""
    limits = [(bar.bar, bar.reach) for bar in bars.ATTENTION if bar.bar is not None and bar.backend is None]
    assert sorted(limits, key=str) == sorted(
        [
            *[(1.12, 1.2), (1.08, None), (0.85, None), (0.1, 0.3), (0.3, 0.6), (1.12, 1.25), (0.25, 0.5)],
            *[(0.12, None), (0.22, None), (0.02, None), (11, 13), (55, None), (90, None), (1.5, 1.35), (0.1, None)],
        ],
        key=str,
    )
    hopper = [(bar.bar, bar.reach) for bar in bars.ATTENTION if bar.bar is not None and bar.backend == "hopper"]
    assert sorted(hopper, key=str) == sorted(
        [
            *[(1.33, 1.45), (0.88, 0.95), (1.05, 1.15), (1.28, None), (0.8, 0.88), (1.5, 1.7), (1.0, None)],
            *[(0.88, 1.0), (0.6, None), (0.45, None), *[(0.85, None)] * 4],
        ],
        key=str,
    )
    assert [(bar.bar, bar.reach) for bar in bars.DECODE if bar.bar is not None] == [(24, 35)]


def test_a_page_says_all_that_the_file_holds(tmp_path):
    fine = measured("forward", bars.LARGE, "fwd", records.OURS, "triton", 40.0, ratios={"FA4": 0.9})
    lost = {**measured("forward", "dense", "fwd", "a | b", None, 1.0), "error": "ImportError: none"}
    results = records.Results(tmp_path / "x_cpu.json", lambda found: bars.evaluate(bars.ATTENTION, found))
    results.add("forward", [{"benchmark": "x", **fine}, {"benchmark": "x", **lost}], seconds=1.0)
    page = tables.write_page(results.path).read_text()
    assert "| **large blocks** | fwd | ours | triton | 40 |  |  | 2.5 |  | FA4 0.90 |" in page
    assert "| dense | fwd | a \\| b |" in page
    assert "ImportError: none" in page
    assert page.count("not measured") == sum(bar.backend is None for bar in bars.ATTENTION)
    assert "time against length" not in page
    results.path.with_suffix(".png").touch()
    assert "](x_cpu.png)" in tables.write_page(results.path).read_text()


# From end to end


RECORD = {"benchmark", "group", "case", "phase", "kind", "backend", "shape"}
TIMES = {"median_ms", "p20_ms", "p80_ms"}


def check_schema(content, groups):
    assert {"date", "commit", "versions", "cpu", "gpu", "groups", "cublas_tflops"} <= content["environment"].keys()
    assert set(content["environment"]["groups"]) == groups
    assert {record["group"] for record in content["records"]} == groups
    for record in content["records"]:
        assert record.keys() >= RECORD
        assert ("error" in record) or ("extrapolated" in record) or (record.keys() >= TIMES and record["median_ms"] > 0)
        assert isinstance(record["shape"], dict)
        if record["kind"] == records.OURS and "error" not in record:
            assert record["backend"]
            assert isinstance(record["ratios"], dict)
    for row in content["bars"]:
        assert row.keys() >= {"row", "backend", "value", "bar", "reach", "met"}
        assert (row["value"] is None) == ("why" in row)


def run_smoke(benchmark, output, *options):
    return runner.main(benchmark, "a benchmark", ["--smoke", f"--output={output}", *options])


@pytest.fixture(scope="module")
def attention_results(tmp_path_factory):
    output = tmp_path_factory.mktemp("attention")
    assert run_smoke(replace(attention.BENCHMARK, smoke=SMOKE), output) == 0
    return output / "attention_smoke.json"


def test_attention_from_end_to_end(attention_results):
    content = json.loads(attention_results.read_text())
    check_schema(content, set(attention.BENCHMARK.groups))
    found = bars.Found(content["records"])
    ours = found("forward", bars.LARGE, "fwd", backend="torch")
    flex = found("forward", bars.LARGE, "fwd", [peers.FLEX])
    assert ours["ratios"] == {peers.FLEX: pytest.approx(flex["median_ms"] / ours["median_ms"], abs=1e-3)}
    assert found("selection", bars.LARGE, "select+fwd", backend="torch")["tflops"] > 0
    assert found("million", bars.LARGE, "select+fwd", backend="torch")["ratios"][f"{peers.DENSE}, extrapolated"] > 0
    with pytest.raises(LookupError, match="ModuleNotFoundError"):
        found("forward", bars.LARGE, "fwd", [peers.FA4])
    with pytest.raises(LookupError, match="has no backward on a CPU"):
        found("training", bars.LARGE, "fwd+bwd", [peers.FLEX])
    extrapolated = found("million", "dense, extrapolated", "fwd", [peers.DENSE])
    assert extrapolated["extrapolated"] is True
    assert extrapolated["shape"]["T"] == SMOKE.long_tokens
    assert extrapolated["fit"]["measured_tokens"] == list(SMOKE.fitted_tokens)
    assert not TIMES - {"median_ms"} & extrapolated.keys()
    judged = [row for row in content["bars"] if row["bar"] is not None and row["met"] is not None]
    assert len(judged) == 13  # all but memory, which a GPU tells, and what FlexAttention cannot do on a CPU
    assert attention_results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_run_continues_with_what_it_lacks(attention_results, tmp_path, monkeypatch, capsys):
    measured_groups = []
    monkeypatch.setattr(runner, "measure", lambda benchmark, name, *rest: measured_groups.append(name) or [])
    content = json.loads(attention_results.read_text())
    lacking = tmp_path / attention_results.name
    del content["environment"]["groups"]["dense"]
    lacking.write_text(json.dumps(content))
    assert run_smoke(attention.BENCHMARK, tmp_path) == 0
    assert measured_groups == ["dense"]
    assert json.loads(lacking.read_text())["records"] == [r for r in content["records"] if r["group"] != "dense"]
    assert run_smoke(attention.BENCHMARK, tmp_path) == 0
    assert measured_groups == ["dense"]
    assert run_smoke(attention.BENCHMARK, tmp_path, "--only", "forward") == 0
    assert measured_groups == ["dense", "forward"]
    content["environment"]["commit"] = "of another day"
    lacking.write_text(json.dumps(content))
    assert run_smoke(attention.BENCHMARK, tmp_path, "--only", "sweep") == 0
    assert "starts anew" in capsys.readouterr().out
    assert json.loads(lacking.read_text())["environment"]["groups"].keys() == {"sweep"}


def test_what_was_measured_survives_a_failure(tmp_path, monkeypatch, capsys):
    def measure(benchmark, name, *rest):
        if name == "dense":
            raise RuntimeError("no inputs today")
        if name == "sweep":
            raise KeyboardInterrupt
        return [measured(name, "c", "fwd", records.OURS, "torch", 1.0)]

    monkeypatch.setattr(runner, "measure", measure)
    assert run_smoke(attention.BENCHMARK, tmp_path) == 130
    said = capsys.readouterr()
    assert "no inputs today" in said.out
    assert said.err.startswith("attention: interrupted; the same command continues")
    kept = json.loads((tmp_path / "attention_smoke.json").read_text())
    assert kept["environment"]["groups"].keys() == attention.BENCHMARK.groups.keys() - {"dense", "sweep"}
    monkeypatch.setattr(
        runner, "measure", lambda *rest: (_ for _ in ()).throw(timing.DeviceLostError("the device is lost"))
    )
    assert run_smoke(attention.BENCHMARK, tmp_path) == 1
    assert capsys.readouterr().err == "attention: the device is lost\n"


def test_decode_from_end_to_end(tmp_path):
    assert run_smoke(replace(decode.BENCHMARK, smoke=DECODE_SMOKE), tmp_path) == 0
    content = json.loads((tmp_path / "decode_smoke.json").read_text())
    check_schema(content, {"decode"})
    found = bars.Found(content["records"])
    step = found("decode", "256 keys, batch 2", "step", backend="auto")
    assert step["ratios"].keys() == {peers.DENSE}
    assert step["read_gib"] * 2**30 == 2 * 2 * 16 * 4 * (2 * 6 * 16 + 16)  # B·H·D·4 bytes of 6 pages' K and V, 16 means
    attended = found("decode", "256 keys, batch 2", "attend", backend="auto")
    assert attended["read_gib"] * 2**30 == 2 * 2 * 16 * 4 * 2 * 6 * 16
    with pytest.raises(LookupError, match="pages of a multiple of 64 keys, not of 16"):
        found("decode", "256 keys, batch 2", "step", [peers.XFORMERS])
    assert (tmp_path / "decode_smoke.png").exists()


@pytest.mark.gpu
@pytest.mark.parametrize(("benchmark", "group"), [(attention.BENCHMARK, "sweep"), (decode.BENCHMARK, "decode")])
def test_a_group_runs_on_a_gpu(benchmark, group, tmp_path):
    assert run_smoke(benchmark, tmp_path, "--only", group) == 0
    content = json.loads((tmp_path / f"{benchmark.name}_smoke.json").read_text())
    check_schema(content, {group})
    ours = [record for record in content["records"] if record["kind"] == records.OURS]
    assert not [record["error"] for record in ours if "error" in record]
    assert all("peak_gib" in record for record in ours)


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """Its tensors may be known to the captured function alone."""

    class Stream:
        wait_stream = replay = lambda self, *_: None

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())

    def steps_over(x):
        return lambda: x.sum()

    x = torch.ones(3)
    held = weakref.ref(x)
    replay = timing.captured(steps_over(x))
    del x
    assert replay() == 3
    assert held() is not None
    del replay
    assert held() is None


def test_dense_decoding_reads_the_pages_as_they_lie():
    problem = decode.Problem(DECODE_SMOKE, 2, 64)
    q, lam_logit = problem.layers[0]
    every = torch.arange(4, dtype=torch.int32).expand(2, 1, 2, 1, 4).contiguous()
    whole = BlockSelection(every, torch.full((2, 1, 2, 1), 4, dtype=torch.int32), 1, 16)
    ours = problem._ours("auto")(q, lam_logit, whole)
    torch.testing.assert_close(peers.dense_decode(q, lam_logit, problem.pages)(), ours)


def test_a_machine_without_a_gpu_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main(decode.BENCHMARK, "", [f"--output={tmp_path}"]) == 1
    assert capsys.readouterr().err == "decode: needs a CUDA device; --smoke runs tiny shapes without one\n"
    assert not list(tmp_path.iterdir())


def test_figures_show_the_json_and_nothing_else(attention_results, tmp_path):
    content = json.loads(attention_results.read_text())
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(content))
    same = figures.draw(copy).read_bytes()
    assert same == attention_results.with_suffix(".png").read_bytes()
    for record in content["records"]:
        if record["group"] == "sweep" and record["kind"] == records.OURS:
            record["median_ms"] *= 10
    copy.write_text(json.dumps(content))
    assert figures.draw(copy).read_bytes() != same
    panels = figures.swept_panels([r for r in content["records"] if "median_ms" in r])
    assert set(panels) == {("head size 16", "4 query heads, 2 KV heads"), ("head size 16", "2 query heads, 1 KV heads")}
    assert all(lines["budget 160 keys, torch"].keys() == set(SMOKE.swept_tokens) for lines in panels.values())
    content["records"] = [record for record in content["records"] if record["group"] != "sweep"]
    copy.write_text(json.dumps(content))
    assert figures.draw(copy) is None


# The command


def test_the_command_runs_the_script(tmp_path, capfd):
    result = CliRunner().invoke(cli.app, ["bench", "decode", "--smoke", "--only", "decode", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "numbers to reach" in capfd.readouterr().out
    assert (tmp_path / "decode_smoke.json").exists()


def test_the_command_passes_options_and_exit_codes(tmp_path, monkeypatch, capfd):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    script = "import sys\nprint(sys.argv[1:])\nsys.exit(3)\n"
    (tmp_path / "benchmarks" / "attention.py").write_text(script)
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    result = CliRunner().invoke(cli.app, ["bench", "--only", "a", "--only", "b", "--output", "o"])
    assert result.exit_code == 3
    assert capfd.readouterr().out == "['--only=a', '--only=b', '--output=o']\n"


def test_the_command_needs_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()  # somebody else's: no checkout
    (tmp_path / "benchmarks" / "attention.py").touch()
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    result = CliRunner().invoke(cli.app, ["bench", "--smoke"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "the benchmarks belong to the source checkout" in line


def test_sweep_tells_what_was_skipped_from_what_failed():
    shape = {"D": 64, "HQ": 4, "H": 2}
    swept = [{"shape": shape | {"T": T}, "case": "budget 1K", "backend": "hopper", "kind": "ours"} for T in (1, 2, 4)]
    outcomes = {"median_ms": 0.5, "tflops": 9.0}, {"error": cases.SKIPPED}, {"error": "OutOfMemoryError: CUDA"}
    table = tables.table_of("sweep", [record | outcome for record, outcome in zip(swept, outcomes)], 1.0)
    assert table.rows[0][-3:] == ("0.5 (9)", "skipped", "OutOfMemoryError")
