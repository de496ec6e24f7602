"""What the files for other tools do by themselves; `make test-tools` runs them in the tools."""

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import transformers.trainer
import yaml
from helpers import trainer
from transformers.trainer_callback import DefaultFlowCallback

from grass_hf.config.optim_args import parse_optim_args
from grass_hf.integrations.base import default_base, with_base

ROOT = Path(__file__).parents[2]


def test_base_optimizer_of_the_tools_own_flag():
    assert with_base("density=0.25", "sgd") == "density=0.25,base=sgd"
    assert with_base(None, "sgd") == "base=sgd"
    assert with_base("base=sgd", "sgd") == "base=sgd"
    parsed = parse_optim_args(with_base('{"density": 0.5, "target_modules": ["q_proj"]}', "sgd"))
    assert (parsed.base, parsed.config.density, parsed.config.target_modules) == ("sgd", 0.5, ("q_proj",))


def test_default_of_the_tools_own_flag_leaves_the_base_to_the_settings():
    assert with_base(None, default_base()) is None
    assert parse_optim_args(with_base("preset=muon", default_base())).base == "muon"


def test_two_base_optimizers_are_refused():
    with pytest.raises(ValueError, match="--optim sgd and base=muon in --optim_args name two base optimizers"):
        with_base("preset=muon", "sgd")


def test_file_for_ms_swift_stands_alone_in_its_folder():
    command = [sys.executable, "-m", "grass_hf.integrations.ms_swift"]
    plugin = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    # ms-swift puts this folder first on Python's path: nothing in it may have the name of a package
    names = {path.stem for path in plugin.parent.iterdir() if path.stem != "__pycache__"}
    assert plugin.is_file() and names == {"__init__", "__main__", "grass_plugin"}


def test_file_for_ms_swift_is_imported_as_a_file_of_no_package(monkeypatch):
    swift, optimizers = types.ModuleType("swift"), types.ModuleType("swift.optimizers")
    optimizers.OptimizerCallback, optimizers.optimizers_map = object, {}
    monkeypatch.setitem(sys.modules, "swift", swift)
    monkeypatch.setitem(sys.modules, "swift.optimizers", optimizers)
    file = ROOT / "grass_hf" / "integrations" / "ms_swift" / "grass_plugin.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert list(optimizers.optimizers_map) == ["grass"]


def test_tool_with_default_callbacks_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [DefaultFlowCallback])  # as ms-swift does
    job = trainer(tmp_path, max_steps=2)
    job.train()
    assert all(row["grass/coverage"] > 0 for row in job.state.log_history if "loss" in row)
    assert "Grass trains a slice of" in capsys.readouterr().err


def test_page_has_the_versions_that_are_tried():
    page = (ROOT / "docs" / "tools.md").read_text()
    rows = re.findall(r"^\| \[([^]]+)\]\(#[\w-]+\) \| ([\d.]+) \| ([\d.]+) \|", page, flags=re.M)
    tools = yaml.safe_load((ROOT / "tests" / "tools" / "tools.yaml").read_text())
    assert [name.lower().replace("llama-factory", "llamafactory") for name, _, _ in rows] == [t["name"] for t in tools]
    for tool, (_, version, transformers_version) in zip(tools, rows, strict=True):
        pins = (ROOT / re.search(r"constraints/\S+", " ".join(tool["pip"]))[0]).read_text().replace("_", "-")
        assert f"\n{tool['package']}=={version}\n" in pins
        assert f"\ntransformers=={transformers_version}\n" in pins
        assert (ROOT / "tests" / "tools" / f"try_{tool['name'].replace('-', '_')}.py").is_file()
