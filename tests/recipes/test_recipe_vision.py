"""Models with a vision part: `grass-hf train`, `validate` and `estimate` train and count the language model of them."""

import json

import pytest
import recipe_files as files
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

pytest.importorskip("datasets")

from grass_hf.recipes.parse import load_recipe
from grass_hf.recipes.runner import train

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
KINDS = {
    "gemma3": (TEXT | {"head_dim": 16}, VISION | {"image_size": 28, "patch_size": 14}),
    "qwen2_5_vl": (TEXT | {"rope_parameters": MROPE, "rope_scaling": MROPE}, QWEN_VISION | {"patch_size": 14}),
}


def config(kind):
    text, vision = KINDS[kind]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    made = AutoConfig.for_model(kind, text_config=text | ids | {"vocab_size": 320}, vision_config=vision, **ids)
    return made


def is_language(name):
    return "vision_tower" not in name and "visual" not in name and "multi_modal_projector" not in name


@pytest.mark.parametrize("kind", KINDS)
def test_finetuning_trains_the_language_model_and_keeps_the_rest(kind, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    said = files.finetuning(tmp_path)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config(kind)).save_pretrained(tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    path = files.write(tmp_path, said)
    assert files.grass(monkeypatch, "validate", path, "--json", tmp_path / "found.json") == 0
    assert "dry run: two steps" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["memory"]["peak"] > 0 and len(found["targets"]) == 14 and all(map(is_language, found["targets"]))
    results = train(load_recipe(path))
    assert results["loss after"] < results["loss before"] - 0.1
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(map(is_language, changed)) and any("mlp" in name for name in changed)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(whole.config) is type(config(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_from_a_config(kind, tmp_path):
    said = files.pretraining(tmp_path)
    config(kind).save_pretrained(tmp_path / "whole")
    said["model"]["config_name"] = str(tmp_path / "whole")
    results = train(load_recipe(files.write(tmp_path, said)))
    assert results["loss after"] < results["loss before"] - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_counts_frozen_vision(kind, tmp_path, monkeypatch, capsys):
    config(kind).save_pretrained(tmp_path / "whole")
    out = tmp_path / "found.json"
    words = ("estimate", tmp_path / "whole", "--method", "adamw,grass", "--sequence", "64", "--dtype", "float32")
    assert files.grass(monkeypatch, *words, "--density", "0.5", "--json", out) == 0
    adamw, grass = json.loads(out.read_text())["bytes"]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config(kind))
    trained = sum(p.nbytes for name, p in model.named_parameters() if is_language(name))
    assert adamw["step"]["weights"] >= sum(p.nbytes for p in model.parameters())
    assert adamw["step"]["optimizer_state"] == pytest.approx(2 * trained, rel=0.01)
    assert grass["step"]["optimizer_state"] < adamw["step"]["optimizer_state"]
