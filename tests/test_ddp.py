"""DDP: a batch of eight on one rank, on two and on eight, is the same run with the same rows."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from launch import accelerate_launch, torchrun

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"

SETTINGS = {
    "plain": {},
    "columns": {"side": "input"},
    "all_matrices": {"target_modules": "all-matrices"},
    "drawn": {"selection": "multinomial_norm"},
    "clipped": {"clip": 0.5},
    "bfloat16": {"bfloat16": True},
    "checkpointing": {"checkpointing": True},
}


def outcome(tmp_path, ranks, options):
    file = tmp_path / f"{ranks}.pt"
    done = torchrun(ranks, "split_batch.py", str(file), json.dumps({"score_by": "sequence", **options}))
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(file)
    assert found["ranks"] == ranks
    return found


def assert_same(ours, theirs, atol=1e-5, rows=True):
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=atol)
    if not rows:
        return
    for mine, other in zip(ours["chosen"], theirs["chosen"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", ["plain", "all_matrices", "clipped"])
def test_two_ranks_are_one(tmp_path, name):
    one = outcome(tmp_path, 1, SETTINGS[name])
    assert_same(outcome(tmp_path, 2, SETTINGS[name]), one)
    assert any(not torch.equal(a, b) for a, b in zip(one["chosen"][0], one["chosen"][-1], strict=True))


def test_two_ranks_with_accumulation_are_one_without(tmp_path):
    assert_same(outcome(tmp_path, 2, {"accumulate": 2}), outcome(tmp_path, 1, {}))


def test_the_cpu_config_starts_two_ranks(tmp_path):
    options = json.dumps({"output_dir": str(tmp_path), "use_cpu": True})
    done = accelerate_launch(CONFIGS / "cpu_2.yaml", "fsdp_trainer.py", options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world 2" in done.stdout
    losses = json.loads(re.search(r"losses (\[.*\])", done.stdout).group(1))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_configs_are_what_accelerate_reads(file):
    """They are run, with fewer devices, by test_engines.py."""
    config = load_config_from_file(str(file))
    assert config.num_processes >= config.num_machines >= 1
    assert f"--config_file configs/accelerate/{file.name}" in file.read_text()


@pytest.mark.dist
@pytest.mark.parametrize("name", SETTINGS)
def test_eight_ranks_are_one(tmp_path, name):
    one = outcome(tmp_path, 1, SETTINGS[name])
    eight = outcome(tmp_path, 8, SETTINGS[name])
    if name == "bfloat16":  # a weight's gradient of eight sequences is rounded once, of eight times one eight times
        assert_same(eight, one, atol=2e-2, rows=False)
    else:
        assert_same(eight, one, atol=2e-5)
