"""What a run is going to do, in a few lines: the rows and one of them as the model sees it, the resolved settings."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import yaml
from trl.data_utils import maybe_apply_chat_template

from .schema import Recipe
from .tasks import Prepared


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with its defaults; of `training` what file and flags set, and what differs from the defaults."""
    training, shown = recipe.training, {}
    base = {} if recipe.base == training.optim else {"base": recipe.base}
    # the precision is given, or the defaults of TRL's would ask for a GPU
    given = {name: getattr(training, name) for name in ("output_dir", "use_cpu", "bf16", "fp16")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names that are not given here
        defaults = type(training)(**given)
    for field in dataclasses.fields(training):
        if not field.init or field.name.startswith("_") or field.name == "hub_token":
            continue
        value, usual = _plain(getattr(training, field.name)), _plain(getattr(defaults, field.name))
        if field.name in recipe.given.get("training", {}) or field.name in given or value != usual:
            shown[field.name] = value
    return {
        "task": recipe.task,
        "model": dataclasses.asdict(recipe.model),
        "data": dataclasses.asdict(recipe.data),
        **({} if recipe.grass is None else {"grass": recipe.grass.to_dict() | base}),
        **({} if recipe.lora is None else {"lora": dataclasses.asdict(recipe.lora)}),
        "training": shown,
        "evaluation": dataclasses.asdict(recipe.evaluation),
    }


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as a recipe, without those that are None."""
    said = {
        section: {key: value for key, value in fields.items() if value is not None}
        if isinstance(fields, dict)
        else fields
        for section, fields in settings.items()
        if fields is not None
    }
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100)


def describe(prepared: Prepared, task: str) -> list[str]:
    """Sentences about the rows, and one example as it is trained on."""
    lines = [f"layout: {prepared.layout}"]
    for what, rows in (("training", prepared.train), ("evaluation", prepared.evaluation)):
        if rows is None:
            lines.append("evaluation: none (data.eval_split, data.eval_dataset or data.holdout give some)")
            continue
        count = "a stream" if rows.streaming else f"{len(rows.dataset):,} examples"
        lines.append(f"{what}: {count} of {rows.name}")
        if rows.empty:
            lines.append(f"  {rows.empty:,} rows left out, with nothing to learn (empty, or too long)")
        if rows.cut:
            lines.append(f"  {rows.cut:,} rows are longer than data.sequence_length, and cut")
        if rows.tail:
            lines.append(f"  {rows.tail:,} tokens left out, behind the last whole block")
        if rows.bad:
            lines.append(f"  {len(rows.bad):,} bad rows left out, the first: {rows.bad[0]}")
    if prepared.labels:
        lines.append(f"classes: {', '.join(prepared.labels)}")
    return [
        *lines,
        "one example (what is learnt in brackets):" if task == "sft" else "one example:",
        example(prepared, task),
    ]


def example(prepared: Prepared, task: str, longest: int = 1200) -> str:
    """The first example as text, as the model sees it."""
    row = prepared.train.first()
    tokenizer: Any = prepared.tokenizer
    if task == "sft":
        runs = itertools.groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != -100)
        pieces = [(learnt, tokenizer.decode([token for token, _ in run])) for learnt, run in runs]
        text = "".join(f"[{piece}]" if learnt else piece for learnt, piece in pieces)
    elif "input_ids" in row:
        text = tokenizer.decode(row["input_ids"])
        if task == "classification":
            text += f"\nlabel: {prepared.labels[row['labels']]}"
    else:
        chat = {name: value for name, value in row.items() if value is not None and name != "margin"}
        rendered = maybe_apply_chat_template(chat, tokenizer, chat.get("tools"))
        text = "\n".join(f"{name}: {value}" for name, value in rendered.items() if name not in ("tools", "images"))
    return text if len(text) <= longest else text[:longest] + " ..."
