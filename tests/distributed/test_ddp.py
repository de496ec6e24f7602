"""DDP: a batch of eight on one rank, on two and on eight, is the same run with the same rows."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from forks import ranks
from launch import accelerate_launch, well

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"

SETTINGS = {
    "plain": {},
    "at_once": {"stagger": 1},
    "columns": {"side": "input"},
    "defaults": {"selection": "multinomial_norm_nr", "side": "input", "state_policy": "carry_seeded"},
    "all_matrices": {"target_modules": "all-matrices"},
    "drawn": {"selection": "multinomial_norm"},
    "in_turn": {"selection": "cycle", "state_policy": "carry_seeded"},
    "waiting_counts": {"selection": "multinomial_stale_nr", "state_policy": "carry_seeded"},
    "clipped": {"clip": 0.5},
    "bfloat16": {"bfloat16": True},
    "checkpointing": {"checkpointing": True},
    "static_graph": {"ddp": {"static_graph": True}},
    "static_graph_and_checkpointing": {"ddp": {"static_graph": True}, "checkpointing": True},
    "unused_parameters": {"ddp": {"find_unused_parameters": True}},
    "gradients_as_views": {"ddp": {"gradient_as_bucket_view": True}},
}
TWO = {name: {"score_by": "sequence", **options} for name, options in SETTINGS.items() if name != "bfloat16"}
TWO["accumulated"] = {"accumulate": 2, "score_by": "sequence"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What came of a setting on so many ranks; every setting in one start of them."""
    folder = tmp_path_factory.mktemp("ddp")

    @functools.cache
    def train(count):
        settings = {name: {"score_by": "sequence", **options} for name, options in SETTINGS.items()}
        ranks(count, "batches.train", str(folder / f"{count}.pt"), count, TWO if count == 2 else settings)
        return torch.load(folder / f"{count}.pt")

    def find(count, name):
        found = train(count)[name]
        assert found["ranks"] == count
        return found

    return find


def assert_same(ours, theirs, atol=1e-5, rows=True):
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=atol)
    if not rows:
        return
    for mine, other in zip(ours["chosen"], theirs["chosen"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", [name for name in TWO if name != "accumulated"])
def test_two_ranks_are_one(outcome, name):
    one = outcome(1, name)
    assert_same(outcome(2, name), one)
    assert any(not torch.equal(a, b) for a, b in zip(one["chosen"][0], one["chosen"][-1], strict=True))


def test_one_message_of_norms_on_a_selecting_step_and_none_on_others(outcome):
    """Of the optimizer's step; what backward sends is counted by test_traffic.py."""
    at_once = outcome(2, "at_once")
    norms = [("all_reduce", at_once["norms"])]
    assert at_once["sent"] == [norms if step % 3 == 0 else [] for step in range(8)]
    for name in ("plain", "columns", "all_matrices", "accumulated"):  # in turns
        found = outcome(2, name)
        assert all(kind == "all_reduce" for sent in found["sent"] for kind, _ in sent), name
        assert all(len(sent) == 1 for sent in found["sent"]), name  # four turns are on each of three steps
        sizes = [sent[0][1] for sent in found["sent"]]
        assert sum(sizes[:3]) == sum(sizes[3:6]) == found["norms"] > max(sizes), name


def test_two_ranks_with_accumulation_are_one_without(outcome):
    assert_same(outcome(2, "accumulated"), outcome(1, "plain"))


def test_ranks_that_run_out_of_batches_are_refused():
    """accelerate's join_uneven_inputs is torch's Join."""
    for said in ranks(2, "batches.run_out", 2):
        assert "refused: join_uneven_inputs (torch.distributed.algorithms.Join) leaves ranks" in said
        assert "use accelerate's even_batches=True or drop_last=True" in said


def test_the_cpu_config_starts_two_ranks(tmp_path):
    options = json.dumps({"output_dir": str(tmp_path), "use_cpu": True})
    done = well(accelerate_launch(CONFIGS / "cpu_2.yaml", "fsdp_trainer.py", options))
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
def test_eight_ranks_are_one(outcome, name):
    one, eight = outcome(1, name), outcome(8, name)
    if name == "bfloat16":  # a weight's gradient of eight sequences is rounded once, of eight times one eight times
        assert_same(eight, one, atol=2e-2, rows=False)
    else:
        assert_same(eight, one, atol=2e-5)
