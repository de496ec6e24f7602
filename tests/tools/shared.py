"""What the trials of tools share: a tiny model and rows on disk, the tool's own command, and what must be true then.

A trial is a script of this folder. scripts/test_tools.py runs it by the python of the tool's own environment, in an
empty folder.
"""

from __future__ import annotations

import json
import os
import re
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


def weights(folder: Path) -> dict:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no safetensors in {folder}: {sorted(p.name for p in folder.iterdir())}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def history(folder: Path) -> list[dict]:
    """What the Trainer logged, from the newest trainer_state.json at or below a folder."""
    files = sorted(folder.rglob("trainer_state.json"), key=lambda p: p.stat().st_mtime)
    assert files, f"no trainer_state.json in {folder}"
    return json.loads(files[-1].read_text())["log_history"]


def assert_driven(before: dict, after: dict, targets: str = r"layers\.\d+\..*_proj\.weight$") -> None:
    """Slices were trained, and nothing else of the targets.

    Every target moved, in the columns of its first selection and of one more at most, and the keys are those of the
    plain model. A run that trained targets in full moves all columns; one that trained none moves no column.

    Args:
        before: tensors of the model by name, without weight decay in between.
        after: the same after the run.
        targets: regular expression for the names of the target weights.
    """
    assert before.keys() == after.keys(), f"other keys: {sorted(before.keys() ^ after.keys())[:6]}"
    names = [name for name in before if re.search(targets, name)]
    assert len(names) >= 8, f"only {names} match {targets}"
    for name in names:
        moved = (before[name].float() != after[name].float()).any(dim=0).sum().item()
        columns = before[name].shape[1]
        assert 0 < moved <= 2 * DENSITY * columns, f"{name}: {moved} of {columns} columns moved"
    print(f"{len(names)} targets moved, each in {2 * DENSITY:.0%} of its columns or fewer; keys are plain", flush=True)


def assert_table(said: str) -> None:
    """The start table was printed."""
    assert "Grass trains a slice of" in said, f"no start table in:\n{said[-3000:]}"


def assert_logged(log: list[dict]) -> None:
    """Coverage stands beside the losses of two steps."""
    rows = [row for row in log if "loss" in row]
    assert len(rows) == 2 and all(row["grass/coverage"] > 0 for row in rows), log


def assert_trained(model: Path, saved: Path, said: str, log: Path) -> None:
    """All of the above, for a tool over the Hugging Face Trainer.

    Args:
        model: folder of the model before.
        saved: folder of the saved model.
        said: what the tool printed.
        log: folder with a trainer_state.json.
    """
    assert_table(said)
    assert_driven(weights(model), weights(saved))
    assert_logged(history(log))
