"""The command line, end to end over a tiny checkpoint: what it prints and writes, and how it fails."""

import errno
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffv2_sparse import cli, continuation, niah, train
from diffv2_sparse.tokenizer import byte_tokenizer
from diffv2_sparse.yoco import DiffV2YocoConfig, DiffV2YocoForCausalLM

NIAH = ("niah", "--lengths", "400", "--depths", "0,1", "--trials", "1")  # two prompts, six cells


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 64, "sparse_block_n": 32}
    config = DiffV2YocoConfig(**sizes, **heads, sparse_budget=6, max_position_embeddings=2048, pad_token_id=0)
    DiffV2YocoForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def says_one_line(result, pattern, code=1):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("diffv2-sparse: ")
    assert re.search(pattern, lines[0]), lines[0]
    assert "Traceback" not in result.output


# niah


def test_niah_measures_prints_and_writes(checkpoint, tmp_path):
    result = run(*NIAH, "--model", checkpoint, "--output", tmp_path / "out", "--needles", "1,2")
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(kept["records"]) == 12
    assert {record["mode"] for record in kept["records"]} == {"dense", "pair_mean", "per_class"}
    for record in kept["records"]:
        assert record["density"] == 1 if record["mode"] == "dense" else 0 < record["density"] < 1
    assert kept["environment"]["checkpoint"] == str(checkpoint)
    assert kept["environment"]["seed"] == 0
    for said in ("pair_mean", "results.json", "heatmap.png"):
        assert said in result.stdout
    assert (tmp_path / "out" / "heatmap.png").exists()
    assert not result.stderr


def test_niah_takes_a_haystack_a_budget_and_lengths_in_k(checkpoint, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("Much text about nothing. " * 500)
    options = ("--haystack", tmp_path / "books", "--budget", "4", "--modes", "pair_mean", "--lengths", "1K")
    result = run("niah", *options, "--depths", "0.5", "--trials", "1", "--model", checkpoint, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["environment"]["haystack"] == str(tmp_path / "books")
    (record,) = kept["records"]
    assert record["context_tokens"] == 1024
    assert record["density"] == pytest.approx(4 * 32 / 1024)
    assert kept["environment"]["sparse_share_layers"] == 1


def test_niah_lets_layers_share_their_choice(checkpoint, tmp_path):
    options = ("--lengths", "400", "--depths", "0", "--trials", "1", "--modes", "pair_mean", "--model", checkpoint)
    assert run("niah", *options, "--share-layers", "2", "--output", tmp_path).exit_code == 0
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["environment"]["sparse_share_layers"] == 2
    assert run("niah", *options, "--output", tmp_path).exit_code == 0  # another configuration: measured anew
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_niah_passes_every_option_on(checkpoint, tmp_path, monkeypatch):
    told = {}

    def evaluate(model, tokenizer, background, **options):
        told.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(niah, "evaluate", evaluate)
    numbers = ("--lengths", "1000, 2K", "--depths", "0,.5", "--needles", "1,8", "--trials", "3", "--batch", "2")
    run("niah", *numbers, "--modes", "dense, per_class", "--seed", "7", "--model", checkpoint, "--output", tmp_path)
    assert callable(told.pop("progress"))
    assert told == {
        **{"lengths": [1000, 2048], "depths": [0.0, 0.5], "needles": [1, 8], "trials": 3, "batch": 2},
        **{"modes": ["dense", "per_class"], "seed": 7, "output": tmp_path},
    }


@pytest.mark.parametrize(
    ("error", "pattern", "code"),
    [
        (KeyboardInterrupt(), r"interrupted.*kept in .*cells.*same command", 130),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), r"disk is full: /x/y.*kept in .*cells", 1),
        (torch.OutOfMemoryError("CUDA out of memory"), r"memory is full.*--batch 1.*kept in .*cells", 1),
    ],
)
def test_niah_that_was_cut_short_keeps_its_cells_and_continues(checkpoint, tmp_path, monkeypatch, error, pattern, code):
    measure, measured = niah.measure, []

    def counted(model, tokenizer, modes, prompts, **options):
        if stop_after == len(measured):
            raise error
        measured.append((*modes, prompts.digest()))
        return measure(model, tokenizer, modes, prompts, **options)

    monkeypatch.setattr(niah, "measure", counted)
    command = (*NIAH, "--model", checkpoint, "--output", tmp_path)
    stop_after = 1
    says_one_line(run(*command), pattern, code)
    assert len(list((tmp_path / "cells").iterdir())) == 3
    assert not (tmp_path / "results.json").exists()
    stop_after = None
    assert run(*command).exit_code == 0
    assert len(measured) == len(set(measured)) == 2
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 6


