"""DeepSpeed's ZeRO-1, 2 and 3: the losses, rows and weights of DDP, exact resume, plain checkpoints, refusals."""

import json
import re
from pathlib import Path

import forks
import pytest
import torch
import yaml
from helpers import tiny_llama
from launch import accelerate_launch, torchrun, well
from safetensors import safe_open

from grass_hf import GrassConfig
from grass_hf.integrations.deepspeed import check_config

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
CASES = [
    "rows_equal_ddp",
    "rules_with_replacement_equal_ddp",
    "accumulation_and_clipping_equal_ddp",
    "resumes_exactly",
    "gradients_that_are_not_finite_stop_the_run",
    "no_weight_is_gathered_after_a_step",
]
MORE_CASES = [
    "columns_equal_ddp",
    "a_rule_without_scores_equals_ddp",
    "tied_embeddings_equal_ddp",
    "experts_equal_ddp",
    "gradient_checkpointing_equals_ddp",
    "weights_that_stay_gathered_equal_ddp",
    "a_model_made_in_pieces_equals_ddp",
    "bfloat16",
    "overflow_changes_nothing",
    "float16_with_dynamic_loss_scaling",
    "staggered_selections_and_warm_up_equal_ddp",
    "incomplete_checkpoints_are_refused",
    "another_base_is_refused",
    "state_in_blocks_is_refused",
]


@pytest.fixture(scope="module")
def two_ranks():
    """Every case in one start of two processes; a case that fails ends the run, so the ones before it are said."""
    return torchrun(2, "zero_cases.py", "2", *CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(two_ranks, case):
    assert f"ok {case}" in two_ranks.stdout.splitlines(), two_ranks.stderr


@pytest.mark.dist
@pytest.mark.parametrize(
    "ranks, cases",
    [(2, MORE_CASES[:7]), (2, MORE_CASES[7:]), (3, CASES), (4, [*CASES, *MORE_CASES])],
    ids=["2", "2 in half precision and others", "3", "4"],
)
def test_more_cases_and_ranks(ranks, cases):
    said = forks.ranks(ranks, "scripts.zero_cases.main", ranks, cases, timeout=900)[0]
    assert [line for line in said.splitlines() if line.startswith("ok ")] == [f"ok {case}" for case in cases]


def trainer_run(tmp_path, stage, resume=None, **options):
    """Losses of eight steps through accelerate and the Trainer."""
    pretrained = tmp_path / "pretrained"
    tiny_llama().save_pretrained(pretrained)
    config = yaml.safe_load((CONFIGS / f"zero{max(stage, 2)}_8gpu.yaml").read_text())
    config["num_processes"] = 2
    zero = json.loads((CONFIGS / f"zero{max(stage, 2)}.json").read_text())
    zero["zero_optimization"]["stage"] = stage
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(zero))
    config["deepspeed_config"]["deepspeed_config_file"] = str(file)
    launch = tmp_path / "accelerate.yaml"
    launch.write_text(yaml.safe_dump(config))
    settings = {"output_dir": str(tmp_path / "out"), "pretrained": str(pretrained), **options}
    arguments = [str(stage), json.dumps(settings), *([str(resume)] if resume else [])]
    return accelerate_launch(launch, "zero_trainer.py", *arguments)


def losses(done) -> list[float]:
    return json.loads(re.search(r"losses (\[.*\])", well(done).stdout).group(1))


def ddp_losses(tmp_path, **options) -> list[float]:
    settings = {"output_dir": str(tmp_path / "ddp"), "use_cpu": True, "adam_epsilon": 1e-2, **options}
    return losses(torchrun(2, "fsdp_trainer.py", json.dumps(settings)))


def assert_plain(folder, dtype=torch.float32):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tiny_llama().state_dict())
        shapes = {name: value.shape for name, value in tiny_llama().state_dict().items()}
        assert all(file.get_tensor(name).shape == shape for name, shape in shapes.items())


def test_zero3_through_the_trainer(tmp_path):
    found = trainer_run(tmp_path, 3)
    assert losses(found) == pytest.approx(ddp_losses(tmp_path), abs=1e-4)
    assert_plain(tmp_path / "out" / "checkpoint-4")


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_exactly_through_the_trainer(tmp_path, stage):
    base = "adamw_torch_fused" if stage == 2 else "adamw_torch"
    optim_args = f"density=0.25,update_interval=3,side={'output' if stage < 3 else 'input'},base={base}"
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "optim_args": optim_args}
    whole = losses(trainer_run(tmp_path, stage, **options))
    assert whole == pytest.approx(ddp_losses(tmp_path, **options), abs=1e-4)
    assert_plain(tmp_path / "out" / "checkpoint-4")
    final = torch_weights(tmp_path / "out" / "final")
    resumed = losses(trainer_run(tmp_path, stage, tmp_path / "out" / "checkpoint-4", **options))
    assert resumed[-4:] == whole[-4:]
    again = torch_weights(tmp_path / "out" / "final")
    assert all(torch.equal(again[name], value) for name, value in final.items())


def torch_weights(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


@pytest.mark.parametrize(
    "zero, rest, words",
    [
        ({"stage": 0}, {}, "stage=0: Grass runs under ZeRO-1, 2 and 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer.device='cpu'"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "offload_param.device='nvme'"),
        ({"stage": 3, "zero_hpz_partition_size": 4}, {}, "zero_hpz_partition_size=4"),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "zero_quantized_weights=True"),
        ({"stage": 3, "zero_quantized_gradients": True}, {}, "zero_quantized_gradients=True"),
        ({"stage": 3, "mics_shard_size": 2}, {}, "mics_shard_size=2"),
        ({"stage": 2, "round_robin_gradients": True}, {}, "round_robin_gradients=True"),
        ({"stage": 2}, {"optimizer": {"type": "AdamW"}}, "remove it and say base=adamw_torch"),
        ({"stage": 2}, {"tensor_parallel": {"autotp_size": 2}}, "autotp_size=2 splits layers up"),
    ],
)
def test_refused(zero, rest, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_config({"zero_optimization": zero, **rest}, GrassConfig())


def test_ordinary_settings_are_taken():
    for name in ("zero2", "zero3"):
        check_config(json.loads((CONFIGS / f"{name}.json").read_text()), GrassConfig())
    check_config(
        {"zero_optimization": {"stage": 3, "mics_shard_size": -1, "zero_hpz_partition_size": 1}}, GrassConfig()
    )
