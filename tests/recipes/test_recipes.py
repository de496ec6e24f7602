"""Recipes: what file and flags mean, what is wrong with one, how rows are laid out and encoded."""

import json
import warnings
from pathlib import Path

import pytest
import recipe_files as files
import yaml

pytest.importorskip("datasets")

from grass_hf import GrassConfig
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.recipes.parse import load_recipe

ROOT = Path(__file__).parents[2]


# -- file and flags ----------------------------------------------------------------------------------------------


def test_flags_replace_what_the_file_says(tmp_path):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    flags = (
        "--learning_rate 3e-4 --grass.seed 7 --rank 4 --selection=uniform --target_modules q_proj;v_proj --max-steps 9"
    )
    recipe = load_recipe(path, [*flags.split(), "--prompts", "one", "two words", "--tokenizer_name", "somewhere"])
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (3e-4, 9)
    assert (
        recipe.grass.to_dict() | {"rank": 4, "density": None, "seed": 7, "selection": "uniform"}
        == recipe.grass.to_dict()
    )
    assert recipe.grass.target_modules == ("q_proj", "v_proj")
    assert recipe.evaluation.prompts == ["one", "two words"]
    assert (recipe.model.tokenizer_name, recipe.model.tokenizer_vocab_size) == ("somewhere", None)
    assert load_recipe(path, grass=False).grass is None
    assert load_recipe(path, ["--target_modules", ".*mlp.*"]).grass.target_modules == ".*mlp.*"
    preset = load_recipe(path, ["--preset", "max_memory", "--side", "input"]).grass
    assert not preset.resident and preset.side == "input"
    assert load_recipe(path, ["--prompts", "null"]).evaluation.prompts in (None, [])


def test_the_section_grass_may_name_the_base_optimizer(tmp_path):
    said = files.pretraining(tmp_path)
    said["grass"] = {"preset": "muon", "update_interval": 5}
    path = files.write(tmp_path, said)
    recipe = load_recipe(path)
    assert recipe.base == "muon"
    assert recipe.grass == parse_optim_args("preset=muon,update_interval=5").config
    assert load_recipe(path, ["--base", "sgd"]).base == "sgd"
    for plain in (load_recipe(path, ["--base", "null", "--preset", "null"]), load_recipe(path, grass=False)):
        assert plain.base == plain.training.optim


def test_the_section_grass_may_give_layers_densities_of_their_own(tmp_path):
    said = files.pretraining(tmp_path)
    said["grass"] = {"density": 0.25, "density_pattern": {"[qk]_proj": 0.5, "o_proj": 1}}
    path = files.write(tmp_path, said)
    recipe = load_recipe(path)
    assert recipe.grass == GrassConfig(density=0.25, density_pattern={"[qk]_proj": 0.5, "o_proj": 1})
    assert "density 0.25, 0.5 of [qk]_proj, 1 of o_proj" in recipe.method
    changed = load_recipe(path, ["--density_pattern", "v_proj:0.5;o_proj:0.75"]).grass
    assert changed.density_pattern == {"v_proj": 0.5, "o_proj": 0.75}
    assert load_recipe(path, ["--density_pattern", "null"]).grass == GrassConfig(density=0.25)
    said["grass"]["density_pattern"] = {"o_proj": "much"}
    with pytest.raises(ValueError, match=r"grass: density_pattern\['o_proj'\]='much' is a str"):
        load_recipe(files.write(tmp_path, said))


