"""What MODEL means on the command line: a folder, a config file, a shipped config's name, or a hub id."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from ..config.shipped_files import known_configs, model_config_file


def causal_model(name: str, dtype: torch.dtype) -> tuple[PretrainedConfig, Callable[[], nn.Module]]:
    """The config of a causal language model, and a function that makes one with random weights.

    Args:
        name: a local folder, a config JSON, the name of a file in configs/ of a checkout, or a hub id.
        dtype: of the parameters.

    Raises:
        ValueError: nothing of that name can be read, or it is no causal language model.
    """
    config = model_config(name)
    kind = language_model_class(config)
    mapping = kind._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"MODEL={name!r} is a {config.model_type} model, which transformers has no causal language model for: "
            "from Python, estimate_memory takes any model with a loss function."
        )
    _ = mapping[type(config)]  # imported here, so that its constants are not made under fake tensors
    return config, lambda: shapes_of(lambda: train_language_only(kind.from_config(config, dtype=dtype)))


def shapes_of(build: Callable[[], Any]) -> Any:
    """A model whose values nobody reads: under fake tensors some of its initialisations could not run."""
    try:
        initialization = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4
        initialization = importlib.import_module("transformers.modeling_utils")
    with initialization.no_init_weights():
        model = build()
    model.tie_weights()
    return model


def language_model_class(config: PretrainedConfig) -> Any:
    """The auto class of a causal language model, or of the whole model where the language model is a part of it."""
    whole = config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def train_language_only(model: Any) -> Any:
    """Freeze what a model has beside its language model (vision and audio towers, projectors); others are as they were.

    Text reaches the decoder, the embeddings and the head only, so nothing else would have gradients.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config or getattr(config, "is_encoder_decoder", False):
        return model
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(param) for part in parts if part is not None and part is not model for param in part.parameters()}
    for param in model.parameters() if kept else ():
        if id(param) not in kept:
            param.requires_grad_(False)
    return model


def model_config(name: str, what: str = "MODEL") -> PretrainedConfig:
    """The config that a name stands for; `what` is named in errors.

    Raises:
        ValueError: nothing of that name can be read.
    """
    path = model_config_file(name, what)
    try:
        return AutoConfig.from_pretrained(name if path is None else path)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{what}={name!r} could not be read as a folder, a config file or a hub id ({first}): {known_configs()}."
        ) from error
