"""Stepping an optimizer over slices that are released between steps, a few at a time.

An optimizer whose state is per parameter takes the same step whether it sees its parameters at once or in parts:

    for some slices at a time:  load them from the weights,  step,  write them back,  release them

so that no more than `CHUNK_BYTES` of slices exist beside the weights: [Note: released slices] in `slices.released`.

[Note: stand-ins] Where a slice is stepped in another dtype than its parameter has, or keeps bits beside its weight, the
optimizer is given a float32 parameter in its place for that moment, with its gradient and its state. So state is made
in float32, and the slice's own parameter, which DDP, schedulers and checkpoints know, is never exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
            for chunk in groups_by_size(released, _stepped_bytes, CHUNK_BYTES):
                _step_chunk(optimizer, group, original, chunk)
    finally:
        for group, params in zip(groups, members, strict=True):
            group["params"] = params
    return loss


def stepped_dtype(param: nn.Parameter, slices: list[Slice]) -> torch.dtype:
    """The dtype of what the optimizer is given for a parameter."""
    return next((slice_.stepped for slice_ in slices if slice_.active is param), param.dtype)


def widen_state(optimizer: torch.optim.Optimizer, slices: list[Slice]) -> None:
    """Give state that an optimizer made with itself (Adagrad's) the dtype in which its slices are stepped."""
    for slice_ in slices:
        state = optimizer.state.get(slice_.active, {}) if slice_.keeps_low else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (
                slice_.active.shape,
                slice_.active.dtype,
            ):
                state[key] = value.to(slice_.stepped)


def _step_chunk(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], original: Callable, chunk: list[Slice]
) -> None:
    try:
        for slice_ in chunk:
            slice_.widen()
        with _stand_ins(optimizer, group, chunk):
            original()
        for slice_ in chunk:
            slice_.write_back()
            slice_.release()
    except BaseException:
        for slice_ in chunk:
            slice_.abandon()
        raise


@contextmanager
def _stand_ins(optimizer: torch.optim.Optimizer, group: dict[str, Any], chunk: list[Slice]) -> Iterator[None]:
    """A group of the slices of a chunk; see [Note: stand-ins]."""
    params = [slice_.active if slice_.wide is None else _stand_in(slice_, slice_.wide) for slice_ in chunk]
    pairs = [(slice_, param) for slice_, param in zip(chunk, params, strict=True) if slice_.wide is not None]
    state = optimizer.state
    for slice_, param in pairs:
        if slice_.active in state:
            state[param] = state.pop(slice_.active)
    group["params"] = params
    try:
        yield
    finally:
        group["params"] = []
        for slice_, param in pairs:
            if param in state:
                state[slice_.active] = state.pop(param)
            slice_.wide, param.grad = param.detach(), None


def _stand_in(slice_: Slice, wide: Tensor) -> nn.Parameter:
    """See [Note: stand-ins]."""
    param = nn.Parameter(wide)
    if slice_.active.grad is not None:
        param.grad = slice_.active.grad.to(param.dtype)
    return param


def _stepped_bytes(slice_: Slice) -> int:
    return slice_.active.numel() * slice_.stepped.itemsize


def _numbers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if isinstance(value, (int, float))} for group in groups]
