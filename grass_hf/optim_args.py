"""The Trainer's ``--optim_args`` string: settings of Grass, the base optimizer's name, and its own arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import FIELD_TYPES, GrassConfig, parse_field
from .fields import unknown_key
from .presets import config_and_base


@dataclass(frozen=True)
class OptimArgs:
    """What ``--optim_args`` says: the Grass settings, the base optimizer's Trainer name, and its own arguments."""

    config: GrassConfig
    base: str | None
    base_args: dict[str, str]


def parse_optim_args(text: str | None, **defaults: Any) -> OptimArgs:
    """Parse ``"rank=256,selection=top_r,base=adamw_torch,base.momentum=0.9"``.

    The Trainer's format has no escaping, so a list of module suffixes is written with semicolons:
    ``target_modules=q_proj;v_proj``. Keys that start with ``base.`` go to the base optimizer.

    Args:
        text: the string, or None.
        defaults: fields taken where the string does not set them.
    """
    values: dict[str, Any] = dict(defaults)
    seen: set[str] = set()
    base_args = {}
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"optim_args: {part!r} is not of the form key=value; separate pairs by commas.")
        if key in seen:
            raise ValueError(f"optim_args: {key} is given twice: keep one.")
        seen.add(key)
        if key.startswith("base."):
            base_args[key.removeprefix("base.")] = value
        elif key in ("base", "preset"):
            values[key] = value
        elif key in FIELD_TYPES:
            values[key] = parse_field(key, value)
        else:
            raise ValueError("optim_args: " + unknown_key(key, [*FIELD_TYPES, "base", "preset"], "a setting of Grass"))
    if "rank" in seen or "density" in seen:  # the string's choice replaces a default of the other
        for name in {"rank", "density"} - seen:
            values.pop(name, None)
    return OptimArgs(*config_and_base(values), base_args)


def optim_args_text(values: Mapping[str, Any]) -> str:
    """The text that `parse_optim_args` reads as these settings: for tools whose files have mappings.

    Args:
        values: of the keys that the text has; lists and mappings of patterns are written with semicolons.

    Raises:
        ValueError: a value has a comma or a semicolon, by which the text would be taken apart.
    """
    return ",".join(f"{key}={_value_text(key, value)}" for key, value in values.items())


def _value_text(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        items = [f"{pattern}:{number}" for pattern, number in value.items()]
    else:
        items = [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    for item in items:
        if "," in item or (";" in item and not isinstance(value, str)):
            raise ValueError(
                f"optim_args: {key}: {item!r} has a comma or a semicolon, which separate settings and the items of a "
                "list: write it without."
            )
    # one suffix alone would be read as a regular expression
    return ";".join(items) + (";" if isinstance(value, (list, tuple)) and len(items) == 1 else "")
