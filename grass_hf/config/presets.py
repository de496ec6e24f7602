"""Named sets of settings: a name stands for fields of `GrassConfig`, and fields given beside it override them.

Where settings are said as text or YAML, ``base`` stands among them, the name of the optimizer that steps over the
slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fields import unknown_key

# Modules in whose path the word stands: self_attn, attn, attention, SelfAttention, ...
_ATTENTION = "(?i:.*att(n|ention).*)"

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},  # the defaults of GrassConfig, which are not Algorithm 1's
    # Algorithm 1 with its settings: a quarter of the rows, by the largest norms, and all state dropped with them.
    "paper": {
        "density": 0.25,
        "update_interval": 200,
        "selection": "top_r",
        "side": "output",
        "state_policy": "reset",
        "stagger": 1,
        "target_modules": "all-linear",
    },
    # Many turns for every row: as long a run as pretraining is, in which norms are no better than chance and turns are.
    "pretraining": {"selection": "cycle"},
    # What trained best from random weights (docs/quality.md). Where MLPs hold twice the numbers that attention does, as
    # in LLaMA's and GPT-2's shapes, it is half of all: as much optimizer state as AdamW has of a quarter.
    "muon": {"density": 0.25, "density_pattern": {_ATTENTION: 1.0}, "base": "muon"},
    # The same of a quarter of all, and of an eighth.
    "muon_quarter": {"density": 0.125, "density_pattern": {_ATTENTION: 0.5}, "base": "muon"},
    "muon_eighth": {"density": 0.0625, "density_pattern": {_ATTENTION: 0.25}, "base": "muon"},
    # Every matrix compressed, on its longer side, and no slice in memory between steps.
    "max_memory": {"resident": False, "side": "auto", "target_modules": "all-matrices"},
}


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config, with those of the preset that the key ``preset`` names.

    Raises:
        ValueError: there is no such preset; the sentence names the nearest. Or a base optimizer is named, which a
            config does not hold.
    """
    fields, base = with_preset(values)
    if base is not None:
        said = f"preset={values['preset']!r}" if "base" not in values else f"base={base!r}"
        raise ValueError(
            f"{said} names the optimizer that steps over the slices, which a GrassConfig does not hold: say so in "
            "optim_args or in a recipe, or give GrassConfig the fields and grass_optimizer(model, ...) the class."
        )
    return fields


def with_preset(values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Fields of a config, with those of the preset that the key ``preset`` names, and the base optimizer's name."""
    given = dict(values)
    name = given.pop("preset", None)
    if name is not None:
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset={unknown_key(str(name), PRESETS, 'a preset')}")
        preset = dict(PRESETS[name])
        if given.get("rank") is not None:  # it replaces the preset's other way of saying the same
            preset.pop("density", None)
            preset.pop("density_pattern", None)
        given = preset | given
    return given, given.pop("base", None)
