"""From a recipe to a Trainer: rows, tokens, model, and the trainer of the task."""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from ..integrations.base import base_class_and_kwargs
from ..integrations.trainer import GrassCallback
from ..integrations.trl import head_is_target, plain_head_trainer
from . import encode
from .layouts import converter, find_layout
from .metrics import Metrics, measure
from .models import fit_config, load_config, load_tokenizer
from .names import TRL
from .places import BadRow
from .rows import Rows, join, versions
from .schema import ModelSection, Recipe
from .sources import hold_out, load_rows

# Of a stream, so many texts are read to train a tokenizer on.
STREAMED_TEXTS = 100_000


@dataclass
class Prepared:
    """What a recipe trains on, as far as it is known without weights.

    Attributes:
        layout: of the rows.
        train, evaluation: tokens; for dpo, kto, reward and grpo texts or messages.
        tokenizer, config: of the model.
        labels: names of the classes.
    """

    layout: str
    train: Rows
    evaluation: Rows | None
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    labels: list[str]


@dataclass
class _Part:
    """Rows of one dataset, their layout, and the name of their column for each of ours."""

    rows: Rows
    layout: str
    names: dict[str, str]
    convert: Callable[[dict[str, Any]], dict[str, Any] | None]


def prepare(recipe: Recipe) -> Prepared:
    """Read the rows, find their layout, make tokens of them, and check that model and tokenizer fit.

    Raises:
        ValueError: something is missing or does not fit.
    """
    data, training = recipe.data, recipe.training
    config = load_config(recipe.model)
    seed = training.seed if training.data_seed is None else training.data_seed
    with training.main_process_first(desc="preparing the rows"):
        train, evaluation = _parts(recipe, seed)
        tokenizer = load_tokenizer(recipe.model, _texts(train), _tokenizer_file(recipe.model, train))
        for name in ("eos_token", "pad_token"):
            if getattr(training, name, None):
                setattr(tokenizer, name, getattr(training, name))
        if tokenizer.eos_token is None and recipe.task != "classification":
            raise ValueError(
                f"the tokenizer of {recipe.model.name} has no end-of-text token: give eos_token in the "
                "tokenizer_config.json of a local copy, and a model.tokenizer_name that names it."
            )
        labels, numbers = _classes(recipe, train, evaluation)
        config = fit_config(config, recipe, tokenizer, labels)
        held: Any = join([_encoded(recipe, part, tokenizer, labels, numbers) for part in evaluation], [], seed)
        for part in train:
            if not part.rows.streaming and not len(part.rows.dataset):
                size = f"the {len(held.dataset)} rows of {part.rows.name}" if held else part.rows.name
                raise ValueError(
                    f"data.holdout={data.holdout} leaves nothing of {size} to train on: "
                    "give a smaller one, or more rows."
                )
        rows: Any = join([_encoded(recipe, part, tokenizer, labels, numbers) for part in train], data.weights, seed)
        if recipe.task == "pretraining":
            for one in (rows, held) if held else (rows,):
                encode.blocks(one, data.sequence_length, data.preprocessing_workers, whole=one is held)
    if rows.streaming and training.max_steps <= 0:
        raise ValueError("training.max_steps is missing: a stream has no length, so the number of steps must be given.")
    layout = ", ".join(dict.fromkeys(part.layout for part in train))
    return Prepared(layout, rows, held, tokenizer, config, labels)


