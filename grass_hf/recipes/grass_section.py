"""A recipe's section `grass`: the settings of Grass, and the optimizer that steps over the slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config.optim_args import config_and_base
from ..config.settings import FIELD_TYPES, GrassConfig, parse_field
from ..config.written import TRAINERS
from .names import text_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What may stand in the section beside the fields of `GrassConfig`.
WORDS = ("preset", "base")


def read_grass(values: Mapping[str, Any]) -> tuple[GrassConfig, str | None]:
    """The settings, and the base optimizer's name if ``base`` or the preset says one.

    Args:
        values: of the section; of a flag, the tuple of its words.

    Raises:
        ValueError: a value is not valid.
    """
    said = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            value = value[0] if len(value) == 1 else list(value)
        # YAML reads 1e-3 as a string
        text = isinstance(value, str) and name not in WORDS
        said[name] = parse_field(name, value, "grass") if text else value
    try:
        return config_and_base(said)
    except ValueError as error:
        raise ValueError(f"grass: {error}") from error


def base_of(training: TrainingArguments, config: GrassConfig | None, base: str | None) -> str:
    """Name of the optimizer that steps: the section's ``base``, else ``training.optim``.

    Raises:
        ValueError: it cannot step over slices.
    """
    from ..integrations.base import check_base
    from ..integrations.optimizer_name import NAME

    optim = text_of(training.optim)
    if config is None:
        return optim
    if optim == NAME:
        raise ValueError(
            "training.optim=grass beside a section `grass`: name the base optimizer there (adamw_torch, say), the "
            "section says the rest."
        )
    for key in (part.partition("=")[0].strip() for part in str(training.optim_args or "").split(",")):
        if key in (*FIELD_TYPES, *WORDS):
            raise ValueError(f"training.optim_args: {key} stands in the section `grass` here: write it there.")
        if key in TRAINERS:
            raise ValueError(f"training.optim_args: {key} is no argument of {optim}: write {TRAINERS[key]} instead.")
    name = optim if base is None else str(base)
    check_base(name, "training.optim" if base is None else "grass.base")
    return name
