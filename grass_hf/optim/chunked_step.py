"""Stepping an optimizer over slices that are released between steps, a few at a time.

An optimizer whose state is per parameter takes the same step whether it sees its parameters at once or in parts:

    for some slices at a time:  load them from the weights,  step,  write them back,  release them

so that no more than `CHUNK_BYTES` of slices exist beside the weights: [Note: released slices] in `slices.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..slices.ops.grouping import groups_by_size
from ..slices.slice import Slice
from .driving import plain_class

# Slices that exist at a time. Large enough to keep a fused kernel busy, small beside any model worth the trouble.
CHUNK_BYTES = 64 * 2**20


def step_in_chunks(
    optimizer: torch.optim.Optimizer, original: Callable, slices: list[Slice], closure: Callable | None = None
) -> Any:
    """Take one step: the ordinary parameters first, then the slices in chunks.

    Args:
        optimizer: over ordinary parameters and slices.
        original: its own ``step``.
        slices: of the model.
        closure: re-evaluates the loss; called once, before anything is stepped.

    Returns:
        What `closure` returned, None without one.

    Raises:
        ValueError: the optimizer counts its steps in a parameter group, and would count every chunk.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    own = {id(slice_.active): slice_ for slice_ in slices}
    groups = optimizer.param_groups
    members = [group["params"] for group in groups]
    counters = _numbers(groups)
    try:
        for group, params in zip(groups, members, strict=True):
            group["params"] = [param for param in params if id(param) not in own]
        original()
        if _numbers(groups) != counters:
            raise ValueError(
                f"{plain_class(optimizer).__name__} keeps counters in its parameter groups, so it cannot be stepped in "
                "parts: use resident=True."
            )
        for group, params in zip(groups, members, strict=True):
            for other in groups:
                other["params"] = []
            released = [own[id(param)] for param in params if id(param) in own]
            for chunk in groups_by_size(released, lambda slice_: slice_.active.nbytes, CHUNK_BYTES):
                group["params"] = [slice_.active for slice_ in chunk]
                _step_chunk(original, chunk)
    finally:
        for group, params in zip(groups, members, strict=True):
            group["params"] = params
    return loss


def _step_chunk(original: Callable, chunk: list[Slice]) -> None:
    for slice_ in chunk:
        if slice_.is_released:
            slice_.hold()
    original()
    for slice_ in chunk:
        slice_.write_back()
        slice_.release()


def _numbers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if isinstance(value, (int, float))} for group in groups]
