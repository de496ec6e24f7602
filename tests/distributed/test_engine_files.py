"""Files that engines' own tools write: the trained weights under plain names. What engines leave unfilled is filled."""

import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama
from launch import well
from safetensors.torch import load_file
from test_fsdp import trainer_run as sharded_run
from test_zero import trainer_run as zero_run


def command(*arguments):
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.dist
@pytest.mark.parametrize("tied", [True, False])
def test_fsdp2_loads_every_slice_and_merges_its_shards(tmp_path, tied):
    """With the shipped settings: ranks but the first have no values when the model is converted."""
    options = {
        "model": {"tie_word_embeddings": tied},
        "optim_args": "density=0.25,update_interval=3,target_modules=all-matrices,base=adamw_torch",
        "weight_decay": 0.0,
        "save_steps": 8,
    }
    shards = {"fsdp_cpu_ram_efficient_loading": True, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    losses, done = sharded_run(tmp_path, options=options, **shards)
    assert done.stdout.count(f"{15 if tied else 16} slices agree with their weights") == 2
    folder = tmp_path / "out" / "checkpoint-8"
    command(
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "merge-weights",
        folder / "pytorch_model_fsdp_0",
        tmp_path / "merged",
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    model = tiny_llama(**options["model"])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    assert merged.keys() | {"lm_head.weight"} == start.keys()
    model.load_state_dict(merged, strict=not tied)
    full = {"fsdp_cpu_ram_efficient_loading": True, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    (tmp_path / "full").mkdir()
    again, _ = sharded_run(tmp_path / "full", options=options, **full)
    assert again == losses
    theirs = load_file(tmp_path / "full" / "out" / "checkpoint-8" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert not torch.equal(value, start[name]), name
        assert torch.equal(value, theirs.get(name, theirs["model.embed_tokens.weight"])), name


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_to_fp32_and_plain_give_the_trained_weights(tmp_path, stage):
    well(zero_run(tmp_path, stage, weight_decay=0.0, save_steps=8))
    folder = tmp_path / "out" / "checkpoint-8"
    for safe in ([], ["--safe_serialization"]):
        out = tmp_path / f"fp32{len(safe)}"
        command(sys.executable, folder / "zero_to_fp32.py", folder, out, *safe)
        command(sys.executable, "-m", "grass_hf", "plain", out)
        found = (
            load_file(out / "model.safetensors") if safe else torch.load(out / "pytorch_model.bin", weights_only=True)
        )
        expected = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys() == tiny_llama().state_dict().keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        start = tiny_llama().state_dict()
        assert not any(torch.equal(value, start[name]) for name, value in found.items())
