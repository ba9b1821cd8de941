"""The needle test: its prompts, its bookkeeping (over a model that answers by rule), its store of cells, its report."""

import errno
import io
import json
import os
import re
from dataclasses import dataclass, replace

import matplotlib.image
import numpy as np
import pytest
import torch

from diffv2_sparse import haystack, niah, niah_answers, niah_cells, niah_report
from diffv2_sparse.environment import environment as stamp
from diffv2_sparse.selection import BlockSelection
from diffv2_sparse.tokenizer import byte_tokenizer
from diffv2_sparse.yoco import DiffV2YocoConfig, DiffV2YocoForCausalLM

TOKENIZER = byte_tokenizer()
TEXT = haystack.documentation("test")
FIELDS = {
    *("mode", "context_tokens", "depth", "needles", "trials", "correct", "accuracy", "density"),
    *("prefill_s", "decode_ms_per_token"),
}


class RuleConfig:
    sparse_mode, sparse_block_m, sparse_block_n, max_position_embeddings = "dense", 1, 4, 4096

    def to_dict(self):
        return {"sparse_mode": self.sparse_mode}


@dataclass
class RuleCache:
    room: int
    read: torch.Tensor
    given: int = 0

    def fork(self):
        return replace(self)


class RuleModel(torch.nn.Module):
    """Answers by searching the prompt: rightly, or with the last digit off in the modes of `wrong_in`."""

    device = torch.device("cpu")

    def __init__(self, wrong_in=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.config, self.wrong_in, self.prompts = RuleConfig(), wrong_in, []

    def new_cache(self, batch_size, capacity):
        return RuleCache(capacity, torch.empty(batch_size, 0, dtype=torch.long))

    def prefill(self, input_ids, attention_mask=None, cache=None, *, logits_to_keep, progress=None):
        cache.read = torch.cat([cache.read, input_ids], 1)
        if progress:
            progress(input_ids.shape[1], input_ids.shape[1])
        if isinstance(logits_to_keep, torch.Tensor):
            assert not logits_to_keep.numel()
            return None, cache
        assert logits_to_keep == 1
        assert cache.room == cache.read.shape[1] + niah.ANSWER_TOKENS
        self.prompts.append((self.config.sparse_mode, cache.read))
        return self.decode(input_ids, cache), cache

    def decode(self, input_ids, cache):
        answers = [TOKENIZER.encode(self.answer(TOKENIZER.decode(row[1:])))[1:] for row in cache.read.tolist()]
        best = [[*answer, *[TOKENIZER.eos_token_id] * 20][cache.given] for answer in answers]
        cache.given += 1
        return torch.nn.functional.one_hot(torch.tensor(best), 259)[:, None].float()

    def answer(self, prompt: str) -> str:
        city = re.search(r"What is the special magic (.+?) number\?", prompt[prompt.rindex("What is") :]).group(1)
        number = re.search(f"magic {city} number is: (\\d{{5}})\\.", prompt)
        if number is None:  # the warm-up sees the end of a prompt only
            return "none."
        last = int(number.group(1)[-1])
        return number.group(1)[:4] + str((last + (self.config.sparse_mode in self.wrong_in)) % 10) + "."

    def asked(self) -> list[tuple[str, int, int]]:
        """(mode, prompts, tokens) of every batch but the warm-up's."""
        return [(mode, *ids.shape) for mode, ids in self.prompts if ids.shape[1] > 256]


def run(model, output, **changes):
    options = {"lengths": [500, 700], "depths": [0, 0.5, 1], "trials": 2, "output": output}
    return niah.evaluate(model, TOKENIZER, changes.pop("background", TEXT), **(options | changes))


def tiny_model(**changes) -> DiffV2YocoForCausalLM:
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 64, "sparse_block_n": 32}
    torch.manual_seed(0)
    return DiffV2YocoForCausalLM(DiffV2YocoConfig(**(sizes | heads | changes), pad_token_id=0)).eval()


def cell_prompts(**changes):
    options = {"context_tokens": 900, "depth": 0.5, "needles": 1, "trials": 3, "seed": 0}
    return niah.cell_prompts(TOKENIZER, TEXT, **(options | changes))


# Prompts


