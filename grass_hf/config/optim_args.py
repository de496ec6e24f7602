"""The Trainer's ``optim_args``: settings of Grass, the base optimizer's name, and its own arguments.

In which forms they are written, says `grass_hf.config.written`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import written
from .presets import with_preset
from .settings import FIELD_TYPES, GrassConfig


@dataclass(frozen=True)
class OptimArgs:
    """What ``optim_args`` says: Grass settings, the base optimizer's Trainer name, and its own arguments as text."""

    config: GrassConfig
    base: str | None
    base_args: dict[str, str]


def parse_optim_args(given: str | Mapping[str, Any] | None, **defaults: Any) -> OptimArgs:
    """Parse ``"rank=256,selection=top_r,base=adamw_torch,base.momentum=0.9"``, or a mapping of the same.

    The Trainer's format has no escaping, so a list of module suffixes is written with semicolons in text:
    ``target_modules=q_proj;v_proj``; a comma between brackets separates nothing. Keys that start with ``base.`` go to
    the base optimizer.

    Args:
        given: the text, the mapping, or None.
        defaults: fields taken where it does not set them.

    Raises:
        ValueError: a key is unknown or given twice, or a value is none that its field takes; the sentence names it.
    """
    values, base_args = written.read(given, FIELD_TYPES, defaults)
    return OptimArgs(*config_and_base(values), base_args)


def config_and_base(values: Mapping[str, Any]) -> tuple[GrassConfig, str | None]:
    """The config, and the base optimizer's name if ``base`` or the preset says one.

    Raises:
        ValueError: as `GrassConfig.from_dict`.
    """
    fields, base = with_preset(values)
    return GrassConfig.from_dict(fields), base
