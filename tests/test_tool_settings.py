"""Settings as other tools' files have them: mappings, lists, and a base optimizer that is named elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from grass_hf.integrations.base import default_base, text_with_base
from grass_hf.optim_args import optim_args_text, parse_optim_args


@pytest.mark.parametrize(
    "values",
    [
        {"density": 0.25, "update_interval": 200},
        {"rank": 8, "share_index": False, "slice_dtype": None},
        {"density": 0.25, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["lm_head"]},
        {"density": 0.25, "density_pattern": {".*self_attn.*": 0.5, "down_proj": 0.125}, "selection": "top_r"},
        {"density": 0.25, "target_modules": ".*mlp.*"},
    ],
    ids=lambda values: "-".join(values),
)
def test_mapping_and_its_text_are_the_same_settings(values):
    config = parse_optim_args(optim_args_text(values)).config
    for name, value in values.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


def test_text_keeps_the_base_and_its_arguments():
    parsed = parse_optim_args(optim_args_text({"density": 0.25, "base": "sgd", "base.momentum": 0.9}))
    assert (parsed.base, parsed.base_args) == ("sgd", {"momentum": "0.9"})


@pytest.mark.parametrize("value", [".*mlp{1,2}", ["q_proj,v_proj"], ["q_proj;v_proj"]])
def test_value_that_text_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match=r"target_modules: .* has a comma or a semicolon"):
        optim_args_text({"target_modules": value})


def test_base_optimizer_of_the_tools_own_flag():
    assert text_with_base("density=0.25", "sgd") == "density=0.25,base=sgd"
    assert text_with_base(None, "sgd") == "base=sgd"
    assert text_with_base('{"density": 0.25, "target_modules": ["q_proj"]}', "sgd") == (
        "density=0.25,target_modules=q_proj;,base=sgd"
    )
    # the Trainer's default says nothing: a preset's base stays
    assert parse_optim_args(text_with_base("preset=muon", default_base())).base == "muon"
    assert text_with_base("base=sgd", "sgd") == "base=sgd"


def test_two_base_optimizers_are_refused():
    with pytest.raises(ValueError, match="--optim sgd and base=muon in --optim_args name two base optimizers"):
        text_with_base("preset=muon", "sgd")


def test_file_for_ms_swift_stands_alone_in_its_folder():
    command = [sys.executable, "-m", "grass_hf.integrations.ms_swift"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # ms-swift puts this folder first on Python's path: nothing in it may have the name of a package
    plugin = Path(done.stdout.strip())
    names = {path.stem for path in plugin.parent.iterdir() if path.stem != "__pycache__"}
    assert plugin.is_file() and names == {"__init__", "__main__", "grass_plugin"}
