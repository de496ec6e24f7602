"""`grass-hf bench rollout`: what it counts is what changed, and its bound is what docs/rollouts.md says."""

import json

import pytest
import torch
from helpers import tiny_llama
from typer.testing import CliRunner

from grass_hf import GrassConfig, WeightDelta, convert_to_grass, grass_optimizer
from grass_hf.cli.app import app
from grass_hf.convert.record import grass_slices
from grass_hf.measure.bench import reward, rollout
from grass_hf.slices.ops.bits import as_bits


@pytest.mark.parametrize("lr, grpo", [(1e-5, True), (1e-3, False)])
def test_a_comparison_of_both(lr, grpo):
    torch.manual_seed(0)
    start = tiny_llama().state_dict()

    def make():
        model = tiny_llama()
        model.load_state_dict(start)
        return model

    said = []
    adamw, grass = rollout.compare(
        make,
        lambda step: torch.randint(48, (4, 8), generator=torch.Generator().manual_seed(step)),
        lr=lr,
        grpo=grpo,
        steps=4,
        config=GrassConfig(density=0.25, target_modules="all-matrices", update_interval=2),
        progress=said.append,
    )
    assert len(said) == len(adamw.elements) == len(grass.elements) == len(grass.seconds) == 4
    assert grass.bounded and 0 < sum(grass.elements) < sum(adamw.elements)
    assert grass.memory < 0.25 * adamw.memory == 0.5 * adamw.weights
    assert adamw.row()["payload"] == pytest.approx(3 * adamw.row()["elements"])


def test_a_comparison_finds_what_changed():
    model = tiny_llama()
    comparison = rollout.ByteComparison(model)
    before = {name: param.detach().bfloat16() for name, param in model.named_parameters()}
    model.model.norm.weight.data[3] += 1
    model.lm_head.weight.data.view(-1)[::7] *= 1.5
    _, patches = comparison.find()
    for name, indices, values in patches:
        before[name].view(-1)[indices.long()] = values
    assert [name for name, _, _ in patches] == ["model.norm.weight", "lm_head.weight"]
    for name, param in model.named_parameters():
        assert torch.equal(as_bits(before[name]), as_bits(param.detach().bfloat16())), name
    assert comparison.find()[1] == []


def test_the_bound_counts_the_columns_that_were_in_slices_since_the_last_call():
    model = tiny_llama().to(torch.bfloat16)
    convert_to_grass(model, GrassConfig(density=0.25, update_interval=3))
    optimizer = grass_optimizer(model, lr=1e-3, weight_decay=0.0)
    delta = WeightDelta(model, optimizer)
    columns = sum(slice_.active.numel() for slice_ in grass_slices(model))
    sliced = {f"{slice_.state.name}.weight" for slice_ in grass_slices(model)}
    bounds = []
    for step in range(12):
        ids = torch.randint(48, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
        if step < 6 or step % 3 == 2:  # after every step, then after every third
            ordinary = {name for name, _, _ in delta.patches()} - sliced
            assert delta.last.elements <= delta.last.bound
            bounds.append(delta.last.bound - sum(delta.shape(name).numel() for name in ordinary))
    assert bounds[:6] == [columns] * 6
    assert all(columns < bound <= 2 * columns for bound in bounds[6:])


@pytest.mark.slow
def test_the_command_files_rewards(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(reward, "LAST", 1)
    file = tmp_path / "bench.jsonl"
    done = CliRunner().invoke(app, ["bench", "rollout", "--case", "reward", "--steps", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    row = json.loads(file.read_text())
    assert [(each["method"], each["seed"]) for each in row["rows"]] == [
        (method, seed) for seed in (0, 1, 2) for method in ("adamw", "grass")
    ]
    assert all(0 <= each["reward"] <= 1 and 0 <= each["greedy"] <= 1 for each in row["rows"])


def test_the_reward_of_the_right_reply_is_one():
    assert reward._right(["a b", "c d"], ["a a a", "c d c"]) == [1.0, 2 / 3]
