"""What fields of a recipe are called here, elsewhere and in other versions, and what may stand in them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from ..config.fields import unknown_key
from .schema import DataSection

# What later versions of transformers call otherwise: a recipe may say either, whichever is installed.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# How other tools call our fields.
ELSEWHERE = {
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "wd": "training.weight_decay",
    "block_size": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "dataset_name": "data.dataset",
    "train_file": "data.dataset",
    "base_model": "model.model_name_or_path",
    "tokenizer": "model.tokenizer_name",
    "torch_dtype": "model.dtype",
    "r": "grass.rank",
}
_POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
)
# A flag of one replaces what the file says of the other.
ALTERNATIVES = {
    "rank": ("density",),
    "density": ("rank",),
    "model_name_or_path": ("config_name", "tokenizer_vocab_size"),
    "config_name": ("model_name_or_path",),
    "tokenizer_name": ("tokenizer_vocab_size",),
    "tokenizer_vocab_size": ("tokenizer_name",),
    **{old: (new,) for old, new in RENAMED.items()},
    **{new: (old,) for old, new in RENAMED.items()},
}
# Arguments of TRL's whose place in a recipe is another one.
_SAID_ELSEWHERE = {
    "max_length": "data.sequence_length",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "chat_template_path": "model.chat_template",
    "dataset_text_field": "data.columns",
    "dataset_num_proc": "data.preprocessing_workers",
    "model_init_kwargs": "the section model",
}
TRL = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig", "reward": "RewardConfig", "grpo": "GRPOConfig"}
# Fields of data that only some tasks read.
_ONLY = {
    "loss_on": ("sft",),
    "labels": ("classification",),
    "reward_funcs": ("grpo",),
    "system_prompt": tuple(TRL),
    "ignore_fields": tuple(TRL),
}


def text_of(setting: Any) -> str:
    """A setting's text, which may be a member of one of transformers' enums."""
    return str(getattr(setting, "value", setting))


def unknown(name: str, section: str, fields: Mapping[str, set[str]]) -> str:
    owners = [other for other, names in fields.items() if name in names]
    if owners:
        return f"{name} is a field of `{owners[0]}`, not of `{section}`: move it there."
    if name in ELSEWHERE:
        owner, _, ours = ELSEWHERE[name].partition(".")
        return f"{name} is called {ours} here: write `{ours}:` under `{owner}:` (or --{ours} behind the recipe)."
    return unknown_key(name, fields[section], f"a field of {section}")


def check_kind(name: str, value: Any, hint: Any, default: Any) -> None:
    """Refuse null, a list or a mapping where the field takes none: the parser would make text of it."""
    kinds = {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}
    if value is None and not kinds & {type(None), list, Any}:
        raise ValueError(f"{name} is null, which it cannot be: leave the line out for its default, {default}.")
    if isinstance(value, list) and not kinds & {list, tuple, Any}:
        one = f", {value[0]} say" if value else ""
        raise ValueError(f"{name}={value} is a list, and the field takes one value: write one{one}.")
    if isinstance(value, dict) and not kinds & {dict, Any} and name != "data.columns":
        raise ValueError(f"{name}={value} is a mapping, and the field takes one value: write that alone.")


def connect(task: str, data: DataSection, training: Any, given: Mapping[str, Any]) -> None:
    """What the trainers' arguments must say because other sections say it."""
    for name in _POSITIVE:
        if (value := getattr(training, name, None)) is not None and value <= 0:
            raise ValueError(f"training.{name}={value} is not above 0: give a larger one, or leave it out.")
    if training.learning_rate < 0:
        raise ValueError(f"training.learning_rate={training.learning_rate} is negative: give 1e-4, say.")
    if training.metric_for_best_model is not None:
        from .metrics import direction

        training.greater_is_better = direction(training.metric_for_best_model, _said(given.get("greater_is_better")))
    for name, tasks in _ONLY.items():
        if task not in tasks and getattr(data, name) not in (None, [], "replies"):
            raise ValueError(f"data.{name} is of {', '.join(tasks)}, and has no effect on task={task}: leave it out.")
    if task not in TRL:
        return
    for name, where in _SAID_ELSEWHERE.items():
        if given.get(name) is not None:
            raise ValueError(f"training.{name} is set by {where}: write that instead.")
    if task != "grpo":
        # rows are cut before TRL sees them, which it cannot know where it does not pad
        loose = getattr(training, "padding_free", False) and not getattr(training, "packing", False)
        training.max_length = None if loose else data.sequence_length
    elif not data.reward_funcs:
        raise ValueError("data.reward_funcs is missing: name the functions that score what the model writes.")
    elif training.max_completion_length >= data.sequence_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length} leaves no room for a prompt before the "
            f"training.max_completion_length={training.max_completion_length} tokens of a reply: give a greater one."
        )


def _said(value: Any) -> bool | None:
    """true, false or nothing, of YAML or of a flag's words."""
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return None if value is None or value == () else str(value).lower() in ("true", "1", "yes")