@pytest.mark.parametrize("needles", [1, 2, 4, 8])
def test_prompts_hide_the_number_that_they_ask_for(needles):
    prompts = cell_prompts(needles=needles, context_tokens=1200)
    assert prompts.input_ids.shape == (3, 1200)
    assert bool(prompts.attention_mask.all())
    for row, number in zip(prompts.input_ids.tolist(), prompts.answers):
        assert row[0] == TOKENIZER.bos_token_id
        text = TOKENIZER.decode(row[1:])
        hidden = dict(re.findall(r"The special magic ([^.]+?) number is: (\d{5})\.", text))
        assert len(hidden) == needles
        assert set(hidden) <= set(haystack.TEST_CITIES)
        city = re.search(r"What is the special magic (.+) number\? The special magic \1 number is: $", text).group(1)
        assert hidden[city] == number
        assert text.count(number) == 1


def test_the_target_stands_at_its_depth():
    for depth in (0.0, 0.5, 1.0):
        prompts = cell_prompts(depth=depth, needles=4, context_tokens=4000)
        for row, number in zip(prompts.input_ids.tolist(), prompts.answers):
            text = TOKENIZER.decode(row[1:])
            assert text.index(number) / len(text) == pytest.approx(depth, abs=0.1)


def test_prompts_depend_on_seed_length_depth_needles_and_trial_alone():
    again, more = cell_prompts(), cell_prompts(trials=5)
    assert torch.equal(again.input_ids, more.input_ids[:3])
    assert again.answers == more.answers[:3]
    assert again.digest() == cell_prompts(depth=0.5).digest()
    others = [cell_prompts(**change) for change in ({"seed": 1}, {"depth": 0.25}, {"needles": 2}, {})]
    others.append(cell_prompts(context_tokens=901))
    assert len({prompts.digest() for prompts in others}) == len(others)
    assert len({tuple(row) for row in more.input_ids.tolist()}) == 5
    assert len(set(more.answers)) == 5


def test_a_tokenizer_of_longer_tokens_gets_prompts_of_the_same_number_of_tokens():
    prompts = niah.cell_prompts(word_tokenizer(), TEXT, context_tokens=600, depth=0.5, needles=2, trials=4, seed=0)
    assert prompts.input_ids.shape == (4, 600)
    real = prompts.attention_mask.sum(1)
    assert bool((real >= 0.98 * 600).all())
    assert bool((real < 600).any())
    padding = prompts.input_ids[prompts.attention_mask == 0]
    assert bool((padding == word_tokenizer().eos_token_id).all())
    assert bool((prompts.attention_mask.diff(dim=1) >= 0).all())  # padding stands on the left
    for row, mask, number in zip(prompts.input_ids, prompts.attention_mask, prompts.answers):
        assert number in word_tokenizer().decode(row[mask.bool()])


