"""FSDP2: the losses of DDP, local write-back and reload, exact resume; with fully_shard and through the Trainer."""

import json
import re
from pathlib import Path

import forks
import pytest
import torch
import yaml
from launch import SCRIPTS, accelerate_launch, torchrun, well
from safetensors import safe_open

CASES = [
    "rows_equal_ddp",
    "columns_equal_ddp",
    "muon_equals_ddp",
    "layers_with_ranks_of_their_own_equal_ddp",
    "experts_equal_ddp",
    "all_matrices_equal_ddp",
    "rules_with_replacement_equal_ddp",
    "accumulation_equals_ddp",
    "without_resharding_equals_ddp",
    "cpu_offload_equals_ddp",
    "blocks_are_taken_by_themselves",
    "more_blocks_than_shards",
    "uneven_divisions",
    "mixed_precision",
    "collectives_of_a_step",
    "bytes_reduced_in_backward",
    "resumes_from_sharded_state",
    "resumes_from_full_state",
    "goes_on_on_one_rank_and_comes_back",
    "rows_that_do_not_fit_the_shards_start_anew",
    "unaligned_rows_stop_with_a_sentence",
    "a_sharded_model_is_not_put_back",
    "a_slice_that_is_moved_stops",
    "a_plain_optimizer_over_shards_stops",
]
CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.fixture(scope="module")
def two_ranks():
    """Every case in one start of two processes; a case that fails ends the run, so the ones before it are said."""
    return torchrun(2, "sharded_cases.py", "2", *CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(two_ranks, case):
    assert f"ok {case}" in two_ranks.stdout.splitlines(), two_ranks.stderr


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [4, 8])
def test_more_ranks(ranks):
    cases = [*CASES[:11], "collectives_of_a_step", "resumes_from_sharded_state", "hybrid_sharding"]
    said = forks.ranks(ranks, "scripts.sharded_cases.main", ranks, cases)[0]
    assert [line for line in said.splitlines() if line.startswith("ok ")] == [f"ok {case}" for case in cases]


def trainer_run(tmp_path, processes=2, resume=None, options=None, **fsdp):
    """Losses of eight steps through accelerate's FSDP2 and the Trainer."""
    config = yaml.safe_load((CONFIGS / "fsdp2_8gpu.yaml").read_text())
    config["num_processes"] = processes
    config["mixed_precision"] = "no"  # the Trainer refuses bf16 without a GPU
    config["fsdp_config"].update({"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", **fsdp})
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(config))
    settings = {"output_dir": str(tmp_path / "out"), **(options or {})}
    arguments = [str(SCRIPTS / "fsdp_trainer.py"), json.dumps(settings), *([str(resume)] if resume else [])]
    done = well(accelerate_launch(file, "cpu_fsdp.py", *arguments))
    assert f"sharded over {processes}" in done.stdout, done.stdout
    return json.loads(re.search(r"losses (\[.*\])", done.stdout).group(1)), done


@pytest.mark.parametrize(
    "fsdp",
    [
        {"fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_cpu_ram_efficient_loading": True},
        {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_cpu_ram_efficient_loading": False},
    ],
    ids=["full", "sharded"],
)
def test_through_the_trainer_resumes_exactly(tmp_path, fsdp):
    full = fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    # rows in one, and in the other columns, the default
    options = {"optim_args": f"density=0.25,update_interval=3,side={'output' if full else 'input'},base=adamw_torch"}
    losses, _ = trainer_run(tmp_path, options=options, **fsdp)
    assert losses[-1] < losses[0] - 0.3
    checkpoint = tmp_path / "out" / "checkpoint-4"
    if full:
        with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
            assert not any("slice" in key for key in file.keys())  # noqa: SIM118  (no mapping)
        assert torch.load(checkpoint / "optimizer.bin", weights_only=True)["param_groups"]
    resumed, _ = trainer_run(tmp_path, resume=checkpoint, options=options, **fsdp)
    assert resumed[-4:] == losses[-4:]


@pytest.mark.dist
def test_through_the_trainer_equals_ddp_for_columns(tmp_path):
    options = {"optim_args": "density=0.25,update_interval=3,side=input,base=adamw_torch"}
    losses, _ = trainer_run(tmp_path, options=options, fsdp_state_dict_type="FULL_STATE_DICT")
    settings = {"output_dir": str(tmp_path / "ddp"), "use_cpu": True, **options}
    done = well(torchrun(2, "fsdp_trainer.py", json.dumps(settings)))
    expected = json.loads(re.search(r"losses (\[.*\])", done.stdout).group(1))
    assert losses == pytest.approx(expected, abs=1e-5)


def test_fsdp1_is_refused_with_a_sentence(tmp_path, monkeypatch):
    """accelerate cannot start FSDP1 without a GPU, so what it would say of itself is put in."""
    from accelerate.utils import DistributedType
    from helpers import trainer

    from grass_hf.integrations import trainer as integration

    monkeypatch.setattr(integration, "engine_kind", lambda: DistributedType.FSDP)
    monkeypatch.setattr(integration, "fsdp_version", lambda: 1)
    with pytest.raises(ValueError, match=r"does not run under FSDP1, which flattens parameters: use FSDP2"):
        trainer(tmp_path)
