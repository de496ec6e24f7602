"""Optimizer state that follows its rows when a slice is loaded with others.

Rows that stay keep their state, fresh rows start from what the optimizer gives a new parameter (zero, nearly
always). State is recognised by its shape, so any optimizer whose state is per element (AdamW, Lion, SGD ...), per
row and column (Adafactor) or block-quantised (bitsandbytes, torchao) can carry; anything else says so.

The step counter of an Adam-type optimizer is one for the whole slice and goes on counting, so the first updates of
a fresh row lack the bias correction; `grass_hf.optim.fresh_moments` gives its second moment a value to begin with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..slices.ops.rows import take_rows
from ..slices.ops.sharding import local
from .fresh_moments import Seed, along

# Where optimizers keep averages of squared gradients: torch's and torchao's Adams, Adafactor (torch's, transformers'),
# RMSprop, bitsandbytes.
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"}
_SECOND_MOMENTS |= {"square_avg", "state2"}
# bitsandbytes quantises optimizer state in blocks of this many elements (optimizer.py, init_state)
_BNB_BLOCK = 256
# Numbers that torchao quantises at a time.
_QUANTISED = 2**20


def carry_rows(
    state: dict[str, Any],
    shape: torch.Size,
    dim: int,
    source: Tensor,
    group: dict[str, Any],
    name: str,
    seed: Seed | None = None,
) -> None:
    """Move the per-row state of one slice, in place.

    Args:
        state: ``optimizer.state[active]``; empty before the first step.
        shape: of the slice, of this rank's part of it where it is sharded.
        dim: dimension, -2 or -1, of the slice along which rows are selected.
        source: int64 (..., r) on the CPU: the old position of each new row, -1 for a fresh row.
        group: the slice's parameter group.
        name: of the layer, for errors.
        seed: what fresh rows have as their second moment; None gives them a new parameter's.

    Raises:
        ValueError: some state belongs to rows in a way that is not understood.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or _is_codebook(key):
            continue
        value = local(value)
        axis = _row_axis(key, value, shape, dim, state)
        if axis is None:
            continue
        if axis == "unknown":
            raise ValueError(
                f"{name}: the optimizer keeps {key!r} of shape {tuple(value.shape)} for a slice of shape "
                f"{tuple(shape)}, which cannot be carried from row to row: use state_policy='reset'."
            )
        fresh = seed if seed is not None and key in _SECOND_MOMENTS else _fresh_value(key, group)
        move = functools.partial(_moved, source=source, fresh=fresh)
        if key in ("state1", "state2") and value.dtype == torch.uint8:
            _carry_bitsandbytes(state, key, shape, axis, move)
        elif callable(dequantize := getattr(value, "dequantize", None)) and type(value) is not Tensor:
            _quantise(value, move(dequantize(), axis))
        else:
            value.copy_(move(value, axis))


def _quantise(state: Any, values: Tensor) -> None:
    """Overwrite torchao's quantised state, whose own `copy_` does it; some at a time, because it looks for every code
    in whole numbers of 64 bits."""
    if type(state).__name__ != "OptimState8bit":
        state.copy_(values)
        return
    blocks = _QUANTISED // state.block_size
    pieces = state.codes.view(-1).split(blocks * state.block_size), state.scale.split(blocks)
    for codes, scale, own in zip(*pieces, values.reshape(-1).split(blocks * state.block_size), strict=True):
        type(state)(codes, scale, state.qmap, state.signed).copy_(own)


def _row_axis(
    key: str, value: Tensor, shape: torch.Size, dim: int, state: dict[str, Any]
) -> int | Literal["unknown"] | None:
    """Negative dimension of a state tensor along which the slice's rows lie, None if it holds nothing per row."""
    batch, (rows, columns) = tuple(shape[:-2]), shape[-2:]
    if value.shape[-len(shape) :] == shape:
        return dim
    # torch's Adafactor keeps the dimension it averaged over
    if value.shape in ((*batch, rows, 1), (*batch, 1, columns)):
        along = -2 if value.shape[-1] == 1 else -1
        return along if along == dim else None
    if value.shape in ((*batch, rows), (*batch, columns)):
        # factored statistics, as Adafactor's: one vector along each dimension
        along = -2 if value.shape[-1] == rows else -1
        if rows == columns:
            if ("row" in key) == ("col" in key):
                return "unknown"
            along = -2 if "row" in key else -1
        return -1 if along == dim else None
    if key.startswith("absmax") and "state1" in state:
        return None  # moved together with the codes
    return None if value.numel() == 1 else "unknown"


def _is_codebook(key: str) -> bool:
    return key.startswith("qmap")


def _fresh_value(key: str, group: dict[str, Any]) -> float:
    """What the optimizer would put there for a new parameter."""
    if key == "sum":
        return group.get("initial_accumulator_value", 0.0)  # Adagrad
    if key == "step_size":
        return float(group["lr"])  # Rprop
    return 0.0


def _moved(value: Tensor, axis: int, source: Tensor, fresh: float | Seed) -> Tensor:
    """A state's rows by their old positions; fresh rows hold a number, or their seeds."""
    source = source.to(value.device)
    chosen, is_fresh = source.clamp(min=0), source < 0
    if source.dim() == 1:
        moved = value.index_select(axis, chosen)
    elif value.dim() == source.dim():  # factored: one number per row
        axis, moved = -1, value.gather(-1, chosen)
    else:
        moved = take_rows(value, chosen, axis)
    # a mask and not the numbers of fresh rows, whose count the estimator's fake tensors do not know
    mask = along(is_fresh, value, axis)
    if isinstance(fresh, Seed):
        return torch.where(mask, fresh.of(value, axis), moved)
    return moved.masked_fill_(mask, fresh)


def _carry_bitsandbytes(
    state: dict[str, Any], key: str, shape: torch.Size, axis: int, move: Callable[[Tensor, int], Tensor]
) -> None:
    import bitsandbytes.functional as bnb

    number = key[-1]
    codes, absmax, code = state[key], state["absmax" + number], state["qmap" + number]
    # AdEMAMix stacks two averages in one tensor, each quantised for itself
    stacked = codes.view(-1, *shape).unbind(0)
    for part, part_absmax in zip(stacked, absmax.view(len(stacked), -1).unbind(0), strict=True):
        values = bnb.dequantize_blockwise(part, absmax=part_absmax, code=code, blocksize=_BNB_BLOCK)
        moved = move(values, axis).contiguous()
        quantised, new = bnb.quantize_blockwise(moved, code=code, blocksize=_BNB_BLOCK)
        # its kernel for CPUs takes 6e-5 of the block's largest value for the code nearest to zero
        part.copy_(torch.where(moved == 0, (code == 0).byte().argmax().byte(), quantised))
        part_absmax.copy_(new.absmax)