def word_tokenizer():
    """A byte-level BPE with a few hundred merges: about two bytes a token, no `<bos>`, no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


# Records


def test_a_model_that_answers_right_scores_one_and_a_wrong_one_zero(tmp_path):
    model = RuleModel(wrong_in=("per_class",))
    records = run(model, tmp_path, needles=[1, 3])
    assert len(records) == 3 * 2 * 2 * 3
    assert all(set(record) == FIELDS for record in records)
    for record in records:
        assert record["accuracy"] == (0.0 if record["mode"] == "per_class" else 1.0)
        assert record["correct"] == record["accuracy"] * record["trials"]
        assert record["prefill_s"] > 0
        assert record["decode_ms_per_token"] > 0
    order = [(record["needles"], record["context_tokens"], record["depth"]) for record in records[:12]]
    assert order == sorted(order)
    assert [record["mode"] for record in records[::12]] == ["dense", "pair_mean", "per_class"]
    assert model.config.sparse_mode == "dense"


def test_every_mode_reads_the_same_prompts(tmp_path):
    model = RuleModel()
    run(model, tmp_path)
    by_mode = {mode: [ids for own, ids in model.prompts if own == mode and ids.shape[1] > 256] for mode in niah.MODES}
    assert len(by_mode["dense"]) == 6
    for mode in ("pair_mean", "per_class"):
        assert all(torch.equal(a, b) for a, b in zip(by_mode["dense"], by_mode[mode], strict=True))


def test_batches_divide_the_trials_and_change_nothing(tmp_path):
    whole, parts = RuleModel(), RuleModel()
    one = run(whole, tmp_path / "a", trials=5, lengths=[500], depths=[0.5], modes=["dense"])
    two = run(parts, tmp_path / "b", trials=5, lengths=[500], depths=[0.5], modes=["dense"], batch=2)
    assert whole.asked() == [("dense", 5, 500)]
    assert parts.asked() == [("dense", 2, 500), ("dense", 2, 500), ("dense", 1, 500)]
    assert one[0]["correct"] == two[0]["correct"] == 5


def test_generated_text_ends_with_the_end_of_sequence():
    rows = torch.tensor([[52, 53, TOKENIZER.eos_token_id, 54, 55]])
    assert niah_answers._texts(TOKENIZER, rows) == [TOKENIZER.decode([52, 53])]


def test_density_is_what_the_cross_decoder_reads(tmp_path):
    model = tiny_model(sparse_budget=6, sparse_noise_budget=4)
    records = run(model, tmp_path, lengths=[1000], depths=[0.5])
    density = {record["mode"]: record["density"] for record in records}
    # the question's last token stands in block 31, of which it sees 8 keys; all other blocks of 32 are whole
    signal, noise = (5 * 32 + 8) / 1000, (3 * 32 + 8) / 1000
    assert density["dense"] == 1.0
    assert density["pair_mean"] == pytest.approx(signal, rel=1e-5)
    assert density["per_class"] == pytest.approx((signal + noise) / 2, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"sparse_block_m": 16}, {"self_decoder": "gated_retention"}])
def test_modes_that_share_a_prefill_answer_as_each_alone(changes, monkeypatch):
    monkeypatch.setattr(niah_answers, "ANSWER_TOKENS", 6)
    model = tiny_model(sparse_budget=5, initializer_range=0.3, **changes)
    ids = cell_prompts(context_tokens=331, trials=2).input_ids
    together = niah.ask(model, TOKENIZER, niah.MODES, ids)
    backwards = niah.ask(model, TOKENIZER, niah.MODES[::-1], ids)
    for mode in niah.MODES:
        alone = niah.ask(model, TOKENIZER, [mode], ids)[mode]
        assert together[mode].texts == backwards[mode].texts == alone.texts == greedy(model, mode, ids)
        assert together[mode].density == backwards[mode].density == alone.density
    assert len({tuple(answers.texts) for answers in together.values()}) > 1


def greedy(model, mode, ids):
    model.config.sparse_mode = mode
    prompt = ids.shape[1]
    for _ in range(niah_answers.ANSWER_TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return niah_answers._texts(TOKENIZER, ids[:, prompt:])


def test_padding_does_not_change_the_answers():
    model = tiny_model(sparse_budget=5)
    ids = cell_prompts(context_tokens=500).input_ids
    padded = torch.cat([torch.zeros_like(ids[:, :40]), ids], 1)
    padded[0], mask = torch.cat([ids[0, :40], ids[0]]), torch.ones_like(padded)
    mask[1:, :40] = 0
    for mode, answers in niah.ask(model, TOKENIZER, niah.MODES, padded, mask).items():
        assert answers.texts[1:] == niah.ask(model, TOKENIZER, [mode], ids)[mode].texts[1:]


def test_density_weighs_every_sequence_alike():
    reads = [(torch.tensor([64]), None), (torch.tensor([64, 64, 64]), selection(blocks=[0], keys=3))]
    assert niah_answers._density(reads) == pytest.approx((1.0 + 3 * 0.5) / 4)


def selection(blocks, keys):
    indices = torch.tensor(blocks, dtype=torch.int32).expand(keys, 1, 1, 1, -1)
    counts = torch.full((keys, 1, 1, 1), len(blocks), dtype=torch.int32)
    return BlockSelection(indices, counts, block_m=1, block_n=32)


def test_progress_counts_the_tokens_that_are_left(tmp_path):
    run(RuleModel(), tmp_path, depths=[0.5])
    told = []
    run(RuleModel(), tmp_path, depths=[0.5, 1], progress=lambda *facts: told.append(facts))
    total = 2 * (500 + 700)  # trials; depth 0.5 was there, and modes share a prefill
    assert told[-1][:2] == (total, total)
    done = [facts[0] for facts in told]
    assert done == sorted(done)


def test_another_model_answers_through_generate_and_has_no_sparse_modes(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()
    options = {"lengths": [400], "depths": [0.5], "trials": 2, "output": tmp_path}
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*only 'dense'.*'pair_mean'"):
        niah.evaluate(model, word_tokenizer(), TEXT, **options)
    (record,) = niah.evaluate(model, word_tokenizer(), TEXT, modes=["dense"], **options)
    assert set(record) == FIELDS
    assert record["density"] is None
    assert record["prefill_s"] > 0
    assert record["decode_ms_per_token"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [150]}, "lengths: .* 150 tokens"),
        ({"lengths": [4090]}, "lengths: .*4096 positions, got 4090 tokens"),
        ({"lengths": [0]}, "lengths: expected at least 1, got 0"),
        ({"lengths": []}, "lengths: expected at least one, got none"),
        ({"depths": [0.5, 1.5]}, "depths: .*got 1.5"),
        ({"needles": [0]}, "needles: expected at least 1"),
        ({"needles": [400], "lengths": [4000]}, "400"),
        ({"trials": 0}, "trials: expected at least 1"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"modes": ["dense", "fast"]}, "modes: expected some of dense, pair_mean, per_class, got 'fast'"),
        ({"background": "  \n"}, "background"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(tmp_path, changes, message):
    model = RuleModel()
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path, **changes)
    assert not model.prompts


# The store of cells


def test_an_interrupted_run_continues_where_it_stopped(tmp_path):
    class Interrupted(RuleModel):
        def prefill(self, *arguments, **options):
            if len(self.asked()) == 7:
                raise KeyboardInterrupt
            return super().prefill(*arguments, **options)

    first, second, third = Interrupted(), RuleModel(), RuleModel()
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 6  # a prompt's modes are finished together
    records = run(second, tmp_path)
    assert len(records) == 18
    assert first.asked()[:6] + second.asked() == all_cells()
    assert run(third, tmp_path) == records
    assert not third.prompts


def all_cells():
    return [(mode, 2, length) for length in (500, 700) for _ in range(3) for mode in niah.MODES]


def test_a_mode_that_is_added_later_is_the_only_one_to_run(tmp_path):
    run(RuleModel(), tmp_path, modes=["dense", "per_class"])
    model = RuleModel()
    records = run(model, tmp_path)
    assert {mode for mode, *_ in model.asked()} == {"pair_mean"}
    assert len(records) == 18


def test_stale_cells_are_measured_again(tmp_path):
    def measured(model=None, **changes) -> int:
        model = model or RuleModel()
        run(model, tmp_path, **({"lengths": [500], "depths": [0.5], "modes": ["dense"]} | changes))
        return len(model.asked())

    assert measured() == 1
    assert measured() == 0
    other = RuleModel()
    other.weight.data[1] = 1e-7
    assert measured(other) == 1
    assert measured(background=TEXT[::-1]) == 1
    assert measured(seed=1) == 1
    assert measured(trials=3) == 1
    assert measured(batch=1) > 0
    assert measured() == 0
    for cell in (tmp_path / "cells").iterdir():
        cell.write_text(cell.read_text()[:-20])
    assert measured() == 1
    for cell in (tmp_path / "cells").iterdir():
        cell.write_text(cell.read_text().replace('"key": "', '"key": "0'))
    assert measured() == 1


def test_a_configuration_is_part_of_the_model_but_not_its_mode():
    model = tiny_model(sparse_budget=6)
    before = niah_cells.weights_digest(model)
    model.config.sparse_mode = "per_class"
    assert niah_cells.weights_digest(model) == before
    model.config.sparse_budget = 8
    assert niah_cells.weights_digest(model) != before


def test_other_sources_make_other_cells(tmp_path, monkeypatch):
    before = niah_cells.sources_digest()
    for name in ("kernels", "yoco"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("a = 1")
    monkeypatch.setattr(niah_cells, "__file__", str(tmp_path / "niah_cells.py"))
    digests = {before, niah_cells.sources_digest()}
    (tmp_path / "kernels" / "a.py").write_text("a = 2")
    digests.add(niah_cells.sources_digest())
    assert len(digests) == 3


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    written = []

    def fsync(file):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)

    model = RuleModel()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            run(model, tmp_path)
    cells = list((tmp_path / "cells").iterdir())
    assert len(cells) == 4
    assert all(json.loads(cell.read_text())["record"]["accuracy"] == 1.0 for cell in cells)
    again = RuleModel()
    run(again, tmp_path)
    assert len(again.asked()) == 18 - 4  # of the second prompt, dense was written


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    niah_cells.write_atomically(path, b"old")

    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="broken"):
        niah_cells.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# The report


def records_of(accuracy, modes=niah.MODES, needles=(1,)):
    return [
        {
            **{"mode": mode, "context_tokens": length, "depth": depth, "needles": count, "trials": 4},
            **{"correct": int(4 * accuracy), "accuracy": accuracy, "density": None, "prefill_s": 1.0},
            "decode_ms_per_token": 2.5,
        }
        for mode in modes
        for count in needles
        for length in (1024, 2048, 4096)
        for depth in (0.0, 0.5, 1.0)
    ]


def near(picture, colour):
    """Which pixels have a colour "#rrggbb"."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (abs(picture[..., :3] - wanted) < 0.03).all(-1)


