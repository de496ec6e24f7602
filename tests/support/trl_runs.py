"""TRL's trainers over one tiny model, for the tests beside it: the same rows, the same rate, a few steps on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import datasets
import trl
from helpers import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e", "f"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEXTS = [{"text": text} for text in ("a b c d a b c d", "b c d a b c d a", "e f e f a b c d", "d c b a f e d c")]
PAIRS = [
    {"prompt": "a b c ", "chosen": "d a", "rejected": "f e"},
    {"prompt": "b c d ", "chosen": "a b", "rejected": "f"},
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row in PAIRS
    for kind in ("chosen", "rejected")
]
PROMPTS = [{"prompt": text} for text in ("a b c", "b c d", "c d a", "d a b")]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
ONLINE = {"num_generations": 2, "max_completion_length": 4}

# name: trainer, config, rows, options of the config
KINDS: dict[str, tuple[type, type, list[dict], dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, TEXTS, {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, LABELLED, {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, ONLINE),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, {**ONLINE, "beta": 0.0}),
    "distillation": (trl.DistillationTrainer, trl.DistillationConfig, CHATS, {"max_completion_length": 4}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS, {}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, one a token."""
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, padding_side="left", **special)


def model_for(kind: str, tied: bool = False) -> PreTrainedModel:
    """The model that a trainer of this kind trains; the same weights at every call."""
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny_llama(tie_word_embeddings=tied, **ids)
    if kind != "reward":
        return model
    config = LlamaConfig(**{**model.config.to_dict(), "num_labels": 1})
    whole = LlamaForSequenceClassification(config)
    whole.model.load_state_dict(model.model.state_dict())
    return whole


def even_letters(completions, **_) -> list[float]:
    """A reward for GRPO and RLOO: how many tokens are a or c, and a little for where they stand."""
    words = [completion.split() for completion in completions]
    return [sum((word in "ac") * (1.0 + place / 8) for place, word in enumerate(own)) for own in words]


def trainer_of(kind: str, folder, model=None, tied: bool = False, extra: dict[str, Any] | None = None, **options):
    """A trainer whose model learns by Grass unless `optim` says otherwise."""
    cls, config_cls, rows, own = KINDS[kind]
    model = model_for(kind, tied) if model is None else model
    settings = {
        "output_dir": str(folder),
        "optim": "grass",
        "optim_args": "density=1.0,base=adamw_torch",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    given: dict[str, Any] = {"processing_class": tokenizer(), "train_dataset": datasets.Dataset.from_list(rows)}
    if kind in ("dpo", "kto"):
        given["ref_model"] = copy.deepcopy(model)
    if kind in ("grpo", "rloo"):
        given["reward_funcs"] = even_letters
    if kind == "distillation":
        given["teacher_model"] = noisy(copy.deepcopy(model))
    return cls(model, args=config_cls(**{**settings, **own, **options}), **{**given, **(extra or {})})


def noisy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model: weights a little larger."""
    for param in model.parameters():
        param.data.mul_(1.5)
    return model


def trained(make: Callable[..., Any], *args, **options) -> dict:
    """The weights after a run."""
    trainer = make(*args, **options)
    trainer.train()
    return {name: value for name, value in trainer.model.state_dict().items() if "_slice." not in name}
