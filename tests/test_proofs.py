"""scripts/proof_7b.py and proof_13b_int8.py on a model that is small, and on made-up text."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, tiny_llama

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("name, steps, interval", [("proof_7b", 6, 3), ("proof_13b_int8", 3, 2)])
def test_a_small_model_trains_and_comes_back(name, steps, interval, tmp_path, monkeypatch, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    made = []

    def texts(count, tokens, vocabulary):
        made.append((count, tokens, vocabulary))
        return torch.arange(count * tokens).view(count, tokens) % vocabulary

    monkeypatch.setattr(importlib.import_module("proving"), "training_texts", texts)
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    words = ["--config", tmp_path, "--tokens", 16, "--rank", 8, "--lr", "0.01", "--budget", 1000]
    monkeypatch.setattr(sys, "argv", [name, *map(str, words), "--output", str(output), "--json", str(figures)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "ok: 0.00 B parameters, r=8" in said, said
    found = json.loads(figures.read_text())
    assert made == [(2, 16, VOCABULARY)] and len(found["losses"]) == steps
    assert [
        i for i in range(steps) if f"step {i}: " in said and "observing" in said.split(f"step {i}: ")[1].splitlines()[0]
    ] == list(range(0, steps, interval))
    assert found["reloaded"] == found["trained"] < found["losses"][0]
    assert 0.25 < found["coverage"] <= 1.0  # 8 rows of 32 or more, and others after a selection
    assert not output.exists()
