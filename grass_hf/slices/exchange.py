"""What moves between a weight and its active slice: loading, writing back, decay, and other rows.

[Note: rounding] A slice may hold more digits than its weight (float32 over bfloat16). While a row is being trained
the weight is its nearest value, so copying is idempotent. When the row leaves, what is below half a unit in the last
place of the weight would be lost; rounding up or down at random, with the probabilities that make the mean exact,
lets it arrive in the mean. The draws depend on (seed, step, name) alone, so resuming repeats them.

The functions are methods of `grass_hf.slices.slice.Slice`, whose class body names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .frozen_weight import FrozenWeight
from .low_bits import nearest
from .ops import sharding
from .ops.rounding import loses_digits, round_stochastically
from .ops.rows import along_slice, take_rows
from .ops.selection import Selection, seeded
from .part import local_part

if TYPE_CHECKING:
    from .slice import Slice


@torch.no_grad()
def write_back(part: Slice, seed: str | None = None) -> None:
    """Copy the active slice into the weight; idempotent. A released one is there already.

    Args:
        seed: of the draws, to round stochastically; None rounds to nearest. See [Note: rounding].
    """
    if part.is_released:
        return
    own = part.rank_part(part, seed is not None)
    rows = own.active if own.write is None else own.active * along_slice(own.write, part.dim)
    if seed is not None and loses_digits(own.weight.dtype, rows.dtype):
        rows = round_stochastically(rows, own.weight.dtype, seeded(seed + own.place, rows.device))
    if own.write is not None:
        # Padding repeats another row's number, so it must repeat its value.
        rows = take_rows(rows, Selection(own.index).first_positions(part.state.size), part.dim)
    if part.changes is None:
        own.put(rows, seed)
    else:
        part.changes.put(own, rows, seed)
    part.drift.note(part)


@torch.no_grad()
def write_back_all(parts: Iterable[Slice]) -> None:
    """`write_back` of many slices, to nearest: what every step does, so a slice that is plain has a short way."""
    for part in parts:
        active, weight = part._parameters["active"], part.owner._parameters.get(part.parameter)
        buffers: dict[str, Any] = part._buffers
        index, write = buffers["index"], buffers["write"]
        if (
            type(active) is not nn.Parameter
            or type(weight) is not FrozenWeight
            or write is not None
            or not part.resident
            or part.rank_part is not local_part
            or index.dim() > 1
            or part.changes is not None
        ):
            part.write_back()
            continue
        dtype = weight.dtype
        weight.index_copy_(part.dim, index, active if active.dtype is dtype else nearest(active, dtype))
        part.drift.note_plain(active, weight, dtype)


@torch.no_grad()
def settle_decay(part: Slice, seed: str | None = None) -> None:
    """Multiply into the rows outside the slice the weight decay they are owed.

    Args:
        seed: of the draws, to round a half-precision weight stochastically; None rounds to nearest.
    """
    if part.state.owed == 1.0:
        return
    with part.held():
        own = part.rank_part(part, False)
        if part.changes is None:
            own.decay(part.state.owed, seed)
        else:
            part.changes.decay(own, part.state.owed, seed)
        part.state.owed = 1.0
        part.write_back()


@torch.no_grad()
def load_selection(part: Slice, selection: Selection, seed: str | None = None) -> Tensor:
    """Write the old slice back and load another one.

    Rows that stay keep the slice's own values, which may be more precise than the weight's.

    Args:
        selection: of shape (..., r), on the CPU.
        seed: of the draws, to round leaving rows stochastically; None rounds to nearest.

    Returns:
        int64 (..., r) on the CPU: the old position of each row of the new slice, -1 for a fresh row; of this
        rank's part, where the slice is sharded.
    """
    with part.held():
        return _load_selection(part, selection, seed)


def _load_selection(part: Slice, selection: Selection, seed: str | None) -> Tensor:
    part.settle_decay(seed)
    part.write_back(seed)
    source = selection.positions_in(part.current_selection(), part.state.size)
    old = part.rank_part(part, True)
    kept, before = old.active.clone(), None if old.write is None else old.write.clone()
    part.index.copy_(selection.index)
    for kept_values, chosen in ((part.rho, selection.rho), (part.write, selection.write)):
        if kept_values is not None and chosen is not None:
            kept_values.copy_(chosen)
    own = part.rank_part(part, False)
    source = own.of(source).to(kept.device)
    values = own.take().to(kept.dtype)
    rows = take_rows(kept, source.clamp(min=0), part.dim)
    if before is not None:
        rows = rows * along_slice(before.gather(-1, source.clamp(min=0)), part.dim)
    values = torch.where(along_slice(source >= 0, part.dim), rows.to(values.dtype), values)
    if own.write is not None and own.rho is not None:
        values = values / along_slice(own.write, part.dim)
        values = values.masked_fill(along_slice(own.rho.eq(0), part.dim), 0.0)
    own.keep(values)
    if seed is not None:
        part.write_back()  # rows that stay are kept at their nearest value
    part.drift.note(part)
    return source.cpu()


def take_new_weight(part: Slice) -> None:
    """Follow a weight that a state dict has replaced: what its rows were owed is void, unless that was loaded just
    before, as torch.distributed.checkpoint does, which loads the optimizer first."""
    if not part.state.recalled:
        part.state.owed = 1.0
        part.low = None  # the bits belonged to other numbers
    part.reload()


@torch.no_grad()
def reload(part: Slice) -> None:
    """Bring the slice in line with a weight that was changed from outside, by loading a checkpoint say.

    A slice that already agrees with the weight is left alone: it may hold more digits than the weight.
    """
    if part.is_released or sharding.is_partitioned(part.weight):
        return  # of a partitioned one every rank would have to join; DeepSpeed loads slices itself
    own = part.rank_part(part, False)
    if own.active.is_meta or own.weight.is_meta:
        return
    if not own.agrees():
        own.keep(own.loaded(own.active.dtype))
    part.drift.note(part)


def current_selection(part: Slice) -> Selection:
    """The rows in the slice now, on the CPU."""
    rho, write = (None if v is None else v.double().cpu() for v in (part.rho, part.write))
    return Selection(part.index.cpu(), rho, write)


def mark_trained(part: Slice, turn: int) -> None:
    """Note that the rows in the slice have been trained in a turn."""
    part.state.trained.scatter_(-1, part.index.cpu(), turn)
