"""Uninterrupted = resumed, bit for bit, from every step of an interval; and checkpoints that are plain."""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import Sequences, arguments, assert_same_weights, tiny_llama, trainer
from safetensors.torch import load_file
from transformers import Trainer

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

pytestmark = pytest.mark.oldest

ROOT = Path(__file__).parents[2]
STEPS = 9
SETTINGS = [
    "density=0.25,update_interval=4,base=adamw_torch",
    "density=0.25,update_interval=4,base=adamw_torch,side=input,selection=multinomial_norm",
    "density=0.25,update_interval=4,base=adamw_torch,selection=uniform,stagger=100,side=output",
    "density=0.25,update_interval=4,base=adamw_torch,state_policy=reset_warmup,side=output,stagger=100",
    "density=0.25,update_interval=4,base=adamw_torch,state_policy=carry,selection=top_r,side=output",
    "density=0.25,update_interval=4,base=sgd,base.momentum=0.9,scale=0.5,side=auto",
    "density=0.25,update_interval=4,base=adafactor,selection=multinomial_norm2_nr,side=output",
    "density=0.25,update_interval=2,base=adamw_torch,side=input,selection=cycle,state_policy=carry_seeded",
    "density=0.25,update_interval=2,base=adamw_torch,side=input,selection=multinomial_stale_nr",
]


def run(folder, optim_args, model=None, resume=None, **options):
    job = trainer(folder, model, optim_args=optim_args, **{"max_steps": STEPS, "seed": 3, **options})
    job.train(resume_from_checkpoint=resume)
    return job