def runs(line, least_gap):
    """How many groups of true entries lie at least `least_gap` apart."""
    places = np.flatnonzero(line)
    return 0 if not len(places) else 1 + int((np.diff(places) > least_gap).sum())


@pytest.mark.parametrize("modes", [("dense",), ("dense", "per_class"), niah.MODES])
@pytest.mark.parametrize("needles", [(1,), (1, 8)])
def test_the_heat_map_has_a_panel_for_each_mode_and_number_of_needles(tmp_path, modes, needles):
    path = tmp_path / "heatmap.png"
    niah_report.write_heatmap(path, records_of(1.0, modes, needles))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    green = near(matplotlib.image.imread(path), niah_report.COLOURS[2])
    green[:, green.sum(0) < 0.3 * green.sum(0).max()] = False  # the colour bar's top
    green[green.sum(1) < 0.3 * green.sum(1).max()] = False
    assert runs(green.any(0), 8) == len(modes)
    assert runs(green.any(1), 8) == len(needles)


def test_the_heat_map_shows_depth_downwards_and_length_to_the_right(tmp_path):
    records = records_of(1.0, ["dense"])
    for record in records:
        if (record["depth"], record["context_tokens"]) == (1.0, 1024):
            record["accuracy"] = 0.0
    niah_report.write_heatmap(tmp_path / "heatmap.png", records)
    picture = matplotlib.image.imread(tmp_path / "heatmap.png")
    red, green = (np.argwhere(near(picture, niah_report.COLOURS[i])) for i in (0, 2))
    panel = red[red[:, 1] < green[:, 1].mean()]
    assert panel[:, 0].mean() > green[:, 0].mean()
    assert len(panel) * 6 < len(green)


