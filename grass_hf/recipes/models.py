"""The tokenizer and the model of a recipe, and the same model on the meta device for the checks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import deepspeed

from ..integrations.model_configs import language_model_class, model_config, train_language_only
from .encode import PLAIN_TEMPLATE
from .packaged import MODELS
from .places import first_line
from .schema import ModelSection, Recipe

END_OF_TEXT = "<|endoftext|>"


def found(name: str, model: ModelSection) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model or a tokenizer of a recipe, and the options that it needs for that.

    Raises:
        ValueError: it is in a package that is not installed.
    """
    if name in MODELS:
        return str(MODELS[name].path), MODELS[name].options
    return name, {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}


def load_tokenizer(model: ModelSection, texts: Any = None, cached: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe names, or one trained on `texts`; it has a token to pad with.

    Args:
        model: the section.
        texts: an iterable of strings, for `tokenizer_vocab_size`.
        cached: where a tokenizer that was trained on the same texts stands, or is to stand.

    Raises:
        ValueError: it cannot be found or made.
    """
    tokenizer: Any
    if model.tokenizer_vocab_size:
        tokenizer = train_tokenizer(texts, model.tokenizer_vocab_size, cached)
    else:
        name = model.tokenizer_name or model.name
        try:
            place, options = found(name, model)
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError, KeyError) as error:
            way = " or tokenizer_vocab_size" if model.from_scratch else ""
            raise ValueError(
                f"the tokenizer {name!r} cannot be loaded ({first_line(error)}): give model.tokenizer_name{way}."
            ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template:
        tokenizer.chat_template = _template(model.chat_template)
    return tokenizer


def _template(name: str) -> str:
    if name == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"model.chat_template={name} cannot be read ({error.strerror}): give a Jinja file, or `plain`."
        ) from error


def train_tokenizer(texts: Any, vocab_size: int, cached: Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts: it can spell anything, so it needs no unknown token."""
    if vocab_size <= 256:
        raise ValueError(f"model.tokenizer_vocab_size={vocab_size} cannot hold the 256 bytes: give 512 or more.")
    if cached is not None and cached.is_file():
        pieces: Any = Tokenizer.from_file(str(cached))
    else:
        pieces, special = ByteLevelBPETokenizer(), [END_OF_TEXT]
        pieces.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=special)
        if cached is not None:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cached.parent) as folder:  # whole, or not there
                pieces.save(f"{folder}/tokenizer.json")
                os.replace(f"{folder}/tokenizer.json", cached)
        pieces = pieces._tokenizer
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_input_names=inputs, **names)


def load_config(model: ModelSection) -> PretrainedConfig:
    """The config of the model.

    Raises:
        ValueError: it cannot be found.
    """
    if model.config_name is not None:
        return model_config(model.config_name, "model.config_name")
    place, options = found(model.name, model)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.model_name_or_path={model.model_name_or_path!r} is no folder with a config.json, and cannot be "
            f"loaded from the hub ({first_line(error)}): packaged models are {', '.join(MODELS)}."
        ) from error


def fit_config(config: PretrainedConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: list[str]):
    """The config with what data and tokenizer decide: the vocabulary from scratch, the classes, the padding.

    Raises:
        ValueError: sequences are longer than the model can read.
    """
    text = config.get_text_config()
    if recipe.model.from_scratch:
        text.vocab_size = max(len(tokenizer), text.vocab_size if not recipe.model.tokenizer_vocab_size else 0)
        for each in (config, text):
            each.bos_token_id, each.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    elif len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} pieces, and {recipe.model.name} an embedding of {text.vocab_size}: "
            "they are not made for each other, give another model.tokenizer_name."
        )
    config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    if recipe.task == "reward":
        config.num_labels = 1
    if recipe.task == "classification":
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and recipe.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length={recipe.data.sequence_length} exceeds the {longest} positions of "
            f"{recipe.model.name}: give a smaller one or another model."
        )
    return config


def auto_class(task: str, config: PretrainedConfig) -> Any:
    """The transformers class that builds a task's models."""
    scores = task in ("classification", "reward")
    return AutoModelForSequenceClassification if scores else language_model_class(config)


def empty_model(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"), whole(recipe):
        return from_config(recipe, config)


@contextlib.contextmanager
def whole(recipe: Recipe) -> Iterator[None]:
    """Let transformers build whole models, also where ZeRO-3 would shard them as they are made."""
    training = recipe.training
    if training.deepspeed_plugin is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        known = getattr(training, "hf_deepspeed_config", None) or getattr(training.deepspeed_plugin, "dschf", None)
        if known is not None:
            deepspeed.set_hf_deepspeed_config(known)


def load_model(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """The model with its weights, or with random ones from scratch; what sees and hears in it is frozen.

    Raises:
        ValueError: its weights cannot be loaded.
    """
    model, kind = recipe.model, auto_class(recipe.task, config)
    if model.from_scratch:
        return from_config(recipe, config)
    if model.model_name_or_path in MODELS:
        made = MODELS[model.model_name_or_path].load(kind, config, dtype_of(model, config))
    else:
        place, options = found(model.name, model)
        if model.attn_implementation:
            options["attn_implementation"] = model.attn_implementation
        dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
        try:
            made = kind.from_pretrained(place, config=config, dtype=dtype, **options)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"model.model_name_or_path={model.model_name_or_path}: its weights cannot be loaded "
                f"({first_line(error)}): save the model anew with save_pretrained, or give another one."
            ) from error
    if getattr(made, "generation_config", None) is not None:
        mend_generation(made.generation_config)
    return made if recipe.task in ("classification", "reward") else train_language_only(made)


def mend_generation(generation: GenerationConfig) -> list[str]:
    """Let a generation config be saved: settings of sampling without ``do_sample`` are common, and refused on saving.

    Returns:
        The settings for which sampling is switched on.

    Raises:
        ValueError: something else is wrong with it.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    found: list[str] = []
    try:
        try:
            generation.validate(strict=True)
        except ValueError:
            usual = GenerationConfig()
            names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
            found = [n for n in names if getattr(generation, n, None) not in (None, getattr(usual, n, None))]
            generation.do_sample = True
            generation.validate(strict=True)
    except ValueError as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the model's generation_config.json cannot be saved again ({said}): mend that file."
        ) from error
    finally:
        logging.set_verbosity(level)
    return found


def check_generation(model: ModelSection) -> list[str]:
    """`mend_generation` of what stands in the folder that a recipe names, as far as it has one.

    Raises:
        ValueError: it cannot be saved.
    """
    if model.from_scratch or model.model_name_or_path in MODELS:
        return []
    try:
        generation = GenerationConfig.from_pretrained(model.name, revision=model.model_revision)
    except OSError:  # it has none
        return []
    return mend_generation(generation)


def dtype_of(model: ModelSection, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the weights."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return getattr(config, "dtype", None) or torch.float32


def from_config(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights, with shapes only under ``torch.device("meta")``.

    Raises:
        ValueError: the config is of no model for the task.
    """
    options: dict[str, Any] = {"dtype": dtype_of(recipe.model, config)}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    try:
        model = auto_class(recipe.task, config).from_config(config, **options)
        return model if recipe.task in ("classification", "reward") else train_language_only(model)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{recipe.model.name} cannot be built for task={recipe.task} ({first_line(error)}): give another model, "
            "or another task."
        ) from error
