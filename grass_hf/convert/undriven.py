"""Optimizers that hold slices and do not drive them.

Their steps would move slices away from their weights, and the model would never see it. torch lets a hook look at every
step of every `torch.optim.Optimizer` before it is taken: such a one is stopped before it changes anything. What torch
has never heard of is found by `grass_hf.slices.drift` in the forward pass after.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..slices.slice import Slice, living_slices, slices_made
from .record import conversion_over, is_stepped


def _drives(optimizer: object) -> bool:
    """Whether it is an instance of a class of `grass_hf.optim.driving`."""
    return getattr(type(optimizer), "drives_slices", False)


@functools.cache
def watch_steps() -> None:
    """Look at every optimizer step of this process from now on; once is enough."""
    register_optimizer_step_pre_hook(_refuse_undriven)


def _refuse_undriven(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _drives(optimizer):
        return
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    known = (slices_made(), len(held))
    if _harmless.get(optimizer) == known:
        return
    slices = {id(slice_.active): slice_ for slice_ in living_slices()}
    found = [slices[number] for number in held if number in slices]
    if found and not _belongs_to_driving(optimizer, found[0]):
        raise RuntimeError(_undriven(optimizer, found[0], "holds the slice of {}, and does not drive it"))
    if not found:
        weights = {id(slice_.owner._parameters.get(slice_.parameter)): slice_ for slice_ in slices.values()}
        found = [weights[number] for number in held if number in weights]
        conversion = conversion_over(found[:1])
        if conversion is not None and conversion.driver is None:
            what = "was made before the conversion and holds the whole weight of {}, which is frozen now"
            raise RuntimeError(_undriven(optimizer, found[0], what))
        _harmless[optimizer] = known


# The number of slices ever made, and of parameters, when an optimizer was last found to hold no slice.
_harmless: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()


def _belongs_to_driving(optimizer: torch.optim.Optimizer, slice_: Slice) -> bool:
    """Whether an optimizer steps within one that drives the slice, or has such a one inside."""
    return is_stepped(slice_) or any(_drives(value) for value in vars(optimizer).values())


def _undriven(optimizer: torch.optim.Optimizer, slice_: Slice, what: str) -> str:
    kind = type(optimizer).__name__
    return (
        f"this {kind} {what.format(slice_.state.name)}: its steps would not reach the weights. Make it with "
        f"grass_optimizer(model, {kind}, lr=...) after convert_to_grass, or let the Trainer make it."
    )
