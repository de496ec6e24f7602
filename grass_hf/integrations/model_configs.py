"""What MODEL means on the command line: a folder, a config file, a shipped config's name, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

# Shipped configs stand at the top of a checkout; an installed package has none.
_SHIPPED = Path(__file__).parents[2] / "configs"


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


def shapes_of(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose values nobody reads: under fake tensors some of its initialisations could not run."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        model = build()
    model.tie_weights()
    return model


def language_model_class(config: PretrainedConfig) -> type:
    """The auto class of a causal language model, or of the whole model where the language model is a part of it."""
    whole = config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def train_language_only(model: nn.Module) -> nn.Module:
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
    path = Path(name)
    shipped = {file.stem: file for file in sorted(_SHIPPED.glob("*.json"))}
    if not path.exists() and path.name.removesuffix(".json") in shipped and len(path.parts) == 1:
        path = shipped[path.name.removesuffix(".json")]
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{what}={name!r} is a folder without config.json: give a folder that save_pretrained wrote.")
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}={name!r} is not a readable JSON file ({error}): give a model's config.") from None
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError(
                f"{what}={name!r} has no model_type, so it is no config of transformers: give a config.json."
            )
    elif path.suffix == ".json":
        raise ValueError(f"{what}={name!r} is not a file: {_known(shipped)}.")
    try:
        return AutoConfig.from_pretrained(path if path.exists() else name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{what}={name!r} could not be read as a folder, a config file or a hub id ({first}): {_known(shipped)}."
        ) from error


def _known(shipped: dict[str, Path]) -> str:
    return f"shipped configs are {', '.join(shipped)}" if shipped else "give the path of a config JSON"
