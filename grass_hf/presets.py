"""Named sets of settings: a name stands for fields of `GrassConfig`, and fields given beside it override them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import unknown_key

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
    # Every matrix compressed, on its longer side, and no slice in memory between steps.
    "max_memory": {"resident": False, "side": "auto", "target_modules": "all-matrices"},
}


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config, with those of the preset that the key ``preset`` names.

    Raises:
        ValueError: there is no such preset; the sentence names the nearest.
    """
    given = dict(values)
    name = given.pop("preset", None)
    if name is None:
        return given
    if name not in PRESETS:
        raise ValueError(f"preset={unknown_key(str(name), PRESETS, 'a preset')}")
    preset = dict(PRESETS[name])
    if given.get("rank") is not None:  # it replaces the preset's other way of saying the same
        preset.pop("density", None)
    return preset | given
