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
from torch._subclasses.fake_tensor import FakeTensor

from .frozen_weight import FrozenWeight
from .low_bits import rounded
from .ops import sharding
from .ops.bits import fingerprint
from .ops.rounding import loses_digits, round_stochastically
from .ops.rows import along_slice, take_rows
from .ops.selection import Selection, seeded
from .part import local_part

if TYPE_CHECKING:
    from .slice import Slice


@torch.no_grad()
def write_back(slice_: Slice, seed: str | None = None) -> None:
    """Copy the active slice into the weight; idempotent. A released one is there already.

    Args:
        seed: of the draws, to round stochastically; None rounds to nearest. See [Note: rounding].
    """
    if slice_.is_released:
        return
    own = slice_.rank_part(slice_, seed is not None)
    rows = own.active if own.write is None else own.active * along_slice(own.write, slice_.dim)
    if seed is None and slice_.wide is not None and own.weight.dtype == torch.bfloat16 and own.is_plain:
        rows = rounded(rows)
    if seed is not None and loses_digits(own.weight.dtype, rows.dtype):
        rows = round_stochastically(rows, own.weight.dtype, seeded(seed + own.place, rows.device))
    if own.write is not None:
        # Padding repeats another row's number, so it must repeat its value.
        rows = take_rows(rows, Selection(own.index).first_positions(slice_.state.size), slice_.dim)
    if slice_.changes is None:
        own.put(rows, seed)
    else:
        slice_.changes.put(own, rows, seed)
    slice_.drift.note(slice_)


@torch.no_grad()
def write_back_all(slices: Iterable[Slice]) -> None:
    """`write_back` of many slices, to nearest: what every step does, so a slice that is plain has a short way."""
    for slice_ in slices:
        active, weight = slice_._parameters["active"], slice_.owner._parameters.get(slice_.parameter)
        buffers: dict[str, Any] = slice_._buffers
        index, write = buffers["index"], buffers["write"]
        if (
            type(active) is not nn.Parameter
            or type(weight) is not FrozenWeight
            or write is not None
            or not slice_.resident
            or slice_.rank_part is not local_part
            or index.dim() > 1
            or slice_.changes is not None
        ):
            slice_.write_back()
            continue
        dtype = weight.dtype
        weight.index_copy_(slice_.dim, index, active if active.dtype is dtype else active.to(dtype))
        slice_.drift.note_plain(active, weight, dtype)


@torch.no_grad()
def settle_decay(slice_: Slice, seed: str | None = None) -> None:
    """Multiply into the rows outside the slice the weight decay they are owed.

    Args:
        seed: of the draws, to round a half-precision weight stochastically; None rounds to nearest.
    """
    if slice_.state.owed == 1.0:
        return
    with slice_.held():
        own = slice_.rank_part(slice_, False)
        if slice_.changes is None:
            own.decay(slice_.state.owed, seed)
        else:
            slice_.changes.decay(own, slice_.state.owed, seed)
        slice_.state.owed = 1.0
        slice_.drift.left = None
        slice_.write_back()


@torch.no_grad()
def load_selection(slice_: Slice, selection: Selection, seed: str | None = None) -> Tensor:
    """Write the old slice back and load another one.

    Rows that stay keep the slice's own values, which may be more precise than the weight's.

    Args:
        selection: of shape (..., r), on the CPU.
        seed: of the draws, to round leaving rows stochastically; None rounds to nearest.

    Returns:
        int64 (..., r) on the CPU: the old position of each row of the new slice, -1 for a fresh row; of this
        rank's part, where the slice is sharded.
    """
    with slice_.held():
        return _load_selection(slice_, selection, seed)


def _load_selection(slice_: Slice, selection: Selection, seed: str | None) -> Tensor:
    slice_.settle_decay(seed)
    slice_.write_back(seed)
    source = selection.positions_in(slice_.current_selection(), slice_.state.size)
    old = slice_.rank_part(slice_, True)
    kept, before = old.active.clone(), None if old.write is None else old.write.clone()
    old_index = old.index.clone()
    slice_.index.copy_(selection.index)
    for kept_values, chosen in ((slice_.rho, selection.rho), (slice_.write, selection.write)):
        if kept_values is not None and chosen is not None:
            kept_values.copy_(chosen)
    own = slice_.rank_part(slice_, False)
    source = own.of(source).to(kept.device)
    values = own.take().to(kept.dtype)
    rows = take_rows(kept, source.clamp(min=0), slice_.dim)
    if before is not None:
        rows = rows * along_slice(before.gather(-1, source.clamp(min=0)), slice_.dim)
    values = torch.where(along_slice(source >= 0, slice_.dim), rows.to(values.dtype), values)
    if own.write is not None and own.rho is not None:
        values = values / along_slice(own.write, slice_.dim)
        values = values.masked_fill(along_slice(own.rho.eq(0), slice_.dim), 0.0)
    own.keep(values)
    if seed is not None:
        slice_.write_back()  # rows that stay are kept at their nearest value
    slice_.drift.note(slice_)
    if own.index.dim() == 1 and own.is_plain and not isinstance(own.index, FakeTensor):  # an estimator's has no values
        gone = old_index[~torch.isin(old_index, own.index)][:1].tolist()
        slice_.drift.left = (gone[0], fingerprint(own.weight.select(slice_.dim, gone[0]))) if gone else None
    return source.cpu()


def take_new_weight(slice_: Slice) -> None:
    """Follow a weight that a state dict has replaced: what its rows were owed is void, unless that was loaded just
    before, as torch.distributed.checkpoint does, which loads the optimizer first."""
    if not slice_.state.recalled:
        slice_.state.owed = 1.0
        slice_.low = None  # the bits belonged to other numbers
    slice_.reload()


@torch.no_grad()
def follow_edit(slice_: Slice) -> None:
    """Follow a weight that was changed in place: if it was edited (clipped, masked), the decay of its other rows is due
    still, which training without Grass would have multiplied in before; not if it is another weight now."""
    if not slice_.rank_part(slice_, False).partly_agrees():
        slice_.take_new_weight()
    slice_.reload()


@torch.no_grad()
def reload(slice_: Slice) -> None:
    """Bring the slice in line with a weight that was changed from outside, by loading a checkpoint say.

    A slice that already agrees with the weight is left alone: it may hold more digits than the weight.
    """
    if slice_.is_released or sharding.is_partitioned(slice_.weight):
        return  # of a partitioned one every rank would have to join; DeepSpeed loads slices itself
    own = slice_.rank_part(slice_, False)
    if own.active.is_meta or own.weight.is_meta:
        return
    if not own.agrees():
        own.keep(own.loaded(own.active.dtype))
        slice_.drift.left = None
    slice_.drift.note(slice_)


def current_selection(slice_: Slice) -> Selection:
    """The rows in the slice now, on the CPU."""
    rho, write = (None if v is None else v.double().cpu() for v in (slice_.rho, slice_.write))
    return Selection(slice_.index.cpu(), rho, write)


def mark_trained(slice_: Slice, turn: int) -> None:
    """Note that the rows in the slice have been trained in a turn."""
    slice_.state.trained.scatter_(-1, slice_.index.cpu(), turn)
