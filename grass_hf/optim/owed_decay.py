"""Weight decay of the rows outside a slice: noted at every step, multiplied in when other rows are chosen.

owed *= 1 - lr * weight_decay        each step, for the rows not trained
"""

from __future__ import annotations

from typing import Any

from ..slices.slice import Slice
from .parameter_groups import distinct


def owe(slices: list[Slice], groups: dict[int, dict[str, Any]], everywhere: bool) -> None:
    """Note a step that has been taken.

    Args:
        slices: the slices.
        groups: the parameter group of each slice, by the id of its parameter.
        everywhere: whether rows outside the slices decay too, ``decay="all"``.
    """
    factors = {id(group): _factor(group) for group in distinct(groups.values())} if everywhere else {}
    for slice_ in slices:
        state = slice_.state
        state.recalled = False
        active: Any = slice_._parameters["active"]
        if factors and active.requires_grad and (state.rank < state.size or slice_.rho is not None):
            state.owed *= factors[id(groups[id(active)])]


def _factor(group: dict[str, Any]) -> float:
    decay = group.get("weight_decay") or 0.0
    return 1.0 - float(group["lr"]) * float(decay) if decay else 1.0