def test_a_disk_that_fills_up_under_the_results_is_one_line_too(checkpoint, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("results.json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    command = (*NIAH, "--model", checkpoint, "--output", tmp_path)
    says_one_line(run(*command), "disk is full: .*results.json")
    assert len(list((tmp_path / "cells").iterdir())) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--lengths", "100"), "lengths: .*100 tokens"),
        (("--lengths", "400,4K"), "lengths: .*2048 positions, got 4096 tokens"),
        (("--lengths", "abc"), "--lengths: expected numbers such as 1024,8192 or 1K,8K, got 'abc'"),
        (("--lengths", "0.3K"), "--lengths: expected numbers"),
        (("--lengths", "infK"), "--lengths: expected numbers"),
        (("--depths", "0,2"), "depths: .*got 2"),
        (("--depths", "nan"), "depths: .*got nan"),
        (("--modes", "dense,fast"), "modes: expected some of dense, pair_mean, per_class, got 'fast'"),
        (("--haystack", "/nowhere/books"), "/nowhere/books"),
        (("--model", "/nowhere/model"), "--model: found nothing at /nowhere/model"),
        (("--model", "runs/deep/model"), "--model: found nothing at runs/deep/model"),
        (("--budget", "1"), "budget: expected at least"),
        (("--share-layers", "0"), "sparse_share_layers: expected an int ≥ 1, got 0"),
        (("--device", "teapot"), "--device: cannot use 'teapot'"),
        (("--output", "/dev/null/out"), "/dev/null/out"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(checkpoint, tmp_path, options, pattern):
    defaults = {"--model": checkpoint, "--output": tmp_path, "--lengths": "400"}
    rest = [part for name, value in defaults.items() if name not in options for part in (name, value)]
    says_one_line(run("niah", *options, *rest), pattern)


# Checkpoints


def test_a_model_that_is_neither_here_nor_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(self, name, timeout):
        raise ConnectionError(f"cannot reach the hub for {name}\nand more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    says_one_line(run("generate", "--prompt", "a", "--model", "some/llama"), "some/llama.*cannot reach the hub")


def damaged(checkpoint, tmp_path, name, content):
    """A copy of the checkpoint in which one file is other, or missing when content is None."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "unheard_of"}'),
        ("model.safetensors", b"\x10\x00"),
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("tokenizer.json", b"[]"),
    ],
)
def test_an_unreadable_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, name, content):
    model = damaged(checkpoint, tmp_path, name, content)
    says_one_line(run("generate", "--prompt", "a", "--model", model), "--model: cannot read the checkpoint")


def test_a_folder_without_a_checkpoint(tmp_path):
    says_one_line(run("generate", "--prompt", "a", "--model", tmp_path), "expected a checkpoint .*config.json")


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, tmp_path):
    model = damaged(checkpoint, tmp_path, "model.safetensors", b"")
    weights = load_file(checkpoint / "model.safetensors")
    lost = next(name for name in weights if name.endswith("lambda_proj.weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, model / "model.safetensors", {"format": "pt"})
    says_one_line(run("generate", "--prompt", "a", "--model", model), f"lacks weights, 1 in all: {lost}")


def test_pickled_weights_are_never_loaded(checkpoint, tmp_path):
    model = damaged(checkpoint, tmp_path, "model.safetensors", None)
    torch.save(load_file(checkpoint / "model.safetensors"), model / "pytorch_model.bin")
    says_one_line(run("generate", "--prompt", "a", "--model", model), "--model: cannot read the checkpoint")


# generate


def loaded(checkpoint):
    return DiffV2YocoForCausalLM.from_pretrained(checkpoint).eval(), byte_tokenizer()


@pytest.mark.parametrize("mode", ["dense", "pair_mean", "per_class"])
def test_generate_prints_the_greedy_continuation(checkpoint, mode):
    prompt = "Once upon a time there was a needle. " * 20
    result = run("generate", "--prompt", prompt, "--mode", mode, "--max-new-tokens", "12", "--model", checkpoint)
    assert result.exit_code == 0, result.output
    model, tokenizer = loaded(checkpoint)
    model.config.sparse_mode = mode
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    new = ids[0, -12:].tolist()
    assert tokenizer.eos_token_id not in new
    assert result.stdout_bytes.decode() == tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_generate_reads_a_file_and_draws_by_seed(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("To be continued: ")
    command = ("generate", "--file", tmp_path / "text.txt", "--temperature", "1", "--model", checkpoint)
    said = [run(*command, "--max-new-tokens", "30", "--seed", seed).stdout_bytes for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_a_low_temperature_is_greedy(checkpoint):
    command = ("generate", "--prompt", "To be continued: ", "--model", checkpoint, "--max-new-tokens", "20")
    assert run(*command, "--temperature", "0.0001").stdout_bytes == run(*command).stdout_bytes


class Scripted(torch.nn.Module):
    """Says the same bytes whatever it reads."""

    device = torch.device("cpu")

    def __init__(self, text: bytes, end: int):
        super().__init__()
        self.config = DiffV2YocoConfig(vocab_size=259, hidden_size=32, num_attention_heads=2)
        self.script = [byte + 3 for byte in text] + [end, 68]

    def new_cache(self, batch_size, capacity):
        return iter(self.script)

    def prefill(self, input_ids, cache=None, **_):
        return self.decode(input_ids, cache), cache

    def decode(self, input_ids, cache):
        return torch.nn.functional.one_hot(torch.tensor([[next(cache)]]), 259).float()


def test_a_continuation_comes_in_whole_characters_and_ends_at_the_end_of_sequence():
    tokenizer = byte_tokenizer()
    text = "naïve – 東京"
    pieces = list(continuation.stream(Scripted(text.encode(), tokenizer.eos_token_id), tokenizer, "?"))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ((), "expected one of --prompt TEXT and --file FILE"),
        (("--prompt", "a", "--file", "b"), "expected one of"),
        (("--file", "/nowhere/text"), "/nowhere/text"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens: expected at least 1, got 0"),
        (("--prompt", "a", "--max-new-tokens", "3000"), "2048 positions"),
        (("--prompt", "a", "--temperature", "-1"), "temperature: expected 0 or more and finite, got -1"),
        (("--prompt", "a", "--temperature", "nan"), "temperature: expected 0 or more and finite, got nan"),
        (("--prompt", "a", "--mode", "fast"), "mode.* got 'fast'"),
    ],
)
def test_generate_refuses_in_one_line(checkpoint, options, pattern):
    says_one_line(run("generate", *options, "--model", checkpoint), pattern)


def test_generate_refuses_a_file_that_is_no_text(checkpoint, tmp_path):
    (tmp_path / "picture").write_bytes(b"abc\xff\xfe")
    says_one_line(run("generate", "--file", tmp_path / "picture", "--model", checkpoint), "UTF-8 text in .*picture.* 3")


# train


def test_train_runs_a_recipe_and_says_where_it_stopped(tmp_path, monkeypatch):
    calls = []

    def trained(recipe, output, *, max_minutes):
        calls.append((recipe, output, max_minutes))
        return output / ("checkpoint-5" if max_minutes else "final")

    monkeypatch.setattr(train, "train", trained)
    result = run("train", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "final") in result.stdout
    result = run("train", "--output", tmp_path, "--max-minutes", "9")
    assert "checkpoint-5" in result.stdout
    assert "continues" in result.stdout
    assert calls == [(train.TrainRecipe.from_yaml(), tmp_path, None), (train.TrainRecipe.from_yaml(), tmp_path, 9.0)]


@pytest.mark.parametrize(
    ("error", "pattern", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full", 1),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "disk full", 1),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied: /x", 1),
    ],
)
def test_train_that_was_cut_short_says_so_in_one_line(tmp_path, monkeypatch, error, pattern, code):
    def trained(*_, **__):
        raise error

    monkeypatch.setattr(train, "train", trained)
    says_one_line(run("train", "--output", tmp_path), pattern, code)


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    def trained(*_, **__):
        raise RuntimeError("shapes disagree")

    monkeypatch.setattr(train, "train", trained)
    assert isinstance(run("train", "--output", tmp_path).exception, RuntimeError)


@pytest.mark.parametrize("content", [None, "model: [", "phases: []"])
def test_train_refuses_a_bad_recipe_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    says_one_line(run("train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path), "recipe")


# help


def test_help_names_the_commands_and_shows_examples():
    assert all(command in run("--help").stdout for command in ("niah", "train", "generate"))
    for command in ("niah", "train", "generate"):
        said = run(command, "--help").stdout
        assert "Examples" in said
        assert f"diffv2-sparse {command}" in said