def test_results_hold_the_environment_and_the_records(tmp_path):
    records = records_of(0.5)
    environment = stamp(torch.device("cpu"), checkpoint="a", seed=3)
    results, heatmap = niah_report.write_results(tmp_path, records, environment)
    kept = json.loads(results.read_text())
    assert kept == {"environment": environment, "records": records}
    assert {"date", "commit", "versions", "cpu", "threads", "gpu", "checkpoint", "seed"} <= set(environment)
    assert environment["versions"]["torch"] == torch.__version__
    assert heatmap.exists()


def test_the_table_shows_accuracy_by_length_and_the_price_at_the_longest():
    from rich.console import Console

    records = records_of(0.25, ["pair_mean"])
    for record in records:
        if record["context_tokens"] == 4096:
            record.update(accuracy=1.0, density=0.125, prefill_s=3.5, decode_ms_per_token=0.75)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(niah_report.table(records))
    row = next(line for line in console.export_text().splitlines() if "pair_mean" in line)
    assert row.split() == ["pair_mean", "0.25", "0.25", "1.00", "0.50", "0.12", "3.5", "0.75"]


def test_lengths_are_named_in_k():
    assert [niah_report.context_name(n) for n in (500, 1000, 1024, 1536, 131072)] == [
        *("500", "1000", "1K", "1.5K", "128K")
    ]
