"""Tiny models, tokenizers, rows and recipes in a folder, for the tests of `grass-hf train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from grass_hf.cli import main
from grass_hf.recipes.encode import PLAIN_TEMPLATE
from grass_hf.recipes.models import train_tokenizer

COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("car", "house", "tree", "river", "stone", "bird")
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
}


def sentences(count: int = 120) -> list[str]:
    """Something a tiny model can learn."""
    return [f"The {THINGS[n % 6]} is {COLOURS[n % 5]}." for n in range(count)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int = 60) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Which colour has the {THINGS[n % 6]}?"},
                {"role": "assistant", "content": f"It is {COLOURS[n % 5]}."},
                {"role": "user", "content": "Thank you."},
                {"role": "assistant", "content": "You are welcome."},
            ]
        }
        for n in range(count)
    ]


def tokenizer():
    made = train_tokenizer(
        [text for row in chats() for text in [t["content"] for t in row["messages"]]] + sentences(), 320
    )
    made.chat_template = PLAIN_TEMPLATE
    return made


def causal_folder(path: Path, **options) -> Path:
    """A folder with a tiny LLaMA and its tokenizer."""
    torch.manual_seed(0)
    pieces = tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, **options}, vocab_size=len(pieces), **ids)).save_pretrained(path)
    pieces.save_pretrained(path)
    return path


def encoder_folder(path: Path) -> Path:
    """A folder with a tiny BERT and its tokenizer."""
    torch.manual_seed(0)
    pieces = tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**shape, vocab_size=len(pieces), max_position_embeddings=64, pad_token_id=0)
    BertForSequenceClassification(config).save_pretrained(path)
    pieces.save_pretrained(path)
    return path


TRAINING = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def pretraining(folder: Path) -> dict:
    """A recipe that trains a tiny LLaMA from scratch on lines of JSON."""
    write_lines(folder / "texts.jsonl", [{"text": " ".join(sentences()[n : n + 9])} for n in range(60)])
    (folder / "model.json").write_text(json.dumps({"model_type": "llama", **LLAMA}), encoding="utf-8")
    return {
        "task": "pretraining",
        "model": {"config_name": str(folder / "model.json"), "tokenizer_vocab_size": 320},
        "data": {"dataset": str(folder / "texts.jsonl"), "sequence_length": 32},
        "grass": {"density": 0.25, "update_interval": 2},
        "training": {**TRAINING, "output_dir": str(folder / "out")},
        "evaluation": {"prompts": ["The car"], "max_new_tokens": 4},
    }


def finetuning(folder: Path, rows: list[dict] | None = None) -> dict:
    """A recipe that finetunes a tiny LLaMA on chats."""
    write_lines(folder / "chats.jsonl", chats() if rows is None else rows)
    return {
        **pretraining(folder),
        "task": "sft",
        "model": {"model_name_or_path": str(causal_folder(folder / "model"))},
        "data": {"dataset": str(folder / "chats.jsonl"), "sequence_length": 96},
    }


def pairs(count: int = 40) -> list[dict]:
    return [{"prompt": f"The {THINGS[n % 6]} is", "chosen": " red.", "rejected": " white."} for n in range(count)]


def preferences(folder: Path) -> dict:
    """A recipe that tunes a tiny LLaMA to preferences."""
    write_lines(folder / "pairs.jsonl", pairs())
    return {
        **finetuning(folder),
        "task": "dpo",
        "data": {"dataset": str(folder / "pairs.jsonl"), "sequence_length": 64},
    }


def classification(folder: Path) -> dict:
    """A recipe that trains a tiny BERT on labelled sentences in a CSV."""
    lines = [f"{text},{'warm' if 'red' in text or 'black' in text else 'cold'}" for text in sentences()]
    (folder / "labelled.csv").write_text("\n".join(["sentence,label", *lines]) + "\n", encoding="utf-8")
    return {
        **pretraining(folder),
        "task": "classification",
        "model": {"model_name_or_path": str(encoder_folder(folder / "encoder"))},
        "data": {"dataset": str(folder / "labelled.csv"), "sequence_length": 32},
        "evaluation": {},
    }


def write(folder: Path, recipe: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def grass(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of ``grass-hf``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["grass-hf", *map(str, words)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
