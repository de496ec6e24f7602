"""What stops a Trainer's run, what is skipped, and what stays untouched."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from accelerate.utils import DistributedType
from helpers import Sequences, arguments, assert_same_weights, plain_state, tiny_llama, trainer
from launch import torchrun, well
from test_trainer import ADAMW, CONFIG, batches
from torch import nn
from transformers import Trainer

import grass_hf
from grass_hf import (
    GrassCallback,
    GrassConfig,
    MuonAdamW,
    convert_to_grass,
    grass_optimizer,
    restore_model,
)
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.config.presets import PRESETS
from grass_hf.convert.conversion import grass_slices, is_converted
from grass_hf.optim.driving import plain_class


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stop_before_any_weight_changes(tmp_path, bad):
    model = convert_to_grass(tiny_llama(), CONFIG)
    optimizer = grass_optimizer(model, torch.optim.AdamW, **ADAMW)
    tokens = batches(2)
    for number, batch in enumerate(tokens):
        before = plain_state(model)
        loss = model(input_ids=batch, labels=batch).loss
        (loss * (bad if number else 1.0)).backward()
        if number == 0:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(FloatingPointError, match=r"q_proj is not finite at optimizer step 1.*learning rate"):
        optimizer.step()
    for name, value in plain_state(model).items():
        assert torch.equal(value, before[name])
    optimizer.zero_grad()  # a loop that catches the error may go on
    model(input_ids=tokens[0], labels=tokens[0]).loss.backward()
    optimizer.step()
    assert optimizer.grass.step == 2


@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_overflow_is_skipped_cleanly(fused):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    convert_to_grass(model, GrassConfig(rank=2, update_interval=2))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(overflow):
        loss = model(torch.randn(4, 8)).square().sum()
        if overflow:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def state():
        return [t.clone() for t in model.state_dict().values()] + [layer.index.clone() for layer in grass_slices(model)]

    for overflow in (True, False, False, True, True, False):
        before, count = state(), optimizer.grass.step
        step(overflow)
        same = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        assert same == overflow
        assert optimizer.grass.step == count + (not overflow)
    for layer in grass_slices(model):
        assert layer.state.energy is not None and 0 < layer.state.energy[0] < float("inf")
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_the_fake_step_of_distributed_checkpointing_changes_nothing():
    """torch.distributed.checkpoint makes optimizer state by a step with learning rate 0 and zero gradients."""
    model = convert_to_grass(tiny_llama(), CONFIG)
    optimizer = grass_optimizer(model, torch.optim.AdamW, **ADAMW)
    before = plain_state(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    assert optimizer.grass.step == 0 and optimizer.grass.metrics() == {"grass/coverage": 0.0}
    assert_same_weights(restore_model(model), tiny_llama())
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    "text, words",
    [
        ("rnak=8", "did you mean rank"),
        ("rank=0", "rank=0"),
        ("rank=1000", "rank=1000 is above the selected side of every target"),
        ("rank=8,target_modules=nothing_here;q_proj", "'nothing_here'"),
    ],
)
def test_bad_settings_stop_before_the_trainer_exists(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path / "out", optim_args=text)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_optim_target_modules_of_the_trainer_is_read(tmp_path):
    job = trainer(tmp_path, optim_args="rank=8", optim_target_modules=["q_proj"])
    assert {layer.state.name.rsplit(".", 1)[1] for layer in grass_slices(job.model)} == {"q_proj"}


def test_two_different_configs_stop(tmp_path):
    with pytest.raises(ValueError, match="keep one"):
        trainer(tmp_path, trainer_options={"callbacks": [GrassCallback(GrassConfig(rank=4))]})


def test_an_optimizer_that_does_not_drive_the_slices_stops(tmp_path):
    model = convert_to_grass(tiny_llama(), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    job = trainer(tmp_path, model, {"optimizers": (optimizer, schedule)}, optim="adamw_torch", optim_args=None)
    with pytest.raises(ValueError, match="grass_optimizer"):
        job.train()


@pytest.mark.parametrize(
    "options, zero, words",
    [
        ({}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer.device='cpu'"),
        ({"optim_args": "rank=8,resident=false"}, {"stage": 2}, "resident=False does not go with ZeRO"),
        (
            {"optim_args": "rank=8,side=output,weight_dtype=int8"},
            {"stage": 3},
            "weight_dtype='int8' does not go with ZeRO",
        ),
        ({"torch_compile": True, "optim_args": "rank=8,stagger=6"}, None, "use stagger=4, or 1 for two graphs"),
    ],
)
def test_engines_that_cannot_work_are_refused(tmp_path, options, zero, words, monkeypatch):
    from grass_hf.integrations import trainer as integration

    if zero:  # as if it had been launched
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
        monkeypatch.setattr(integration, "engine_kind", lambda: DistributedType.DEEPSPEED)
        monkeypatch.setattr(integration, "AcceleratorState", lambda: SimpleNamespace(deepspeed_plugin=plugin))
    args = arguments(tmp_path, **options)
    model = tiny_llama()
    with pytest.raises(ValueError, match=words):
        integration.FollowTraining().on_init_end(args, None, None, model=model)
    assert not is_converted(model)


def test_evaluation_inside_training_and_ordinary_runs_are_untouched(tmp_path):
    job = Trainer(
        model=tiny_llama(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=Sequences(),
        eval_dataset=Sequences(8),
    )
    job.train()
    losses = [entry["eval_loss"] for entry in job.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    ordinary = trainer(tmp_path, optim="adamw_torch", optim_args=None)
    ordinary.train()
    assert not is_converted(ordinary.model)
    assert not any(key.startswith("grass/") for entry in ordinary.state.log_history for key in entry)


def test_register_is_idempotent():
    import transformers.trainer

    method, callbacks = Trainer.get_optimizer_cls_and_kwargs, len(transformers.trainer.DEFAULT_CALLBACKS)
    grass_hf.register()
    grass_hf.register()
    assert Trainer.get_optimizer_cls_and_kwargs is method
    assert len(transformers.trainer.DEFAULT_CALLBACKS) == callbacks


TWO_RANKS = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import torch, torch.distributed as dist
from helpers import *
import grass_hf
from grass_hf.convert.conversion import grass_slices
job = trainer({folder!r}, optim_args={optim_args!r}, per_device_train_batch_size=2, max_steps=7)
job.train()
assert dist.get_world_size() == 2 and job.args.world_size == 2
flat = torch.cat([t.double().flatten() for t in plain_state(job.model).values()]
                 + [l.index.double() for l in grass_slices(job.model)])
both = [torch.empty_like(flat) for _ in range(2)]
dist.all_gather(both, flat)
assert torch.equal(both[0], both[1]), "ranks differ"
if dist.get_rank() == 0:
    torch.save((plain_state(job.model), [l.index for l in grass_slices(job.model)]), {folder!r} + "/end.pt")
leave()
"""


