"""Adapters of a difference: what is in the files, what is left out, and mistakes."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_adapters import SHAPE, changed, logits, model, run, save
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from grass_hf.integrations.adapters import checkpoint
from grass_hf.integrations.adapters.lora import export_adapter


def test_classifier_of_a_masked_language_model_keeps_its_head_whole(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **SHAPE, num_labels=3)
    base = save(AutoModelForMaskedLM.from_config(config), tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    tuned = save(changed(classifier), tmp_path / "tuned")
    result = export_adapter(base, tuned, tmp_path / "adapter", rank=64)
    assert not result.left_out
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"] and "bert.embeddings.LayerNorm" in config["modules_to_save"]
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)  # another random head
    adapted = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    tokens = torch.arange(3, 19).reshape(2, 8)
    expected = logits(AutoModelForSequenceClassification.from_pretrained(tuned), tokens)
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-4)


def test_only_what_changed_is_in_the_adapter(tmp_path):
    base = save(model("llama"), tmp_path / "base")
    tuned = save(changed(model("llama"), only="1.mlp.up_proj"), tmp_path / "tuned")
    result = export_adapter(base, tuned, tmp_path / "adapter", rank=4)
    assert [row.name for row in result.rows] == ["model.layers.1.mlp.up_proj.weight"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"] and config["modules_to_save"] is None
    assert config["r"] == config["lora_alpha"] == 4 and config["task_type"] == "CAUSAL_LM"


def test_what_an_adapter_cannot_hold_is_left_out_with_its_share(tmp_path, capsys, monkeypatch):
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4)
    mamba = AutoModelForCausalLM.from_config(config)
    base = save(mamba, tmp_path / "base")
    tuned = save(changed(changed(mamba, only="A_log"), only="in_proj"), tmp_path / "tuned")
    rows = tmp_path / "rows.json"
    words = ["export-adapter", base, tuned, "--output", tmp_path / "adapter", "--rank", 64, "--json", rows]
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0, err
    row = json.loads(rows.read_text())
    (name,) = row["left_out"]
    assert name.endswith("A_log") and f"left out: {name}" in out
    weights = {weight["name"]: weight for weight in row["weights"]}
    squares = {key: weight["change"] ** 2 for key, weight in weights.items()}
    share = squares[name] / sum(squares.values())
    assert f"{share:.2%} of the squared change" in out and row["error"] == pytest.approx(math.sqrt(share), rel=1e-3)


def test_help_teaches(capsys, monkeypatch):
    for words, mentions in (
        (["diff"], ["rows and columns touched", "--sort", "--json", "one tensor at a time"]),
        (["export-adapter"], ["PEFT LoRA adapter", "--rank", "PeftModel.from_pretrained"]),
        (["delta"], ["save", "apply", "revert", "exact in both directions"]),
        (["delta", "apply"], ["any other base is refused", "DELTA"]),
    ):
        code, out, _ = run(capsys, monkeypatch, *words, "--help")
        assert code == 0 and all(mention in out for mention in mentions), out


def test_a_resized_vocabulary_is_left_out_with_what_to_do(tmp_path):
    base = save(model("llama"), tmp_path / "base")
    llama = changed(model("llama"), only="up_proj")
    llama.resize_token_embeddings(70)
    result = export_adapter(base, save(llama, tmp_path / "tuned"), tmp_path / "adapter", rank=4)
    assert set(result.left_out) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("resize its vocabulary" in reason for reason in result.left_out.values())


def test_what_peft_would_not_load_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from grass_hf.integrations.adapters import peft_files

    base, tuned = save(model("llama"), tmp_path / "base"), save(changed(model("llama")), tmp_path / "tuned")
    monkeypatch.setattr(peft_files, "_PREFIX", "base.model.")
    with pytest.raises(ValueError, match=r"PEFT would not load .* llama .* delta save"):
        export_adapter(base, tuned, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("words", [["export-adapter", "--rank", "4"], ["delta", "save"]], ids=lambda words: words[0])
def test_an_output_that_exists_is_replaced_only_on_demand(words, tmp_path, capsys, monkeypatch):
    base, tuned = save(model("llama"), tmp_path / "base"), save(changed(model("llama")), tmp_path / "tuned")
    output = tmp_path / "output"
    output.mkdir()
    (output / "precious").write_text("mine")
    words = [*words, base, tuned, "--output", output]
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2 and "exists" in err and "--overwrite" in err
    assert [path.name for path in output.iterdir()] == ["precious"]
    code, _, err = run(capsys, monkeypatch, *words, "--overwrite")
    assert code == 0, err
    assert not (output / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "output", "tuned"]  # nothing half-written


def test_what_is_replaced_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    (tmp_path / "output").write_text("old")
    rename = Path.rename

    def refuse(path, target):
        if "partial" in path.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    appearing = checkpoint.appearing(tmp_path / "output", overwrite=True, inputs=[])
    with pytest.raises(ValueError, match=r"output=.* cannot be written \(No space left"), appearing as path:
        path.write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"output": "old"}


def test_mistakes_get_a_sentence_and_leave_nothing(tmp_path, capsys, monkeypatch):
    base = save(model("llama"), tmp_path / "base")
    tuned = save(changed(model("llama")), tmp_path / "tuned")
    sharded = save(model("llama"), tmp_path / "sharded", max_shard_size="20KB")
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    cut = save(model("llama"), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    nameless = save(model("llama"), tmp_path / "nameless")
    written = json.loads((nameless / "config.json").read_text())
    (nameless / "config.json").write_text(json.dumps(written | {"architectures": ["NoSuchModel"]}))
    other = save(model("gpt2"), tmp_path / "other")
    empty, pickled, adapter, full = (tmp_path / name for name in ("empty", "pickled", "adapter", "full"))
    for folder in (empty, pickled, adapter, full / "sub"):
        folder.mkdir(parents=True)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    (adapter / "adapter_config.json").write_text("{}")
    export = ["export-adapter", base]
    cases = [
        (["diff", base, tmp_path / "nowhere"], "TUNED=", "is not a folder"),
        (["diff", empty, tuned], "BASE=", "neither model.safetensors nor"),
        (["diff", pickled, tuned], "pickled weights", "save_pretrained"),
        (["diff", adapter, tuned], "is a PEFT adapter", "whole checkpoint"),
        (["diff", sharded, tuned], "lacks model-00001-of-", "copy it again"),
        (["diff", base, cut], "not a complete safetensors file", "copy it again"),
        (["diff", base, other], "no weight of the same name", "not of one model"),
        (["diff", base, tuned, "--sort", "size"], "sort='size'", "name, change"),
        ([*export, tuned, "--output", tmp_path / "a", "--rank", 0], "rank=0", "64"),
        ([*export, base, "--output", tmp_path / "a"], "no matrix differs", "grass-hf diff"),
        ([*export, nameless, "--output", tmp_path / "a"], "NoSuchModel", "save_pretrained"),
        ([*export, tuned, "--output", tuned, "--overwrite"], "is or holds", "another name"),
        ([*export, tuned, "--output", tmp_path, "--overwrite"], "is or holds", "another name"),
        ([*export, tuned, "--output", full, "--overwrite"], "has folders in it", "another name"),
        ([*export, tuned, "--output", "/proc/none/adapter"], "cannot be written", "another place"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, *sentences in cases:
        code, _, err = run(capsys, monkeypatch, *words)
        assert code == 2, (words, err)
        assert err.startswith("grass-hf: ") and all(sentence in err for sentence in sentences), err
    assert sorted(tmp_path.rglob("*")) == before
