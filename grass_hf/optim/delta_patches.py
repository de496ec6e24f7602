"""Patches: the changed part of one tensor, as elements, as columns, or as a run of all elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..slices.changes import Entry, changes_of, flat_positions, index_dtype
from ..slices.ops.bits import as_bits
from ..slices.ops.rows import take_rows
from ..slices.own_values import OwnValues
from ..slices.slice import Slice


@dataclass(frozen=True)
class Patch:
    """New values of a part of one tensor of the plain state dict.

    Attributes:
        name: of the tensor.
        shape: of the tensor, all ranks' parts of it.
        values: (k,) for elements and runs, of the tensor's shape where it is whole, else the columns.
        index: int32 or int64, of the elements (k,) in the tensor read flat, or of the columns (..., k); None for a run.
        dim: -2 or -1 for columns, else None.
        start: first element of a run.
        bound: elements that could have changed.
    """

    name: str
    shape: torch.Size
    values: Tensor
    index: Tensor | None = None
    dim: int | None = None
    start: int = 0
    bound: int = 0

    @property
    def kind(self) -> str:
        """ "columns", "elements" or "run"."""
        return "columns" if self.dim is not None else "run" if self.index is None else "elements"

    @property
    def nbytes(self) -> int:
        """Of values and indices."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)

    def flat(self) -> Tensor | None:
        """Indices of the elements; None for a tensor that is whole."""
        if self.kind != "run" or self.values.numel() == self.shape.numel():
            return self.index
        numbers = torch.arange(self.start, self.start + self.values.numel(), device=self.values.device)
        return numbers.to(index_dtype(self.shape))


@dataclass
class Sync:
    """One synchronisation, as far as this rank spoke in it.

    Attributes:
        number: 1 for the first of a run.
        step: optimizer steps done.
        elements: that were sent.
        bound: elements of the columns that were in slices, of parameters that are trained in full and of buffers, and
            of what was sent whole: more is never sent.
        whole: reason by name, for each weight that has a slice and was sent whole.
        is_full: whether all weights that have slices were sent whole.
    """

    number: int
    step: int
    elements: int = 0
    bound: int = 0
    whole: dict[str, str] = field(default_factory=dict)
    is_full: bool = False


def whole(name: str, own: OwnValues) -> Patch:
    """All that this rank has of a tensor."""
    values = own.all()
    values = values.view(own.shape) if own.is_whole else values
    return Patch(name, own.shape, values, start=own.start, bound=own.count)


def of_copy(name: str, own: OwnValues, copy: Tensor, columns: bool | None) -> Iterator[Patch]:
    """What differs from a copy; all of it where that takes fewer bytes, or as columns are asked for."""
    values = own.all()
    changed = as_bits(values) != as_bits(copy)
    count = int(changed.sum())
    if not count:
        return
    dtype = index_dtype(own.shape)
    if columns or (columns is None and count * (values.element_size() + dtype.itemsize) >= values.nbytes):
        yield whole(name, own)
        return
    flat = changed.nonzero().squeeze(1)
    yield Patch(name, own.shape, values[flat], (flat + own.start).to(dtype), bound=own.count)


def of_slice(name: str, slice_: Slice, own: OwnValues, columns: bool | None) -> Iterator[Patch]:
    """What was written into the weight of a slice."""
    entries = changes_of(slice_).entries
    selected = [entry for entry in entries if not entry.settling]
    if not selected:
        return
    bound = sum(entry.shape.numel() for entry in selected)
    if columns:
        if not own.is_whole:
            raise ValueError(
                f"{name} is sharded, and this rank has parts of its columns: use patches(), which gives their elements."
            )
        yield _columns(name, slice_, own, selected, bound)
        return
    bound = min(bound, own.count)
    dtype = index_dtype(own.shape)
    flat = _flat(slice_, own, entries)
    if columns is None and own.is_whole:
        lines = sum(entry.index.numel() for entry in selected)
        if flat.numel() * (own.dtype.itemsize + dtype.itemsize) > bound * own.dtype.itemsize + lines * 4:
            yield _columns(name, slice_, own, selected, bound)
            return
    if flat.numel():
        yield Patch(name, own.shape, own.at(flat), (flat + own.start).to(dtype), bound=bound)


def _flat(slice_: Slice, own: OwnValues, entries: list[Entry]) -> Tensor:
    """Ascending, int32 where that fits: the changed elements, counted from this rank's first."""
    shape = own.tensor.shape if own.tensor.dim() > 1 else own.shape  # a run of ZeRO-3 is numbered over the whole
    first = 0 if own.tensor.dim() > 1 else own.start
    found = [flat_positions(entry, slice_.dim, shape) - first for entry in entries]
    flat = torch.cat(found) if found[1:] else found[0]
    if found[1:] or not _ascends(entries[0].index):
        flat = flat.unique()
    if own.tensor.dim() == 1:  # of a run all elements of the columns may be asked for
        flat = flat[(flat >= 0) & (flat < own.count)]
    return flat


def _ascends(index: Tensor) -> bool:
    return bool((index.diff(dim=-1) > 0).all())


def _columns(name: str, slice_: Slice, own: OwnValues, entries: list[Entry], bound: int) -> Patch:
    if any(entry.is_all for entry in entries):
        return whole(name, own)
    index = entries[0].index if not entries[1:] else torch.cat([entry.index for entry in entries], dim=-1)
    if index.dim() == 1 and (entries[1:] or slice_.rho is not None):
        index = index.unique()
    plain = own.all().view(own.shape)
    return Patch(name, own.shape, take_rows(plain, index, slice_.dim), index.int(), slice_.dim, bound=bound)
