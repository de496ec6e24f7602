"""What a run must remember to resume bit for bit, as the entry ``"grass"`` of the optimizer's state dict.

Tensors and plain types only, so that ``torch.load(weights_only=True)`` reads it. The model's own checkpoint stays
plain: it holds the weights exactly as the next forward pass would use them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .controller import GrassController

logger = logging.getLogger(__name__)

KEY = "grass"
VERSION = 2
_TENSORS = ("active", "index", "rho", "write")


def add(state_dict: dict[str, Any], controller: GrassController) -> dict[str, Any]:
    """Add the entry to an optimizer's state dict; its tensors are references, as the optimizer's own are."""
    layers = {}
    for layer in controller.slices:
        state = layer.state
        entry = {name: tensor.detach() for name in _TENSORS if (tensor := getattr(layer, name)) is not None}
        entry.update(
            side=layer.side,
            owed=state.owed,
            trained=state.trained,
            energy=state.energy,
            reset_step=state.reset_step,
        )
        layers[state.name] = entry
    state_dict[KEY] = {
        "version": VERSION,
        "config": controller.config.to_dict(),
        "step": controller.step,
        "due": sorted(controller.due),
        "layers": layers,
    }
    return state_dict


def restore(state_dict: dict[str, Any], controller: GrassController) -> None:
    """Put the entry back into the model and the controller, before the optimizer loads the rest.

    Raises:
        ValueError: the state dict was not written by Grass, or by another shape of run. Nothing is changed then.
    """
    entry = state_dict.get(KEY)
    _check(entry, controller)
    controller.step = entry["step"]
    controller.due = set(entry["due"])
    with torch.no_grad():
        for layer in controller.slices:
            saved, state = entry["layers"][layer.state.name], layer.state
            for name in _TENSORS:
                if name in saved:
                    getattr(layer, name).copy_(saved[name])
            state.owed = saved["owed"]
            state.trained = saved["trained"].cpu().clone()
            state.energy = saved["energy"] and tuple(saved["energy"])
            state.reset_step = saved["reset_step"]
    controller.look_ahead()


def _check(entry: Any, controller: GrassController) -> None:
    if not isinstance(entry, dict):
        raise ValueError(
            "this optimizer state was not written by a Grass run, it has no 'grass' entry: resume from a checkpoint of "
            "one, or start anew from its weights alone (model_name_or_path)."
        )
    if entry["version"] != VERSION:
        raise ValueError(
            f"this optimizer state has Grass format {entry['version']}, and this grass-hf reads format {VERSION}: "
            "resume with the version that wrote it."
        )
    layers = {layer.state.name: layer for layer in controller.slices}
    saved = entry["layers"]
    if saved.keys() != layers.keys():
        name = sorted(saved.keys() ^ layers.keys())[0]
        where = "the checkpoint and not in this run" if name in saved else "this run and not in the checkpoint"
        raise ValueError(f"{name} is a Grass layer in {where}: resume with the same target_modules, rank and model.")
    for name, layer in layers.items():
        if saved[name]["active"].shape != layer.active.shape or saved[name]["side"] != layer.side:
            raise ValueError(
                f"{name} has a slice of shape {tuple(layer.active.shape)} on side={layer.side!r}, the checkpoint one "
                f"of {tuple(saved[name]['active'].shape)} on side={saved[name]['side']!r}: resume with the same rank "
                "and side."
            )
        if ("rho" in saved[name]) != (layer.rho is not None):
            raise ValueError(
                f"{name}: the checkpoint was written with selection={entry['config']['selection']!r}, this run has "
                f"{controller.config.selection!r}, and one of them weights its rows: resume with the same selection."
            )
    now = controller.config.to_dict()
    changed = [key for key, value in entry["config"].items() if now.get(key) != value]
    if changed:
        logger.warning(
            "resuming with other settings than the checkpoint's: %s",
            ", ".join(f"{key}={now.get(key)!r} (was {entry['config'][key]!r})" for key in changed),
        )
