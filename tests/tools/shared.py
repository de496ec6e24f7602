"""What the trials of tools share: a tiny model and rows on disk, and the tool's own command.

A trial is a script of this folder. scripts/test_tools.py runs it by the python of the tool's own environment, in an
empty folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DENSITY = 0.25
SETTINGS = f"density={DENSITY},update_interval=200"
WORDS = [
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "sky",
    "sea",
    "sun",
    "is",
    "the",
    "of",
    "what",
    "say",
    "a",
    "to",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' + eos_token + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
SECONDS = 240
# Nothing is fetched, nothing is sent, one thread for tiny tensors, and no GPU.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}
os.environ.update(ENVIRONMENT)


def tiny_llama(folder: Path, dtype: str = "float32") -> Path:
    """Save a LLaMA of two layers, 32 wide, and a tokenizer of words with a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIAL + WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def chats(file: Path, count: int = 32) -> Path:
    """Write rows of one question and one answer each, as JSON lines with the column "messages"."""
    rows = []
    for i in range(count):
        question, answer = WORDS[i % 9], WORDS[(i + 4) % 9]
        turns = (("user", f"what is the {question}"), ("assistant", f"the {question} is a {answer}"))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(command: list[str | Path], **environment: str) -> str:
    """Run a tool's command to its end, and give what it printed; one that ends badly ends the trial."""
    command = [str(part) for part in command]
    # as in an environment that is activated: tools start accelerate and torchrun by name
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    print("$", " ".join(command), flush=True)
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\nexit code {done.returncode} of: {' '.join(command)}")
    return done.stdout


def script(name: str) -> Path:
    """A command of the environment that this trial runs in."""
    return Path(sys.executable).parent / name