def test_yaml_values_have_the_types_of_the_fields(tmp_path):
    said = files.pretraining(tmp_path)
    said["training"] |= {
        "learning_rate": "1e-3",
        "lr_scheduler_kwargs": {"min_lr": 0.1},
        "lr_scheduler_type": "cosine_with_min_lr",
    }
    said["training"] |= {"report_to": ["tensorboard", "wandb"], "bf16": False, "logging_steps": 5}
    said["grass"] |= {"scale": "5e-1", "target_modules": ["q_proj"]}
    said["data"]["columns"] = {"text": "text"}
    recipe = load_recipe(files.write(tmp_path, said))
    assert recipe.training.learning_rate == 1e-3 and recipe.training.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert recipe.training.report_to == ["tensorboard", "wandb"]
    assert recipe.grass.scale == 0.5 and recipe.grass.target_modules == ("q_proj",)
    assert recipe.data.column_names == {"text": "text"}


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_taken(name, tmp_path):
    said = files.pretraining(tmp_path)
    said["training"].pop("gradient_checkpointing", None)
    said["training"] |= {name: True, f"{name}_kwargs": {"every_n_layers": 2}}
    path = files.write(tmp_path, said)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        training = load_recipe(path).training
        off = load_recipe(path, ["--gradient_checkpointing", "false"]).training
        also = load_recipe(path, ["--activation_checkpointing", "false"]).training
    assert training.gradient_checkpointing is True
    assert training.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    assert off.gradient_checkpointing is also.gradient_checkpointing is False
    said["training"] |= {"gradient_checkpointing": True, "activation_checkpointing": True}
    with pytest.raises(ValueError, match="two names of one field"):
        load_recipe(files.write(tmp_path, said))


def test_dry_run_prints_a_recipe_that_means_the_same(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    flags = ["--rank", "4", "--rank_pattern", "q_proj:8", "--base", "muon"]
    assert files.grass(monkeypatch, "train", path, "--dry-run", *flags) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    first, again = load_recipe(path, flags), load_recipe(tmp_path / "again.yaml")
    assert (again.grass, again.base, again.data, again.model, again.evaluation) == (
        first.grass,
        "muon",
        first.data,
        first.model,
        first.evaluation,
    )
    assert again.training.to_dict() == first.training.to_dict()
    assert not (tmp_path / "out").exists()


# -- validate ----------------------------------------------------------------------------------------------------


def test_validate_says_what_would_happen(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    assert files.grass(monkeypatch, "validate", path, "--json", tmp_path / "found" / "found.json") == 0
    out = capsys.readouterr().out
    for mention in ("layout: text", "one example:", "14 weights", "nothing is wrong", "at the peak of a step"):
        assert mention in out
    found = json.loads((tmp_path / "found" / "found.json").read_text())
    ranks = [found["targets"][f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "down")]
    assert ranks == [8, 12] and found["memory"]["peak"] > 0  # a quarter of their 32 and 48 columns
    assert not (tmp_path / "out").exists()


def test_validate_counts_the_layers_that_are_recomputed(tmp_path, monkeypatch, capsys):
    path, found = files.write(tmp_path, files.pretraining(tmp_path)), tmp_path / "found.json"
    peaks = []
    for flags in (["true"], ["true", "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'], ["false"]):
        words = ("--json", found, "--per_device_train_batch_size", "32", "--gradient_checkpointing", *flags)
        assert files.grass(monkeypatch, "validate", path, *words) == 0
        peaks.append(json.loads(found.read_text())["memory"]["peak"])
    assert peaks[0] < peaks[1] < peaks[2]


def test_validate_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    assert files.grass(monkeypatch, "validate", path, "--budget", "20kB") == 2
    assert "--budget" in capsys.readouterr().err
    assert files.grass(monkeypatch, "validate", path, "--budget", "much") == 2
    assert "'much' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize("make", [files.classification, files.preferences, files.finetuning], ids=lambda m: m.__name__)
def test_validate_knows_every_task(make, tmp_path, monkeypatch, capsys):
    if make is not files.classification:
        pytest.importorskip("trl")
    assert files.grass(monkeypatch, "validate", files.write(tmp_path, make(tmp_path))) == 0
    assert "nothing is wrong" in capsys.readouterr().out


# -- shipped recipes -------------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_a_shipped_recipe_opens_with_its_command_and_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    if yaml.safe_load(text)["task"] in ("sft", "dpo"):
        pytest.importorskip("trl")
    words = text.splitlines()[0].removeprefix("# ").split()
    assert words[words.index("train") + 1] == str(path.relative_to(ROOT))
    recipe = load_recipe(path, ["--max_steps", "7", "--use_cpu", "true"])  # bf16 is refused where there is no GPU
    assert recipe.training.max_steps == 7 and recipe.grass is not None
