"""scripts/proof_7b.py, proof_13b_int8.py and proof_gpu.py on a model that is small, and on made-up text."""

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import VOCABULARY, tiny_llama

SCRIPTS = Path(__file__).parents[2] / "scripts"


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


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch, capsys):
    """Runs proof_gpu.py on the CPU, which says of itself that it is a GPU of 100 GB with 1 GB taken."""
    tiny_llama().config.save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, fractions = importlib.import_module("proof_gpu"), []
    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(
        script, "training_texts", lambda count, tokens, _: torch.arange(count * tokens).view(count, -1) % 8
    )
    gpu = SimpleNamespace(  # for the script alone: optimizers would look for the GPU's streams
        is_available=lambda: True,
        mem_get_info=lambda: (99 * 10**9, 100 * 10**9),
        set_per_process_memory_fraction=fractions.append,
        max_memory_allocated=lambda: 2 * 10**9,
        max_memory_reserved=lambda: 3 * 10**9,
    )
    monkeypatch.setattr(script, "cuda", gpu)

    def run(*words):
        file = tmp_path / "figures.jsonl"
        words = ["--config", tmp_path, "--tokens", 16, "--rank", 8, "--lr", "0.01", "--json", file, *words]
        monkeypatch.setattr(sys, "argv", ["proof_gpu.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            script.main(script.flags())
        row = json.loads(file.read_text())
        file.unlink()
        return stopped.value.code, row, capsys.readouterr().out, fractions[-1]

    return run


def test_a_gpu_is_made_as_small_as_another(on_a_gpu):
    code, row, said, fraction = on_a_gpu("--card", 5)
    assert code == 0 and said.splitlines()[-1].startswith("ok: grass"), said
    assert fraction == pytest.approx(0.04)  # 4 GB of 100 beside the one that is taken
    assert row["ok"] and row["trained"] < row["before"] and 0.25 < row["coverage"] <= 1.0
    assert [
        i for i in range(9) if f"step {i}: " in said and "observing" in said.split(f"step {i}: ")[1].split("\n")[0]
    ] == [0, 4, 8]
    assert on_a_gpu("--card", 3.9)[0] == 1  # 3 reserved and 1 taken


@pytest.mark.parametrize("words", [["--method", "adamw"], ["--released", "--checkpointing"], ["--int8"]], ids=str)
def test_every_way_of_the_proof_on_a_gpu_trains(on_a_gpu, words):
    code, row, said, _ = on_a_gpu(*words)
    assert code == 0 and row["trained"] < row["before"], said


def test_what_does_not_fit_is_said(on_a_gpu, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(importlib.import_module("proof_gpu"), "train", full)
    code, row, said, _ = on_a_gpu("--method", "adamw")
    assert code == 1 and "adamw does NOT fit 40 GB: CUDA out of memory. Tried" in said
    assert not row["ok"] and "1 GiB" in row["out_of_memory"]


def test_a_gpu_that_others_use_is_refused(on_a_gpu, monkeypatch):
    script = importlib.import_module("proof_gpu")
    monkeypatch.setattr(script.cuda, "mem_get_info", lambda: (70 * 10**9, 100 * 10**9))
    with pytest.raises(FileNotFoundError):  # no figures
        on_a_gpu()


def test_without_a_gpu_the_proof_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("proof_gpu")
    monkeypatch.setattr(script.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU, and torch sees none"):
        script.main(None)
