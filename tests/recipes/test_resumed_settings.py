"""Settings of the optimizer beside a resume: the run's own pass, others are refused with a remedy that works."""

from __future__ import annotations

import re
import shutil

import pytest
import recipe_files
import torch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe whose slices have all of the decay, at a scaled rate, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("resumed")
    recipe = recipe_files.pretraining(folder)
    recipe["grass"] |= {"target_modules": "all-matrices", "scale": 3.0}
    recipe["training"] |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    file = recipe_files.write(folder, recipe)
    with pytest.MonkeyPatch.context() as patch:
        assert recipe_files.grass(patch, "train", file) == 0
    return file, folder / "out" / "checkpoint-2"


def validate(monkeypatch, capsys, file, checkpoint, *flags):
    words = ("validate", file, "--no-memory", "--resume_from_checkpoint", checkpoint, *flags)
    code = recipe_files.grass(monkeypatch, *words)
    return code, capsys.readouterr().err


def test_the_runs_own_settings_go_on(run, monkeypatch, capsys):
    file, checkpoint = run
    code, said = validate(monkeypatch, capsys, file, checkpoint)
    assert code == 0, said
    assert recipe_files.grass(monkeypatch, "train", file, "--resume_from_checkpoint", checkpoint) == 0


@pytest.mark.parametrize(
    ("name", "other", "own"),
    [
        ("learning_rate", 0.5, 0.01),
        ("weight_decay", 0.2, 0.1),
        ("adam_beta1", 0.8, 0.9),
        ("adam_beta2", 0.9, 0.999),
        ("adam_epsilon", 1e-3, 1e-8),
    ],
)
def test_other_settings_are_refused(name, other, own, run, monkeypatch, capsys):
    code, said = validate(monkeypatch, capsys, *run, f"--{name}", other)
    assert code == 2 and f"training.{name}={other:g} beside a resume" in said
    remedy = re.search(r"write (--\w+) ([\d.e-]+),", said)
    assert remedy.groups() == (f"--{name}", f"{own:g}")
    assert validate(monkeypatch, capsys, *run, *remedy.groups())[0] == 0


def copied(checkpoint, folder):
    return shutil.copytree(checkpoint, folder / checkpoint.name)


def test_rates_that_are_kept_as_tensors_are_read(run, tmp_path, monkeypatch, capsys):
    """torchao's optimizers have them so."""
    checkpoint = copied(run[1], tmp_path)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group |= {key: torch.tensor(group[key]) for key in ("lr", "initial_lr")}
    torch.save(state, checkpoint / "optimizer.pt")
    assert validate(monkeypatch, capsys, run[0], checkpoint)[0] == 0
    assert validate(monkeypatch, capsys, run[0], checkpoint, "--learning_rate", 0.5)[0] == 2


def test_an_engines_own_files_leave_the_schedulers_rate(run, tmp_path, monkeypatch, capsys):
    checkpoint = copied(run[1], tmp_path)
    (checkpoint / "optimizer.pt").unlink()
    assert validate(monkeypatch, capsys, run[0], checkpoint)[0] == 0
    code, said = validate(monkeypatch, capsys, run[0], checkpoint, "--learning_rate", 0.5)
    assert code == 2 and "goes on with 0.01, 0.03: say learning_rate as the run that wrote it did" in said
