"""Engines that Grass does not run under are refused by `validate`, whoever names them: the recipe or the launcher."""

import json
from pathlib import Path

import pytest
import recipe_files as files
from launch import accelerate_launch, well

pytest.importorskip("datasets")
pytest.importorskip("trl")

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
OFFLOADING = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
PARAMETERS = {"stage": 3, "offload_param": {"device": "cpu"}}
FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
# name -> (fields of the section training, environment of the launcher, what the sentence says; None where it passes)
ENGINES = {
    "FSDP1": ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, {}, "use FSDP2"),
    "FSDP2": ({"fsdp": "full_shard", "fsdp_config": {"version": 2}}, {}, None),
    "FSDP1 of the launcher": ({}, FSDP | {"FSDP_VERSION": "1"}, "use FSDP2"),
    "a launcher that names no version": ({}, FSDP, "use FSDP2"),
    "ZeRO": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, None),
    "offloading": ({"deepspeed": {"zero_optimization": OFFLOADING}}, {}, "offload_optimizer.device='cpu'"),
    "offloaded weights": ({"deepspeed": {"zero_optimization": PARAMETERS}}, {}, "offload_param.device='cpu'"),
    "offloading in a file": ({"deepspeed": "zero.json"}, {}, "offload_optimizer.device='cpu'"),
    "ZeRO of the launcher": ({}, ZERO, None),
    "offloading of the launcher": (
        {},
        ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        "offload_optimizer.device='cpu'",
    ),
    "offloaded weights of the launcher": (
        {},
        ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        "offload_param.device='cpu'",
    ),
    "a file of the launcher": (
        {},
        ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"},
        "offload_optimizer.device='cpu'",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_what_grass_cannot_do_is_refused_before_a_run(name, tmp_path, monkeypatch, capsys):
    fields, launcher, sentence = ENGINES[name]
    if "deepspeed" in str((fields, launcher)).lower():
        pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": OFFLOADING}))
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):  # transformers sets them: undone afterwards
        monkeypatch.setenv(variable, "false")
    for variable, value in launcher.items():
        monkeypatch.setenv(variable, value)
    recipe = files.pretraining(tmp_path)
    recipe["training"] |= fields
    path = files.write(tmp_path, recipe)
    code = files.grass(monkeypatch, "validate", path, "--no-memory")
    told = capsys.readouterr()
    if sentence is None:
        assert code == 0, told.err
        assert "dry run: left out, as" in told.out
        return
    assert code == 2 and not (tmp_path / "out").exists()
    (said,) = [line for line in told.err.splitlines() if line.startswith("grass-hf: ")]
    assert sentence in said
    # everything trained in full is the engine's own business
    assert files.grass(monkeypatch, "validate", path, "--no-memory", "--no-grass") == 0, capsys.readouterr().err


@pytest.mark.dist
def test_two_processes_make_the_dry_run_together(tmp_path):
    recipe = files.pretraining(tmp_path)
    recipe["training"] |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
    recipe["training"] |= {"load_best_model_at_end": True, "save_steps": 1}
    path, found = files.write(tmp_path, recipe), tmp_path / "found.json"
    words = ("validate", str(path), "--no-memory", "--json", str(found))
    done = well(accelerate_launch(CONFIGS / "cpu_2.yaml", "command.py", *words))
    assert ", in 2 processes" in json.loads(found.read_text())["dry run"] and not (tmp_path / "out").exists()
    assert done.stdout.count("nothing is wrong with it") == 1
