"""Every model config builds, and its parameter count is the one its name promises."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))

# Exact counts, with the 32,000-piece vocabulary and an untied head. The names are the ones of the ReLoRA and
# GaLore papers: "1b" is their LLaMA-1B of 1.34e9, "4m" is 7.5 % below its
# count, every other name is within 5.5 % of it.
PARAMETERS = {
    "llama_4m": 4_297_280,
    "llama_9m": 8_995_968,
    "llama_15m": 14_944_704,
    "llama_20m": 19_548_416,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama3_70b": 70_553_706_496,  # with its own vocabulary of 128,256
}
UNITS = {"m": 1e6, "b": 1e9}


def nominal(stem: str) -> float:
    """The count in a name: "llama_130m" -> 130e6."""
    size = stem.rsplit("_", 1)[1]
    return float(size[:-1]) * UNITS[size[-1]]


def test_every_size_has_a_config():
    assert {path.stem for path in CONFIGS} == set(PARAMETERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameter_count_matches_the_name(path):
    config = AutoConfig.from_pretrained(path)
    assert isinstance(config, LlamaConfig)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[path.stem]
    tolerance = {"llama_1b": 0.35, "llama_4m": 0.075}.get(path.stem, 0.055)
    assert abs(count / nominal(path.stem) - 1) <= tolerance
    assert LlamaConfig.from_json_file(path).to_diff_dict() == config.to_diff_dict()
