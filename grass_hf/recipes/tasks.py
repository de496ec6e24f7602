"""From a recipe to a Trainer: rows, tokens, model, and the trainer of the task."""

from __future__ import annotations

import copy
import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
)

from ..integrations.base import base_class_and_kwargs
from ..integrations.trainer import GrassCallback
from ..integrations.trl import head_is_target, plain_head_trainer
from .encode import chat_encoder, encode_rows, label_encoder, pack
from .layouts import converter, find_layout
from .metrics import Metrics, measure
from .models import fit_config, load_config, load_tokenizer
from .schema import Recipe
from .sources import Rows, hold_out, load_rows

# Of a stream, so many texts are read to train a tokenizer on.
STREAMED_TEXTS = 100_000


@dataclass
class Prepared:
    """What a recipe trains on, as far as it is known without weights.

    Attributes:
        layout: of the rows.
        sample: the first row, in our columns.
        train, evaluation: tokens (for dpo, texts).
        tokenizer, config: of the model.
        labels: names of the classes.
    """

    layout: str
    sample: dict[str, Any]
    train: Rows
    evaluation: Rows | None
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    labels: list[str]


def prepare(recipe: Recipe) -> Prepared:
    """Read the rows, find their layout, make tokens of them, and check that model and tokenizer fit.

    Raises:
        ValueError: something is missing or does not fit.
    """
    data, training = recipe.data, recipe.training
    config = load_config(recipe.model)
    train, evaluation = load_rows(data)
    layout, names = find_layout(recipe.task, data.layout, train.columns, data.column_names)
    options = {"skip": data.bad_rows == "skip", "workers": data.preprocessing_workers}
    labels = _labels(recipe, train, names)
    with training.main_process_first(desc="preparing the rows"):
        train = train.convert(converter(layout, names), f"{layout} {names}", **options)
        if evaluation is not None:
            evaluation = evaluation.convert(converter(layout, names), f"{layout} {names}", **options)
        else:
            seed = training.seed if training.data_seed is None else training.data_seed
            train, evaluation = hold_out(train, data, seed)
        sample = train.first()
        texts = itertools.islice(train.dataset, STREAMED_TEXTS if train.streaming else None)
        tokenizer = load_tokenizer(recipe.model, (row["text"] for row in texts))
        if recipe.task == "classification" and not labels:
            labels = _found_labels(train)
        config = fit_config(config, recipe, tokenizer, labels)
        train = _encoded(recipe, train, tokenizer, labels, options)
        if evaluation is not None:
            evaluation = _encoded(recipe, evaluation, tokenizer, labels, options)
    if train.streaming and training.max_steps <= 0:
        raise ValueError("training.max_steps is missing: a stream has no length, so the number of steps must be given.")
    return Prepared(layout, sample, train, evaluation, tokenizer, config, labels)


def _encoded(recipe: Recipe, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: list[str], options) -> Rows:
    data, length = recipe.data, recipe.data.sequence_length
    # what decides about the tokens
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = (backend.to_str() if backend is not None else repr(tokenizer)) + str(tokenizer.chat_template)
    key = hashlib.sha256(text.encode()).hexdigest()
    if recipe.task == "pretraining":
        return pack(rows, tokenizer, length, key, workers=data.preprocessing_workers)
    if recipe.task == "classification":
        encode = label_encoder(tokenizer, labels, length)
        return rows.convert(encode, f"labels {labels} {length} {key}", **options)
    if recipe.task == "dpo":
        return rows  # TRL makes the tokens
    if "messages" in rows.columns and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {recipe.model.name} has no chat template: give model.chat_template, a Jinja file or "
            "`plain`."
        )
    encode = chat_encoder(tokenizer, data.loss_on, data.system_prompt, length)
    return encode_rows(rows, encode, length, f"{data.loss_on} {data.system_prompt} {key}", **options)


def _labels(recipe: Recipe, rows: Rows, names: dict[str, str]) -> list[str]:
    """Names of the classes, as far as recipe or dataset say them."""
    if recipe.task != "classification":
        return []
    if recipe.data.labels:
        return recipe.data.labels
    feature = (rows.dataset.features or {}).get(names["label"])
    if getattr(feature, "names", None):
        return list(feature.names)
    if rows.streaming:
        raise ValueError("data.labels is missing: the classes of a stream must be named, in order.")
    return []


def _found_labels(rows: Rows) -> list[str]:
    found = set(rows.dataset["label"])
    if all(isinstance(label, str) for label in found):
        return sorted(found)
    return [str(number) for number in range(max(found) + 1)]


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
        return Trainer(data_collator=default_data_collator, **options)
    if recipe.task == "classification":
        return Trainer(data_collator=DataCollatorWithPadding(prepared.tokenizer), **options)
    import trl

    if lora is not None:
        options |= {"peft_config": lora}
    if recipe.task == "sft":
        if recipe.grass is None or not head_is_target(model, recipe.grass):
            return trl.SFTTrainer(**options)
        return plain_head_trainer()(**options)
    # Whole, and from before the policy is converted. Log-probabilities that are computed in advance need none, and with
    # adapters it is the model without them.
    reference = None
    if lora is None and (not training.precompute_ref_log_probs or training.fsdp):
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    return trl.DPOTrainer(ref_model=reference, **options)
