"""scripts/proof_7b.py on a model that is small, and on made-up text."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, tiny_llama

SCRIPT = Path(__file__).parents[1] / "scripts" / "proof_7b.py"


def test_a_small_model_trains_and_comes_back(tmp_path, monkeypatch, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    script = runpy.run_path(str(SCRIPT))
    made = []

    def texts(count, tokens, vocabulary):
        made.append((count, tokens, vocabulary))
        return torch.arange(count * tokens).view(count, tokens) % vocabulary

    monkeypatch.setitem(script["main"].__globals__, "training_texts", texts)
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    words = ["--config", tmp_path, "--steps", 6, "--tokens", 16, "--rank", 8, "--lr", "0.01", "--budget", 1000]
    monkeypatch.setattr(sys, "argv", ["proof_7b.py", *map(str, words), "--output", str(output), "--json", str(figures)])
    with pytest.raises(SystemExit) as stopped:
        script["main"]()
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "ok: 0.00 B parameters, r=8" in said, said
    found = json.loads(figures.read_text())
    assert made == [(2, 16, VOCABULARY)] and len(found["losses"]) == 6
    assert found["reloaded"] == found["trained"] < found["losses"][0]
    assert 0.25 < found["coverage"] <= 1.0  # 8 rows of 32 or more, and others after a selection
    assert not output.exists()
