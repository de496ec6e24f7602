"""The study: equal terms for all methods, rows that survive interruptions, and tables that say what the rows say."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import Sequences, arguments, tiny_llama

from grass_hf.integrations.trainer import GrassCallback
from grass_hf.measure.bench.methods import KINDS, make_ready, resolve, target_names
from grass_hf.recipes.study.evaluation import held_out_loss
from grass_hf.recipes.study.grid import load_study
from grass_hf.recipes.study.report import entries
from grass_hf.recipes.study.rows import deciding
from grass_hf.recipes.study.run import run_row
from grass_hf.recipes.study.two_rates import TwoRateTrainer, grass_config, two_rates

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "studies/smoke.yaml"
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def study_of(document, folder, **changes):
    document = copy.deepcopy(document)
    document["study"].update(changes)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_study(path)


@pytest.fixture(scope="module")
def rows(document, tmp_path_factory):
    """One run of every method."""
    study = study_of(document, tmp_path_factory.mktemp("rows"))
    return {run.method.kind: run_row(run) for run in study.next_runs([])}


def test_every_method_starts_alike_trains_and_says_what_it_took(rows):
    assert set(rows) == set(KINDS)
    starts = {kind: row["loss_before"] for kind, row in rows.items()}
    for kind, start in starts.items():  # DoRA divides by norms and multiplies by them again
        assert start == pytest.approx(starts["adamw"], abs=1e-5 if kind == "dora" else 0.0), kind
    for kind, row in rows.items():
        assert row["status"] == "finished" and row["steps"] == 6 and row["tokens"] == 6 * 2 * 16
        assert [step for step, _, _ in row["validation"]] == [2, 4, 6]
        assert row["loss"] == row["validation"][-1][1] < row["loss_before"], kind
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["seconds"] > 0 and row["peak_bytes"] > 0
        assert row["versions"]["galore-torch"] and row["text"] == rows["adamw"]["text"]
    assert len({row["loss"] for row in rows.values()}) == len(rows)  # no two methods are the same one
    peaks = {kind: row["peak_bytes"] for kind, row in rows.items()}
    assert peaks["frozen"] < peaks["grass"] < peaks["adamw"]
    trained = {kind: row["trainable"] for kind, row in rows.items()}
    assert trained["frozen"] < trained["grass"] < trained["adamw"] == trained["galore"] == trained["apollo"]
    # beside the adapters all that is no target, as under every method: (rows, columns) of the matrices of both layers
    shapes = 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert trained["lora"] - trained["frozen"] == sum(4 * (m + n) for m, n in shapes)
    assert trained["dora"] - trained["lora"] == sum(m for m, _ in shapes)


def test_a_run_repeats_to_the_bit(rows, document, tmp_path):
    run = next(r for r in study_of(document, tmp_path).next_runs([]) if r.method.kind == "grass")
    again = run_row(run, workers=2)
    assert again["key"] == rows["grass"]["key"] and again["workers"] == 2
    assert again["loss"] == rows["grass"]["loss"] and again["train"] == rows["grass"]["train"]


def test_a_run_that_diverges_is_a_row_and_no_error(document, tmp_path):
    grid = {"learning_rates": [1e18], "multipliers": [1e18]}
    study = study_of(document, tmp_path, grid=grid, methods={"adamw": None, "grass": None})
    for run in study.next_runs([]):
        row = run_row(run)
        assert row["status"] == "diverged" and row["loss"] is None and row["perplexity"] is None
        json.loads(json.dumps(row, allow_nan=False))


@pytest.mark.parametrize("kind", ["adamw", "galore", "apollo", "lora", "frozen"])
def test_targets_alone_have_the_second_rate(kind, tmp_path):
    """Trained with a multiplier, and by the same optimizer with groups made by hand: the same weights."""
    ends = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model, settings = tiny_llama(), {"rank": 4, "lora_alpha": 4} if kind == "lora" else {}
        names = target_names(model, "all-linear")
        assert "lm_head" not in names and len(names) == 7 * model.config.num_hidden_layers
        model, targets = make_ready(kind, model, settings, names)
        options = {"optim": KINDS[kind].optim, "max_steps": 3, "weight_decay": 0.0, "learning_rate": 0.01}
        if kind in ("galore", "apollo"):
            options |= {"optim_target_modules": r".*(self_attn|mlp)\..*", "optim_args": "rank=4"}
        multiplier = 1.0 if kind == "frozen" else 0.25
        job = TwoRateTrainer(
            model=model,
            args=arguments(tmp_path, **options),
            train_dataset=Sequences(),
            targets=targets,
            multiplier=1.0 if by_hand else multiplier,
        )
        if by_hand:
            own = [p for p in model.parameters() if id(p) in targets and p.requires_grad]
            others = [p for p in model.parameters() if id(p) not in targets and p.requires_grad]
            optimizer = job.create_optimizer()
            low_rank = next((g for g in optimizer.param_groups if "rank" in g), None)
            settings = {k: v for k, v in (low_rank or {}).items() if k not in ("params", "lr")}
            groups = [{"params": others, "lr": 0.01}]
            if own:
                groups.append({"params": own, "lr": 0.01 * multiplier, **settings})
            # the same class, so that what is compared is which parameter has which rate
            extra = {"fused": True} if type(optimizer) is torch.optim.AdamW else {}
            job.optimizer = type(optimizer)(groups, lr=0.01, weight_decay=0.0, **extra)
        before = [p.detach().clone() for p in model.parameters()]
        job.train()
        ends.append([p.detach().clone() for p in model.parameters()])
    changed = [not torch.equal(a, b) for a, b in zip(before, ends[0], strict=True)]
    assert any(changed) and (all(changed) or kind in ("lora", "frozen"))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_lora_may_have_ranks_of_its_own_in_some_layers():
    settings = resolve("lora", {"rank_pattern": {"(q|k|v|o)_proj": 8}}, 4, "all-linear")
    model = tiny_llama()
    adapted, _ = make_ready("lora", model, settings, target_names(model, "all-linear"))
    ranks = {name: m.r["default"] for name, m in adapted.named_modules() if hasattr(m, "base_layer")}
    assert set(ranks.values()) == {4, 8} and all((rank == 8) is ("self_attn" in name) for name, rank in ranks.items())
    # alpha is each layer's rank
    assert {m.scaling["default"] for m in adapted.modules() if hasattr(m, "base_layer")} == {1.0}
    # and a pattern that is off makes no other method of it
    assert "rank_pattern" not in deciding("lora", resolve("lora", {}, 4, "all-linear"))
    assert "rank_pattern" in deciding("lora", settings)


@pytest.mark.parametrize("kind", ["adamw", "lora", "grass"])
@pytest.mark.parametrize("multiplier", [0.25, 1.0])
def test_the_rate_of_targets_rises_alike_for_every_method(kind, multiplier, tmp_path, monkeypatch):
    seen, plain = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(
            [(group["lr"], group["lr"] * group["weight_decay"]) for group in self.param_groups if group["params"]]
        )
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model, settings = tiny_llama(), {"rank": 4, "lora_alpha": 4} if kind == "lora" else {}
    model, targets = make_ready(kind, model, settings, target_names(model, "all-linear"))
    options = {"optim": KINDS[kind].optim, "max_steps": 5, "weight_decay": 0.1, "learning_rate": 0.01}
    options |= {"lr_scheduler_type": "constant"}
    callbacks = [GrassCallback(grass_config({"density": 0.25}, multiplier, 3))] if kind == "grass" else []
    job = TwoRateTrainer(
        model=model,
        args=arguments(tmp_path, **options),
        train_dataset=Sequences(),
        callbacks=callbacks,
        targets=targets,
        multiplier=multiplier,
        target_warmup=3,
    )
    job.train()
    for number, groups in enumerate(seen[-5:]):  # before them the table at the start has tried a step
        share = min(1, (number + 1) / 4)
        assert sorted({lr for lr, _ in groups}) == pytest.approx(sorted({0.01, 0.01 * multiplier * share}))
        assert {round(decay, 12) for _, decay in groups} <= {0.0, 0.001}
    # and only for the length of a step
    assert all(group["lr"] in (0.01, 0.01 * multiplier) for group in job.optimizer.param_groups)


@pytest.mark.parametrize("kind", ["adamw", "grass", "frozen"])
def test_a_study_hands_the_rise_to_its_runs(kind, rows, document, tmp_path):
    (run,) = study_of(document, tmp_path, methods={kind: None}, target_warmup=5).next_runs([])
    row, plain = run_row(run), rows[kind]
    assert (row["target_warmup"], plain["target_warmup"]) == (5, 0)
    assert (row["validation"][-1][1] == plain["validation"][-1][1]) == (kind == "frozen")
    with pytest.raises(ValueError, match="differ in target_warmup"):
        entries([row, plain])


def test_decay_does_not_depend_on_the_multiplier():
    own, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([own, other], lr=0.1, weight_decay=0.5)
    two_rates(optimizer, {id(own)}, 0.2)
    rates = {id(p): (g["lr"], g["lr"] * g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(other)] == (0.1, 0.05)
    assert rates[id(own)] == (pytest.approx(0.02), pytest.approx(0.05))
    with pytest.raises(ValueError, match="trains no target matrix"):
        two_rates(torch.optim.AdamW([other]), {id(own)}, 0.2)


def test_held_out_loss_is_the_mean_over_tokens():
    model = tiny_llama()
    blocks = torch.randint(model.config.vocab_size, (5, 9))
    logits = model(input_ids=blocks).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten())
    assert held_out_loss(model, blocks, 2) == pytest.approx(float(expected), rel=1e-5)
    assert model.training  # as it was


# -- which runs come next ------------------------------------------------------------------------------------------