@pytest.mark.parametrize("rule", ["uniform_nr", "top_r"])
def test_two_processes_under_ddp(tmp_path, rule):
    optim_args = f"density=0.25,update_interval=3,base=adamw_torch,selection={rule}"
    root = Path(__file__).parents[2]
    script = tmp_path / "job.py"
    script.write_text(
        TWO_RANKS.format(tests=f"{root}/tests/support", root=str(root), folder=str(tmp_path), optim_args=optim_args)
    )
    well(torchrun(2, str(script)))
    weights, index = torch.load(tmp_path / "end.pt")
    if rule == "uniform_nr":  # selects without scores, so one process with the whole batch walks the same way
        single = trainer(tmp_path, optim_args=optim_args, per_device_train_batch_size=4, max_steps=7)
        single.train()
        for name, value in plain_state(single.model).items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-4)
        assert all(torch.equal(i, layer.index) for i, layer in zip(index, grass_slices(single.model), strict=True))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains(tmp_path, preset):
    said = parse_optim_args(f"preset={preset},update_interval=2")
    job = trainer(tmp_path, optim_args=f"preset={preset},update_interval=2", max_steps=5)
    job.train()
    assert job.model.grass.config == said.config
    assert plain_class(job.optimizer.optimizer) is (MuonAdamW if said.base == "muon" else torch.optim.AdamW)
    assert job.optimizer.optimizer.grass.step == 5 and job.optimizer.optimizer.grass.metrics()["grass/coverage"] > 0.25
    assert all(slice_.is_released for slice_ in grass_slices(job.model)) is (preset == "max_memory")
