"""What was written into one weight since somebody last asked: columns, and the elements in them that have other bits.

[Note: the delta is known] A weight with a slice changes in two ways only: a slice is written back, or decay is
multiplied into all of it. So the columns that were in the slice bound what can have changed, and where a slice is
written back the old values are still there to be compared with: r/m of the weight, at most one bit of memory per
element of the slice, and no copy of anything. A slice that takes other columns opens another entry; changes count from
where its first write began, so an element that has changed twice is there once.

Whatever else changes the weight (a state dict that is loaded, an edit by hand) leaves another mark on it than the last
write left, and the whole weight counts as changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .frozen_weight import FrozenWeight
from .ops.bits import Elements, differing
from .ops.int8 import is_int8
from .ops.sharding import is_partitioned, is_sharded
from .part import Part, local_part

if TYPE_CHECKING:
    from .slice import Slice

_LARGEST = torch.iinfo(torch.int32).max
# Elements whose places are computed at a time, so that what is made on the way stays in a CPU's caches.
_AT_A_TIME = 2**18

OUTSIDE = "changed by something other than its slice"
DECAYED = "multiplied by the weight decay that its columns were owed"


@dataclass
class Entry:
    """One selection that was written into the weight.

    Attributes:
        columns: int64 (..., r), as the slice numbers them, over all ranks.
        index: the same as this rank's part numbers them.
        version: mark of the slice's index.
        shape: of this rank's part of the slice.
        elements: that changed in that part; None for all of them.
        settling: whether it holds but rows that the selection before has too, at their nearest values.
        is_all: whether it is all columns, which decay was multiplied into.
    """

    columns: Tensor
    index: Tensor
    version: tuple[int, int]
    shape: torch.Size
    elements: Elements | None = None
    settling: bool = False
    is_all: bool = False


class Changes:
    """Of one slice's weight; `Slice.changes` while somebody keeps track of it.

    Args:
        slice_: the slice.
        step: says how many optimizer steps are done.
        compares: says whether elements are to be compared; else all elements of the columns count as changed.

    Attributes:
        entries: selections that were written since `forget`.
        whole: why the whole weight counts as changed, None if it does not.
    """

    def __init__(self, slice_: Slice, step: Callable[[], int], compares: Callable[[Slice], bool]):
        self.slice, self._step, self._compares = slice_, step, compares
        self.entries: list[Entry] = []
        self.whole: str | None = None
        self._written = -1
        self._mark = self._now()

    def __reduce_ex__(self, protocol: object) -> tuple:
        return type(None), ()  # nobody keeps track of a copy

    def put(self, held: Part, rows: Tensor, seed: str | None) -> None:
        """`Part.put`, with a note of what it changes."""
        self.look()
        entry = self._entry(held)
        if entry is not None and not self.whole and not self._compares(self.slice):
            entry.elements = None
        if entry is None or entry.elements is None or self.whole:
            held.put(rows, seed)
        else:
            held.replace(rows, seed, entry.elements)
        self._mark = self._now()

    def look(self) -> None:
        """Count the whole weight as changed where something else than a slice has written into it."""
        if self.whole is None and self._now() != self._mark:
            self.whole = OUTSIDE

    def decay(self, held: Part, factor: float, seed: str | None) -> None:
        """`Part.decay`, with a note of what it changes; a copy of this one weight exists meanwhile."""
        self.look()
        compared = self.whole is None and held.is_plain and self._compares(self.slice)
        before = held.weight.clone(memory_format=torch.contiguous_format) if compared else None
        held.decay(factor, seed)
        if before is not None:
            every = torch.arange(held.weight.shape[held.dim], device=held.weight.device)
            every = every.expand(*held.weight.shape[:-2], -1)
            changed = Elements(before.numel(), before.device)
            changed.add(differing(before, held.weight.contiguous()))
            self.entries.append(Entry(self._every(), every, (-1, -1), held.weight.shape, changed, is_all=True))
        else:
            self.whole = self.whole or DECAYED
        self._mark = self._now()

    def _every(self) -> Tensor:
        index = self.slice.index
        return torch.arange(self.slice.state.size, device=index.device).expand(*index.shape[:-1], -1)

    def take_mark(self) -> None:
        """What was written just now is known."""
        self._mark = self._now()

    def forget(self) -> None:
        """Begin anew: what there is now has been sent."""
        self.entries, self.whole, self._mark = [], None, self._now()

    def _entry(self, held: Part) -> Entry | None:
        """Where this write belongs; None where its columns are in the entry before already and are not compared."""
        index, step = self.slice.index, self._step()
        version = (index._version, index.data_ptr())
        again = self._written == step
        self._written = step
        last = next((entry for entry in reversed(self.entries) if not entry.is_all), None)
        if last is not None and last.version == version:
            last.settling = last.settling and again
            return last
        settling = again and last is not None
        if settling and not self._compares(self.slice):
            return None
        columns = index.detach().clone()
        own = columns if held.index is index else held.index.detach().clone()
        shape = held.active.shape
        # no element is known to be changed yet
        self.entries.append(Entry(columns, own, version, shape, Elements(shape.numel(), index.device), settling))
        return self.entries[-1]

    def _now(self) -> tuple:
        weight = self.slice.owner._parameters.get(self.slice.parameter)
        # an engine that has parts of its own reads ``.data`` all the time
        return mark(weight) if self.slice.rank_part is local_part else mark(weight)[:2]


def mark(weight: Any) -> tuple:
    """What is another after a weight was written to, as far as that can be told without looking at values."""
    if weight is None:
        return ()
    if is_partitioned(weight):
        return (id(weight.ds_tensor),)  # DeepSpeed writes through ``.data``, and its controller says when it loads
    reads = weight.reads if type(weight) is FrozenWeight else 0
    own = weight._local_tensor if is_sharded(weight) else weight
    own = own.int_data if is_int8(own) else own
    return own._version, own.data_ptr(), reads


def flat_positions(entry: Entry, dim: int, shape: torch.Size) -> Tensor:
    """Where the changed elements of an entry are in the weight of which `Entry.index` numbers the columns, read flat;
    int32 where that fits, else int64.

    Args:
        entry: of the weight.
        dim: along which columns (rows) are numbered.
        shape: of that weight.
    """
    dtype = index_dtype(shape)
    if entry.elements is not None:
        own: Iterable[Tensor] = entry.elements.blocks()
    else:
        own = torch.arange(entry.shape.numel(), device=entry.index.device).split(_AT_A_TIME)
    index = entry.index.to(dtype)
    return torch.cat([_flat(numbers.to(dtype), index, entry.shape, dim, shape) for numbers in own])


def _flat(own: Tensor, index: Tensor, part: torch.Size, dim: int, shape: torch.Size) -> Tensor:
    p, q = part[-2:]
    width = shape[-1]
    row = own // q  # counted over all matrices
    column = own - row * q
    if index.dim() == 1 and len(part) == 2:
        if dim == -2:
            return index.index_select(0, row) * width + column
        return row * width + index.index_select(0, column)
    matrix = row // p
    row = row - matrix * p
    index = index.reshape(-1, index.shape[-1])
    line = row if dim == -2 else column
    # one index for all matrices, or one for each
    chosen = index.reshape(-1).index_select(0, line + matrix * index.shape[-1] if index.shape[0] > 1 else line)
    if dim == -2:
        row = chosen
    else:
        column = chosen
    return (matrix * shape[-2] + row) * width + column


def index_dtype(shape: torch.Size) -> torch.dtype:
    """int32 where the numbers of a tensor's elements fit."""
    return torch.int32 if shape.numel() - 1 <= _LARGEST else torch.int64


def changes_of(slice_: Slice) -> Changes:
    """Of a slice that is followed."""
    changes: Any = slice_.changes
    return changes
