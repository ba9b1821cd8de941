"""Training: the data is sound and held out, an interrupted training equals one in a single go, and it learns."""

import dataclasses
import json
import random

import pytest
import torch

pytest.importorskip("transformers")
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffv2_sparse import curriculum, train
from diffv2_sparse.curriculum import MODES, LessonBatches, Phase, draw_lesson, invent_city, training_corpus
from diffv2_sparse.haystack import TEST_CITIES, documentation
from diffv2_sparse.tokenizer import BOS, FIRST_BYTE
from diffv2_sparse.train import BUNDLED_RECIPE, TrainRecipe

RECIPE = TrainRecipe(
    model={
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 32,
        "sparse_block_n": 16,
        "sparse_budget": 8,
    },
    phases=(Phase(steps=2, lengths=(256,)), Phase(steps=3, lengths=(256, 320), modes=MODES, sparse_budget=4)),
    trainer={
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "use_cpu": True,
        "logging_steps": 1,
        "save_steps": 100,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    },
    tokens_per_batch=768,
    save_dtype="float32",
    seed=7,
)


def rows_of(batch):
    return [bytes((row[1:] - FIRST_BYTE).tolist()) for row in batch["input_ids"]]


@pytest.mark.parametrize("length", [256, 300, 1024, 4096])
def test_every_answer_is_known_from_the_text_before_it(length):
    batches = LessonBatches((Phase(steps=40, lengths=(length,), needle_share=0.8),), 4096, seed=1)
    for i in range(12):
        batch = batches[i]
        assert batch["input_ids"].shape == (4096 // length, length)
        assert (batch["input_ids"][:, 0] == BOS).all()
        rows = rows_of(batch)
        assert set(batch["answers"][:, 0].tolist()) == set(range(len(rows)))
        for row, position in batch["answers"].tolist():
            text = rows[row].decode("latin-1")
            before, answer = text[: position - 1], text[position - 1 : position + 4]  # token 0 is <bos>
            asked = before[before.rindex("The special magic ") :]
            assert asked.endswith(" number is: ")
            assert f"{asked}{answer}." in before
            assert before.count(asked) == before.count(asked + answer) + 1  # one city, one number
        assert all(row.decode("latin-1")[:-6].endswith(" number is: ") for row in rows)  # the end asks


def test_batches_depend_on_seed_and_index_alone():
    phases = RECIPE.phases
    one, two, other = (LessonBatches(phases, 768, seed) for seed in (3, 3, 4))
    backwards = {i: two[i]["input_ids"] for i in reversed(range(5))}
    for i in range(5):
        assert torch.equal(one[i]["input_ids"], backwards[i])
        assert not torch.equal(one[i]["input_ids"][0], other[i]["input_ids"][0, : one[i]["input_ids"].shape[1]])
    assert len(one) == 5


def test_batches_of_one_step_share_its_length():
    phases = (Phase(steps=20, lengths=(256, 512)),)
    batches = LessonBatches(phases, 512, seed=0, batches_per_step=3)
    lengths = [batches[i]["input_ids"].shape[1] for i in range(60)]
    assert lengths == [draw_lesson(phases, 0, i // 3).length for i in range(60)]
    assert set(lengths) == {256, 512}


def test_test_split_is_never_trained_on():
    trained = {line.strip() for text in training_corpus().values() for line in text.decode().split("\n")}
    held_out = [line.strip() for line in documentation("test").split("\n")]
    assert not [line for line in held_out if len(line) >= 60 and line in trained]

    batches = LessonBatches((Phase(steps=30, lengths=(1024,), needle_share=0.9),), 8192, seed=5)
    text = b"\n".join(row for i in range(30) for row in rows_of(batches[i])).decode("latin-1")
    assert text.count("number is: ") > 2000
    assert not [city for city in TEST_CITIES if f"magic {city} number" in text]


def test_invented_cities():
    rng = random.Random(0)
    cities = [invent_city(rng) for _ in range(2000)]
    assert len(set(cities)) > 1500
    assert all(3 <= len(city) <= 18 and city == city.title() for city in cities)
    assert not set(cities) & set(TEST_CITIES)
    assert {len(city.split()) for city in cities} == {1, 2, 3}


def test_invented_cities_are_never_test_cities(monkeypatch):
    cities = [invent_city(random.Random(seed)) for seed in range(50)]
    monkeypatch.setattr(curriculum, "TEST_CITIES", tuple(cities[:25]))
    assert not {invent_city(random.Random(seed)) for seed in range(50)} & set(cities[:25])
    monkeypatch.setattr(curriculum, "invent_city", lambda rng: "Abc")
    monkeypatch.setattr(curriculum, "TEST_CITIES", ("Rombc", "Roma", "Ome"))
    siblings = [curriculum._sibling("Rome", random.Random(seed)) for seed in range(300)]
    assert not {"Rombc", "Roma", "Ome"} & set(siblings)
    assert len(set(siblings)) > 4


def finish(recipe, output, **options):
    """Calls `train` until it is done; returns the final folder and the number of calls."""
    for calls in range(1, 20):
        folder = train.train(recipe, output, **options)
        if folder.name == "final":
            return folder, calls
        assert folder.parent == output
        assert folder.name == f"checkpoint-{calls}"
    raise AssertionError("no end")


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_slices_equal_one_go(tmp_path):
    whole, _ = finish(RECIPE, tmp_path / "whole")
    sliced, calls = finish(RECIPE, tmp_path / "sliced", max_minutes=0.0)  # a step each
    assert calls == RECIPE.steps
    left, right = weights(whole), weights(sliced)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    other, _ = finish(dataclasses.replace(RECIPE, seed=8), tmp_path / "other")
    assert not all(torch.equal(left[name], tensor) for name, tensor in weights(other).items())

    assert [path.name for path in (tmp_path / "sliced").glob("checkpoint-*")] == ["checkpoint-5"]
    for folder in (sliced, tmp_path / "sliced" / "checkpoint-5"):  # not the last step's mode and budget
        config = json.loads((folder / "config.json").read_text())
        assert (config["sparse_mode"], config["sparse_budget"], config["dtype"]) == ("dense", 8, "float32")
    assert (sliced / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(sliced)("a").input_ids == [BOS, FIRST_BYTE + ord("a")]


def test_each_step_trains_in_its_mode_and_budget(tmp_path, monkeypatch):
    seen = []
    forward = train.DiffV2YocoForCausalLM.forward

    def spy(self, *args, **kwargs):
        seen.append((kwargs["input_ids"].shape[1], self.config.sparse_mode, self.config.sparse_budget, self.training))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(train.DiffV2YocoForCausalLM, "forward", spy)
    recipe = dataclasses.replace(
        RECIPE,
        phases=(Phase(steps=1, lengths=(256,)), Phase(steps=8, lengths=(256, 320), modes=MODES, sparse_budget=4)),
        trainer=RECIPE.trainer | {"gradient_accumulation_steps": 2},
        tokens_per_batch=320,
    )
    folder = train.train(recipe, tmp_path)
    lessons = [recipe.lesson(step) for step in range(9) for _ in range(2)]
    assert seen == [(x.length, x.mode, x.sparse_budget or 8, True) for x in lessons]
    assert {mode for _, mode, _, _ in seen} == set(MODES)

    log = json.loads((folder.parent / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["length"] for entry in steps] == [recipe.lesson(step).length for step in range(9)]
    for step, entry in enumerate(steps):
        assert 0 <= entry[f"right_{recipe.lesson(step).mode}"] <= 1
        assert entry["tokens_per_s"] > 0
        assert entry["loss"] == pytest.approx(
            entry["text_loss"] + recipe.answer_weight * entry["answer_loss"], abs=1e-3
        )
        assert entry["text_loss"] == pytest.approx(5.56, abs=0.5)  # log 259: untrained, not summed over micro-batches


def test_loss_and_accuracy_of_known_logits():
    """A model that copies the answers out of the batch has no loss on them and is always right."""
    batch = LessonBatches(RECIPE.phases, 768, seed=2)[0]
    ids, (rows, starts) = batch["input_ids"], batch["answers"].T

    class Oracle(torch.nn.Module):
        wrong = 0

        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 259)
            for row, start in list(zip(rows.tolist(), starts.tolist()))[self.wrong :]:
                for digit in range(5):
                    logits[row, start + digit - 1, input_ids[row, start + digit]] = 100.0
            return type("Output", (), {"logits": logits})

    trainer = train.NeedleTrainer.__new__(train.NeedleTrainer)
    trainer.recipe, trainer.args, trainer._tally = RECIPE, type("Args", (), {"world_size": 1}), train._Tally()
    trainer.state = type("State", (), {"global_step": 0})
    answers = len(rows)
    uniform = float(torch.tensor(259.0).log())
    text_loss = uniform * (1 - 5 * answers / (ids.numel() - ids.shape[0]))
    assert float(trainer.compute_loss(Oracle(), batch)) == pytest.approx(text_loss, rel=1e-4)
    assert trainer._tally.read()["right_dense"] == 1.0
    oracle = Oracle()
    oracle.wrong = 1
    assert float(trainer.compute_loss(oracle, batch)) == pytest.approx(
        text_loss + uniform * 5 / (ids.numel() - ids.shape[0]) + uniform / answers, rel=1e-4
    )
    assert trainer._tally.read()["right_dense"] == pytest.approx(1 - 1 / answers, abs=1e-4)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    output = tmp_path / "run"
    folder = train.train(RECIPE, output, max_minutes=0.0)
    with pytest.raises(ValueError, match=r"seed: expected that of the checkpoints .* 7, got 8"):
        train.train(dataclasses.replace(RECIPE, seed=8), output)
    for name, value in (("tokens_per_batch", 1024), ("answer_weight", 2.0)):
        with pytest.raises(ValueError, match=rf"{name}: expected that of the checkpoints .*, got {value}"):
            train.train(dataclasses.replace(RECIPE, **{name: value}), output)
    other = (Phase(steps=2, lengths=(320,)), RECIPE.phases[1])
    with pytest.raises(ValueError, match=r"phases: expected those of the checkpoints .* for the 1 steps already run"):
        train.train(dataclasses.replace(RECIPE, phases=other), output)
    with pytest.raises(ValueError, match="expected a folder without checkpoints"):
        train.train(RECIPE, output, resume=False)
    (output / "checkpoint-4").mkdir()  # cut short while it was written: no state file
    assert train._latest_checkpoint(output) == folder


def test_steps_to_come_may_change(tmp_path):
    train.train(RECIPE, tmp_path, max_minutes=0.0)
    longer = dataclasses.replace(RECIPE, phases=(Phase(steps=1, lengths=(256,)), Phase(steps=1, lengths=(320,))))
    train.train(longer, tmp_path)
    assert (tmp_path / "checkpoint-2").exists()
    shorter = dataclasses.replace(RECIPE, phases=(Phase(steps=1, lengths=(256,)),))
    with pytest.raises(ValueError, match=r"phases: .* for the 2 steps already run"):
        train.train(shorter, tmp_path)


def test_unknown_model_keys_list_the_models_own():
    with pytest.raises(ValueError, match="model: expected keys") as refused:
        dataclasses.replace(RECIPE, model={"hidden": 1})
    assert "'hidden_size'" in str(refused.value)
    assert "transformers_version" not in str(refused.value)
    assert "id2label" not in str(refused.value)


def test_bundled_recipe_is_sound():
    recipe = TrainRecipe.from_yaml()
    assert recipe.steps == sum(phase.steps for phase in recipe.phases)
    assert {mode for phase in recipe.phases for mode in phase.modes} == set(MODES)
    assert max(length for phase in recipe.phases for length in phase.lengths) == 8192
    with torch.device("meta"):
        model = train.DiffV2YocoForCausalLM(train.DiffV2YocoConfig(**recipe.model))
    assert 2 * model.num_parameters() < 15.5e6  # bytes in bfloat16; the bundle's limit is 16 MB
    density = recipe.model["sparse_budget"] * recipe.model["sparse_block_n"] / 8192
    assert density <= 0.25


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ((), {"learning_rate": 1}, r"recipe: expected keys among .* got \['learning_rate'\]"),
        (("model",), {"hidden": 1}, r"model: expected keys among .* got \['hidden'\]"),
        (("trainer",), {"lr": 1}, r"trainer: expected keys among .* got \['lr'\]"),
        (("trainer",), {"max_steps": 1}, r"trainer: .* got \['max_steps'\]"),
        (("phases", 0), {"length": 1}, r"phases\[0\]: .* got \['length'\]"),
        (("phases", 0), {"steps": "x"}, r"phases\[0\].steps: expected int, got 'x'"),
        (("phases", 0), {"steps": True}, r"phases\[0\].steps: expected int, got True"),
        (("phases", 0), {"lengths": ["256"]}, r"phases\[0\].lengths: expected tuple\[int, ...\], got \['256'\]"),
        (("phases", 0), {"lengths": 256}, r"phases\[0\].lengths: expected tuple\[int, ...\], got 256"),
        (("phases", 0), {"modes": "dense"}, r"phases\[0\].modes: expected tuple\[str, ...\], got 'dense'"),
        (("phases", 0), {"needle_share": "half"}, r"phases\[0\].needle_share: expected float, got 'half'"),
        (("phases", 0), {"sparse_budget": "x"}, r"phases\[0\].sparse_budget: expected int \| None, got 'x'"),
        ((), {"phases": [1]}, r"phases: expected a list of mappings, got \[1\]"),
        ((), {"phases": 3}, "phases: expected a list of mappings, got 3"),
        ((), {"phases": [{"steps": 1}]}, r"phases\[0\].lengths: expected, got none"),
        ((), {"model": 3}, "model: expected dict, got 3"),
        ((), {"trainer": None}, "trainer: expected dict, got None"),
        ((), {"tokens_per_batch": "abc"}, "tokens_per_batch: expected int, got 'abc'"),
        ((), {"answer_weight": "abc"}, "answer_weight: expected float, got 'abc'"),
        ((), {"seed": 1.5}, "seed: expected int, got 1.5"),
        (("model",), {"vocab_size": 258}, "vocab_size: expected at least the tokenizer's 259, got 258"),
        (("model",), {"hidden_size": "wide"}, "hidden_size: expected an int"),
        (("phases", 0), {"modes": ["sparse"]}, "modes: expected some of"),
        (("phases", 0), {"lengths": [64]}, "lengths: expected .* >= 256"),
        (("phases", 0), {"needle_share": 1.5}, "needle_share: expected a number between 0 and 1, got 1.5"),
        (("phases", 0), {"steps": 0}, "steps: expected at least 1, got 0"),
        ((), {"save_dtype": "int8"}, "save_dtype: expected one of"),
        ((), {"phases": []}, "phases: expected at least one"),
    ],
)
def test_bad_recipes(tmp_path, where, change, message):
    content = yaml.safe_load(BUNDLED_RECIPE.read_text())
    place = content
    for key in where:
        place = place[key]
    place.update(change)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        TrainRecipe.from_yaml(tmp_path / "recipe.yaml")


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere"):
        TrainRecipe.from_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken.yaml is not YAML"):
        TrainRecipe.from_yaml(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping"):
        TrainRecipe.from_yaml(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="tokens_per_batch: expected at least the longest sequence, 512"):
        LessonBatches((Phase(steps=1, lengths=(512,)),), 256, seed=0)