def same_state(ours, theirs, where=""):
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            same_state(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            same_state(*pair, f"{where}.{number}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(resumed, whole):
    assert_same_weights(resumed.model, whole.model)
    same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    keys = ("loss", "grad_norm", "learning_rate", "grass/coverage", "grass/energy")
    logs = [
        [{key: entry[key] for key in keys if key in entry} for entry in job.state.log_history if "loss" in entry]
        for job in (resumed, whole)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("optim_args", SETTINGS)
def test_killed_between_any_two_steps_of_an_interval(tmp_path, optim_args):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", optim_args, **saving)
    for step in range(3, 8):  # every position in the interval of 4, over a reselection
        resumed = run(tmp_path / f"from{step}", optim_args, resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same_run(resumed, whole)


def test_saving_never_changes_a_run(tmp_path):
    """Weight decay is owed to rows in mid-interval; a checkpoint must not settle it early."""
    saving = run(tmp_path / "a", SETTINGS[0], save_strategy="steps", save_steps=1)
    silent = run(tmp_path / "b", SETTINGS[0])
    assert_same_run(saving, silent)


@pytest.mark.parametrize("options", ["slice_dtype=float32", "selection=multinomial_norm"])
def test_bfloat16_weights_with_float32_slices(tmp_path, options):
    optim_args = f"{SETTINGS[0]},{options}"
    whole = run(tmp_path / "a", optim_args, tiny_llama().bfloat16(), save_strategy="steps", save_steps=1)
    assert next(grass_slices(whole.model)).active.dtype == torch.float32
    for step in (3, 5, 6):
        start = str(tmp_path / "a" / f"checkpoint-{step}")
        assert_same_run(run(tmp_path / "b", optim_args, tiny_llama().bfloat16(), resume=start), whole)


def test_bitsandbytes_8bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    # slices above 4096 elements, the size from which bitsandbytes quantises state
    wide = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}
    optim_args = "density=0.5,update_interval=4,base=adamw_bnb_8bit"
    whole = run(
        tmp_path / "a",
        optim_args,
        tiny_llama(**wide),
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-3,
    )
    assert any(s.get("state1") is not None and s["state1"].dtype == torch.uint8 for s in whole.optimizer.state.values())
    for step in (3, 6):
        start = str(tmp_path / "a" / f"checkpoint-{step}")
        assert_same_run(run(tmp_path / "b", optim_args, tiny_llama(**wide), resume=start, learning_rate=1e-3), whole)


PLAIN_LOAD = """
import importlib.abc, json, sys, torch
class Never(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "grass_hf": raise ImportError("grass_hf must not be needed")
sys.meta_path.insert(0, Never())
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert torch.load(sys.argv[1] + "/training_args.bin", weights_only=False).optim == "grass"
state = torch.load(sys.argv[1] + "/optimizer.pt", weights_only=True)
print("step", json.loads(state["param_groups"][-1]["grass"])["step"], float(model.lm_head.weight.sum()))
"""


def test_checkpoint_is_plain_and_loads_without_grass_hf(tmp_path):
    grass = run(tmp_path / "g", SETTINGS[0], save_strategy="steps", save_steps=5)
    adamw = trainer(
        tmp_path / "a", optim="adamw_torch", optim_args=None, save_strategy="steps", max_steps=5, save_steps=5
    )
    adamw.train()
    ours, theirs = (load_file(tmp_path / d / "checkpoint-5" / "model.safetensors") for d in "ga")
    assert [(n, t.shape, t.dtype) for n, t in sorted(ours.items())] == [
        (n, t.shape, t.dtype) for n, t in sorted(theirs.items())
    ]
    out = subprocess.run(
        [sys.executable, "-c", PLAIN_LOAD, str(tmp_path / "g" / "checkpoint-5")],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("step 5 ")
    # what is saved is what the model computes with, in mid-interval too
    grass.save_model(tmp_path / "end")
    saved = load_file(tmp_path / "end" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, grass.model.state_dict()[name])


KILLED = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
from helpers import *
import grass_hf, time
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kw): time.sleep(0.3)
trainer({folder!r}, optim_args={optim_args!r}, max_steps=9, seed=3, save_strategy="steps", save_steps=1,
        trainer_options=dict(callbacks=[Slow()])).train()
"""


def test_sigkill_and_resume(tmp_path):
    folder = tmp_path / "killed"
    code = KILLED.format(tests=f"{ROOT}/tests/support", root=str(ROOT), folder=str(folder), optim_args=SETTINGS[0])
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (folder / "checkpoint-6").exists() and time.time() < deadline and job.poll() is None:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert (folder / "checkpoint-5").exists() and not (folder / "checkpoint-9").exists()
    resumed = run(tmp_path / "on", SETTINGS[0], resume=str(folder / "checkpoint-5"))
    assert_same_run(resumed, run(tmp_path / "whole", SETTINGS[0]))


@pytest.fixture
def checkpoint(tmp_path):
    run(tmp_path / "first", SETTINGS[0], save_strategy="steps", save_steps=5, max_steps=5)
    return tmp_path / "first" / "checkpoint-5"


def refused(tmp_path, checkpoint, optim_args=SETTINGS[0], **options):
    """The sentence with which resuming stops; checks that nothing was trained and nothing written."""
    job = trainer(
        tmp_path / "again",
        optim_args=optim_args,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        **options,
    )
    with pytest.raises(ValueError) as error:
        job.train(resume_from_checkpoint=str(checkpoint))
    assert not list((tmp_path / "again").glob("checkpoint-*"))
    assert not any("loss" in entry and entry["step"] > 5 for entry in job.state.log_history)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(job.model.state_dict()[name], weight)
    return str(error.value)


def test_another_runs_optimizer_state_stops(tmp_path, checkpoint):
    assert "rank and side" in refused(tmp_path, checkpoint, "density=0.5,base=adamw_torch")
    assert "same target_modules" in refused(
        tmp_path, checkpoint, "density=0.25,base=adamw_torch,target_modules=q_proj;v_proj"
    )
    assert "same selection" in refused(tmp_path, checkpoint, "density=0.25,base=adamw_torch,selection=uniform")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    texts = [group.pop("grass", None) for group in state["param_groups"]]
    torch.save(state, checkpoint / "optimizer.pt")
    assert "not written by a Grass run" in refused(tmp_path, checkpoint)
    for group, text in zip(state["param_groups"], texts, strict=True):
        group.update({"grass": json.dumps(json.loads(text) | {"version": 99})} if text else {})
    torch.save(state, checkpoint / "optimizer.pt")
    assert "format 99" in refused(tmp_path, checkpoint)


def test_missing_optimizer_state_and_changed_settings_are_said(tmp_path, checkpoint, caplog):
    for name in ("transformers", "grass_hf"):
        logging.getLogger(name).addHandler(caplog.handler)
    run(tmp_path / "b", SETTINGS[0].replace("interval=4", "interval=3"), resume=str(checkpoint))
    assert "update_interval=3 (was 4)" in caplog.text
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):  # as save_only_model leaves it
        (checkpoint / name).unlink()
    run(tmp_path / "c", SETTINGS[0], resume=str(checkpoint))
    assert "holds no optimizer.pt" in caplog.text


def plain_steps(model, optimizer, first, last):
    for step in range(first, last):
        tokens = torch.stack([Sequences()[i]["input_ids"] for i in range(4 * step, 4 * step + 4)])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_plain_loop_with_state_dicts(tmp_path):
    def fresh():
        model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25, update_interval=4))
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

    model, optimizer = fresh()
    plain_steps(model, optimizer, 0, 6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt")
    plain_steps(model, optimizer, 6, 12)
    again, its_optimizer = fresh()
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    plain_steps(again, its_optimizer, 6, 12)
    assert_same_weights(again, model)
    same_state(its_optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("first", ["optimizer", "model"])
def test_decay_that_is_owed_survives_either_order_of_loading(first):
    """torch.distributed.checkpoint's `set_state_dict` loads the optimizer first."""

    def build():
        model = tiny_llama()
        convert_to_grass(model, GrassConfig(density=0.25, update_interval=8))
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.5)

    def train(model, optimizer, steps):
        for step in steps:
            tokens = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(step))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, whole_optimizer = build()
    train(whole, whole_optimizer, range(11))
    model, optimizer = build()
    train(model, optimizer, range(5))
    owed = [slice_.state.owed for slice_ in grass_slices(model)]
    assert min(owed) < 1.0
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    again = dict(zip(("model", "optimizer"), build(), strict=True))
    for name in sorted(states, reverse=first == "optimizer"):
        again[name].load_state_dict(copy.deepcopy(states[name]))
    assert [slice_.state.owed for slice_ in grass_slices(again["model"])] == owed
    train(again["model"], again["optimizer"], range(5, 11))
    assert_same_weights(again["model"], whole)
    # other weights are another matter: rows are owed nothing for steps that were not theirs
    again["model"].load_state_dict(states["model"])
    assert all(slice_.state.owed == 1.0 for slice_ in grass_slices(again["model"]))


def test_accelerate_save_state_and_load_state(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def fresh():
        model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25, update_interval=4))
        return accelerator.prepare(model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1))

    model, optimizer = fresh()
    plain_steps(model, optimizer, 0, 6)
    accelerator.save_state(str(tmp_path / "state"))
    plain_steps(model, optimizer, 6, 12)
    accelerator._models.clear(), accelerator._optimizers.clear()
    again, its_optimizer = fresh()
    accelerator.load_state(str(tmp_path / "state"))
    plain_steps(again, its_optimizer, 6, 12)
    assert_same_weights(again, model)
    assert json.dumps(its_optimizer.optimizer.grass.metrics()) == json.dumps(optimizer.optimizer.grass.metrics())


def test_loading_only_weights_refreshes_the_slices():
    model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25))
    other = tiny_llama()
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(2)
    result = model.load_state_dict(other.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    for layer in grass_slices(model):
        assert torch.equal(layer.active, layer.weight.index_select(layer.dim, layer.index))
    layer.write_back()
    assert_same_weights(model, other)


def test_best_model_at_end_is_loaded_whole(tmp_path):
    args = arguments(
        tmp_path,
        optim_args=SETTINGS[0],
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
    )
    job = Trainer(model=tiny_llama(), args=args, train_dataset=Sequences(), eval_dataset=Sequences(8))
    job.train()
    best = load_file(Path(job.state.best_model_checkpoint) / "model.safetensors")
    assert not job.state.best_model_checkpoint.endswith("-6")  # the "best" is the worst here, so an earlier one
    for name, weight in best.items():
        assert torch.equal(job.model.state_dict()[name], weight), name