def _tokenizer_file(model: ModelSection, parts: list[_Part]) -> Path | None:
    """Where a tokenizer trained on these texts is kept between runs; None for streams, whose texts are not known."""
    if not model.tokenizer_vocab_size or any(part.rows.streaming for part in parts):
        return None
    import datasets

    known = [(part.rows.dataset._fingerprint, part.layout, part.names) for part in parts]
    said = repr((known, model.tokenizer_vocab_size, versions()))
    name = hashlib.sha256(said.encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "grass_hf" / f"tokenizer-{name}.json"


def _parts(recipe: Recipe, seed: int) -> tuple[list[_Part], list[_Part]]:
    """The datasets to train on and to evaluate on, their layouts found, and rows held out where there are none."""
    train, evaluation = [], []
    for rows, own in load_rows(recipe.data):
        part = _part(recipe, rows)
        if own is not None:
            evaluation.append(_part(recipe, own))
        elif not recipe.data.eval_dataset:
            rows, held = hold_out(rows, recipe.data, seed)
            part = replace(part, rows=rows)
            evaluation += [] if held is None else [replace(part, rows=held)]
        train.append(part)
    return train, evaluation


def _part(recipe: Recipe, rows: Rows) -> _Part:
    data, columns = recipe.data, rows.columns
    several = len(data.dataset) > 1 or data.eval_dataset
    renamed = {ours: theirs for ours, theirs in data.column_names.items() if theirs in columns or not several}
    layout, names = find_layout(recipe.task, data.layout, columns, renamed)
    return _Part(rows, layout, names, converter(layout, names, data.ignore_fields, data.labels))


def _texts(parts: list[_Part]) -> Iterator[str]:
    """Every text, for a tokenizer that is trained."""
    for part in parts:
        rows = part.rows
        for row in itertools.islice(rows.dataset, STREAMED_TEXTS if rows.streaming else None):
            try:
                made = part.convert(row) or {}
            except BadRow:  # named when tokens are made
                continue
            turns = [turn["content"] for turn in made.get("messages", ())]
            yield from (*turns, *(value for value in made.values() if isinstance(value, str)))


def _encoded(recipe: Recipe, part: _Part, tokenizer: Any, labels: list[str], numbers: dict[Any, int]) -> Rows:
    data, training, task = recipe.data, recipe.training, recipe.task
    length = data.sequence_length
    if task == "pretraining":
        encoder: Any = encode.TextEncoder(tokenizer)
    elif task == "classification":
        encoder = encode.LabelEncoder(tokenizer, labels, numbers, length)
    else:
        keep_end = getattr(training, "truncation_mode", "") == "keep_end"
        used = None if task != "sft" or training.packing or keep_end else length
        # TRL has variants of templates for finetuning only
        chat = encode.chat_encoder(tokenizer, data.loss_on if task == "sft" else "everything", data.system_prompt, used)
        if task == "sft":
            encoder = encode.Labelled(chat, None if training.packing else length, keep_end)
        else:
            kinds = dict.fromkeys(name for name in part.names if name in encode.TRL_COLUMNS or task == "grpo")
            kinds |= {k: (part.rows.dataset.features or {}).get(part.names[k]) for k in kinds}
            most = length - training.max_completion_length if task == "grpo" else length
            encoder = encode.PreferenceEncoder(chat, task, most, kinds)
    options: dict[str, Any] = {"skip": data.bad_rows == "skip", "workers": data.preprocessing_workers, "most": length}
    return part.rows.made(encode.Encoded(part.convert, encoder), **options)


def _classes(recipe: Recipe, train: list[_Part], evaluation: list[_Part]) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and a label as rows have it -> the number of its class. Names win over positions."""
    if recipe.task != "classification":
        return [], {}
    labels, own = list(recipe.data.labels), list[str]()
    found: set[str] = set()
    for part in train + evaluation:
        column, rows = part.names["label"], part.rows
        own = own or list(getattr((rows.dataset.features or {}).get(column), "names", None) or [])
        if not labels and not own:
            if rows.streaming:
                raise ValueError("data.labels is missing: the classes of a stream must be named, in order.")
            values = (int(v) if isinstance(v, float) and v.is_integer() else v for v in rows.dataset.unique(column))
            found |= {str(v) for v in values if v not in (None, "") and not (isinstance(v, int) and v < 0)}
    labels = labels or own or sorted(found, key=lambda name: (0, int(name), "") if _whole(name) else (1, 0, name))
    numbers: dict[Any, int] = {name: number for number, name in enumerate(labels)}
    if own:  # rows have positions among the dataset's own names
        named = set(own) <= set(labels)
        numbers |= {
            at: numbers[name] if named else at for at, name in enumerate(own[: len(labels)] if not named else own)
        }
    elif not any(map(_whole, labels)):
        numbers |= {key: at for at in range(len(labels)) for key in (at, str(at))}
    return labels, numbers


def _whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def build_trainer(recipe: Recipe, prepared: Prepared, model: PreTrainedModel) -> Trainer:
    """The trainer of the task. The model is converted when the trainer is made.

    Raises:
        ValueError: the settings do not fit model or engine.
    """
    measured = Metrics(recipe)
    trainer, training = _trainer_of_task(recipe, prepared, model), recipe.training
    measure(trainer, recipe, measured)
    if recipe.base != training.optim:
        # an argument of the Trainer, which not all of TRL's pass on
        factory = Trainer.get_optimizer_cls_and_kwargs
        trainer.optimizer_cls_and_kwargs = base_class_and_kwargs(training, recipe.base, {}, factory)
    return trainer


def _trainer_of_task(recipe: Recipe, prepared: Prepared, model: PreTrainedModel) -> Trainer:
    evaluation, training = recipe.evaluation, recipe.training
    callbacks: list[Any] = [] if recipe.grass is None else [GrassCallback(recipe.grass)]
    if evaluation.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(evaluation.early_stopping_patience, evaluation.early_stopping_threshold))
    options: dict[str, Any] = {
        "model": model,
        "args": training,
        "train_dataset": prepared.train.dataset,
        "eval_dataset": None if prepared.evaluation is None else prepared.evaluation.dataset,
        "processing_class": prepared.tokenizer,
        "callbacks": callbacks,
    }
    lora = None if recipe.lora is None else recipe.lora.config(recipe.task)
    if lora is not None and recipe.task in ("pretraining", "classification"):
        options["model"] = get_peft_model(model, lora)
    if recipe.task == "pretraining":
        return Trainer(data_collator=encode.block_collator(prepared.tokenizer), **options)
    if recipe.task == "classification":
        return Trainer(data_collator=DataCollatorWithPadding(prepared.tokenizer), **options)
    import trl

    kind = getattr(trl, TRL[recipe.task].replace("Config", "Trainer"))
    if lora is not None:
        options["peft_config"] = lora
    if recipe.task == "sft" and recipe.grass is not None and head_is_target(model, recipe.grass):
        kind = plain_head_trainer()
    elif recipe.task == "grpo":
        options["reward_funcs"] = reward_functions(recipe)
    elif recipe.task in ("dpo", "kto") and lora is None and (not training.precompute_ref_log_probs or training.fsdp):
        # Whole, and from before the policy is converted. Log-probabilities that are computed in advance need none, and
        # with adapters it is the model without them.
        options["ref_model"] = copy.deepcopy(model).requires_grad_(False).eval()
    return kind(**options)


def reward_functions(recipe: Recipe) -> list[Callable]:
    """The functions that score what the model writes, from modules beside the recipe or installed ones.

    Raises:
        ValueError: there is no such function.
    """
    found = []
    sys.path[:0] = places = [str(recipe.path.parent.absolute()), str(Path.cwd())]
    try:
        for name in recipe.data.reward_funcs:
            module, _, function = name.rpartition(".")
            try:
                found.append(getattr(importlib.import_module(module), function))
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"data.reward_funcs: {name} cannot be imported ({error}): give module.function, of a file beside "
                    "the recipe or of an installed package (trl.rewards.think_format_reward)."
                ) from error
    finally:
        for place in places:
            sys.path.remove(place)
    return found
