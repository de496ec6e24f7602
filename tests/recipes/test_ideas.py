"""The scripts of studies/, which are not in the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grass_hf.recipes.study.rows import read_rows

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "studies/smoke.yaml"


def run_script(name, out, *words):
    command = [sys.executable, str(ROOT / "studies" / name), "--study", str(SMOKE), "--json", str(out), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]  # of the row; logs of training stand before it


@pytest.mark.slow
def test_every_idea_runs_and_changes_something(tmp_path):
    out = tmp_path / "ideas.jsonl"
    run_script("ideas.py", out, "--training", "max_steps=20", "--settings", "density=0.25,update_interval=4,stagger=1")
    losses = {row["method"]: row["loss"] for row in read_rows(out)}
    assert len(losses) > 15
    unchanged = [name for name, loss in losses.items() if loss == losses["none"]]
    assert unchanged == ["none"]


@pytest.mark.slow
def test_mixtures_of_columns_train_and_are_drawn_anew(tmp_path):
    out = tmp_path / "sketch.jsonl"
    for words in (["--interval", "0"], ["--interval", "2"], ["--mixture", "dense", "--rank", "8"]):
        printed = run_script("sketch.py", out, "--learning_rate", "0.003", *words)
    fixed, redrawn, dense = read_rows(out)
    assert fixed["loss"] != redrawn["loss"] and fixed["loss"] < fixed["loss_before"]
    assert fixed["trainable"] == redrawn["trainable"] > dense["trainable"]
    assert len({row["key"] for row in (fixed, redrawn, dense)}) == 3
    # what has a row is not run again
    assert run_script("sketch.py", out, "--learning_rate", "0.003", *words) == printed
    assert len(read_rows(out)) == 3
