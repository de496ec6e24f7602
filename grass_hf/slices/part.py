"""What a slice remembers, and which part of it one rank holds.

Under FSDP2 weight and slice are sharded on their first dimension. Where rows are selected, blocks of the slice choose
among the rows of the weight's shard that the same rank holds (`selection.bounds`); where columns are selected, or each
expert selects for itself, every choice is local anyway. So all that is done to a slice is done to a rank's own part.
Another engine may split weights up in another way: it gives `Slice.rank_part` a function that returns its own `Part`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops import int8, sharding
from .ops.rounding import loses_digits, round_stochastically
from .ops.rows import along_slice, put_rows, take_columns, take_rows
from .ops.selection import bounds, seeded

if TYPE_CHECKING:
    from .slice import Slice

# Rows of a weight that are converted to float32 at a time, to multiply decay into a half-precision weight.
_DECAY_BLOCK = 256
# The share of values that agree by chance is smaller, in half precision too.
_EDITED = 0.1
# Elements of it on a GPU; see `_rows_at_a_time`.
_DECAY_ELEMENTS = 2**24


@dataclass
class SliceState:
    """What one slice remembers between steps, beside its tensors; the controller keeps it.

    Attributes:
        name: qualified name of the layer (of the parameter, for experts), without wrappers' prefixes.
        size: rows on the selected side.
        rank: rows of the slice, r.
        phase: the slice selects at steps phase, phase + K, phase + 2K, ...
        leader: name under which it chooses rows; slices that share an index have the same.
        blocks: parts of the side that choose rows for themselves.
        owed: factor of weight decay that the rows outside the slice have not had yet.
        recalled: whether it came with an optimizer's state, and no step has been taken since.
        trained: int32 (size,) or (E, size), the turn in which each row was last trained, -1 if never; on the CPU.
        energy: squared gradient norm of the rows selected last and of all rows, at that observation.
        reset_step: step at which the optimizer state was last dropped, None if never.
    """

    name: str
    size: int
    rank: int
    phase: int = 0
    leader: str = ""
    blocks: int = 1
    owed: float = 1.0
    recalled: bool = False
    trained: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    energy: tuple[float, float] | None = None
    reset_step: int | None = None


@dataclass
class Part:
    """What one rank holds of a weight and its slice, and how it reads and writes them.

    Attributes:
        weight, active, index, rho, write, dim: as `Slice`'s; rows are numbered within this rank's part.
        place: distinguishes the parts' draws; empty without FSDP.
        rows: the part's range of the slice's rows (or of the experts), None for all.
    """

    weight: Tensor
    active: Tensor
    index: Tensor
    rho: Tensor | None
    write: Tensor | None
    dim: int
    place: str
    rows: slice | None = None

    @property
    def _padding(self) -> Tensor:
        """Where rows stand that only fill the slice up, of one that has multipliers."""
        assert self.rho is not None
        return self.rho.eq(0)

    def of(self, positions: Tensor) -> Tensor:
        """This part of a vector over the slice's rows that holds positions in the slice, -1 for none."""
        if self.rows is None:
            return positions
        own = positions[self.rows]
        return own if own.dim() > 1 else torch.where(own >= 0, own - self.rows.start, own)

    def take(self) -> Tensor:
        """The weight's rows (columns) `index`, shaped like the slice and in the weight's dtype."""
        return take_rows(self.weight, self.index, self.dim)

    # whether the weight holds what is put into it, rounded to its dtype
    is_plain = True

    def stored(self) -> Tensor:
        """The rows (columns) `index` as a plain checkpoint has them, shaped like the slice; without a collective, what
        other ranks hold of them is zero."""
        if self.dim == -1 and self.index.dim() == 1:
            return take_columns(self.weight, self.index)
        return self.take()

    def loaded(self, dtype: torch.dtype) -> Tensor:
        """What a slice of a dtype holds that agrees with the weight: ``weight[index] / write``, zero at padding."""
        rows = self.take().to(dtype)
        if self.write is None:
            return rows
        return (rows / along_slice(self.write, self.dim)).masked_fill(along_slice(self._padding, self.dim), 0.0)

    def put(self, rows: Tensor, seed: str | None = None) -> None:
        """Overwrite the weight's rows (columns) `index`; numbers that occur twice must come with equal values.

        Args:
            rows: shaped like the slice; rounded to the weight's dtype if it is a plain one.
            seed: of the draws, for weights that are stored in another way; None rounds to nearest.
        """
        put_rows(self.weight, self.index, rows.to(self.weight.dtype), self.dim)

    def agrees(self, dtype: torch.dtype | None = None) -> bool:
        """Whether the slice's values, as the weight stores them, are the weight's; NaN is NaN's equal.

        Args:
            dtype: a coarser one in which they are compared; None for the weight's.
        """
        return bool(self._alike(dtype).all())

    def partly_agrees(self) -> bool:
        """Whether enough values agree for the weight to be an edited one (clipped, masked), and not another."""
        return float(self._alike(None).float().mean()) > _EDITED

    def _alike(self, dtype: torch.dtype | None) -> Tensor:
        rows, values = self.take(), self.active.detach()
        if self.write is not None:
            values = values * along_slice(self.write, self.dim)
        values, rows = (tensor.to(dtype or rows.dtype) for tensor in (values, rows))
        same = (values == rows) | (values.isnan() & rows.isnan())
        if self.write is not None:
            # a row that was divided by its multiplier is the row again but for rounding
            same |= (values - rows).abs() <= 4 * torch.finfo(rows.dtype).eps * rows.abs()
            same |= along_slice(self._padding, self.dim)  # nothing to agree on at padding
        return same

    def nearly_agrees(self) -> bool:
        """Whether both underwent the same but for rounding: the slice has more digits than the weight."""
        rows, values = self.take(), self.active.detach()
        if not loses_digits(rows.dtype, values.dtype):
            return False
        if self.write is not None:
            values = values * along_slice(self.write, self.dim)
        return bool(((values - rows).abs() <= 2 * torch.finfo(rows.dtype).eps * values.abs()).all())

    def keep(self, values: Tensor) -> None:
        """Overwrite the slice."""
        self.active.copy_(values)

    def decay(self, factor: float, seed: str | None) -> None:
        """Multiply the weight by a factor; with a seed, a half-precision weight is rounded stochastically."""
        if seed is None or not loses_digits(self.weight.dtype, torch.float32):
            self.weight.mul_(factor)
            return
        draws = seeded(seed + self.place + ".decay", self.weight.device)
        for rows in self.weight.flatten(0, -2).split(_rows_at_a_time(self.weight)):
            rows.copy_(round_stochastically(rows.float() * factor, self.weight.dtype, draws))


def _rows_at_a_time(weight: Tensor) -> int:
    """Rows that are decayed in one go, with temporary copies of them: few on a CPU, in whose caches they stay; more on
    a GPU, where a block of a large weight would be done sooner than the next is launched."""
    if weight.device.type == "cpu":
        return _DECAY_BLOCK
    return max(_DECAY_BLOCK, _DECAY_ELEMENTS // weight.shape[-1])


class Int8Part(Part):
    """A weight in eight bits, of which rows are selected; see `grass_hf.slices.ops.int8`."""

    is_plain = False

    def take(self) -> Tensor:
        return int8.read_rows(self.weight, self.index)

    def stored(self) -> Tensor:
        return self.take().to(self.weight.dtype)

    def put(self, rows: Tensor, seed: str | None = None) -> None:
        int8.store_rows(self.weight, self.index, rows, None if seed is None else seeded(seed, rows.device))

    def _alike(self, dtype: torch.dtype | None) -> Tensor:
        # a row that is being trained may be stored as the code above or below
        weight: Any = self.weight
        scale = weight.scale.index_select(0, self.index)[:, None]
        return (self.active - self.take()).abs() <= scale

    def decay(self, factor: float, seed: str | None) -> None:
        int8.multiply(self.weight, factor, None if seed is None else seeded(seed + ".decay", self.active.device))


def local_part(slice_: Slice, exact: bool = False) -> Part:
    """This rank's part of the weight, the slice and what belongs to it; all of them without FSDP.

    Args:
        slice_: the slice.
        exact: want the slice's values with all digits that are kept of them, which the slice itself has here.
    """
    weight, active = sharding.local(slice_.weight), sharding.local(slice_.active)
    if not sharding.is_sharded(slice_.active):
        kind = Int8Part if int8.is_int8(weight) else Part
        return kind(weight, active, slice_.index, slice_.rho, slice_.write, slice_.dim, "")
    place, rows = f".{sharding.shard_range(slice_.active)[0]}", shard_rows(slice_)
    if rows is None:
        return Part(weight, active, slice_.index, slice_.rho, slice_.write, slice_.dim, place)
    index = slice_.index[rows]
    rho, write = (v if v is None else v[rows] for v in (slice_.rho, slice_.write))
    if slice_.index.dim() == 1:
        index = index - sharding.shard_range(slice_.weight)[0]
    return Part(weight, active, index, rho, write, slice_.dim, place, rows)


def shard_rows(slice_: Slice) -> slice | None:
    """The range of the slice's rows (or of the experts) that this rank's shard of it has; None for all."""
    if not sharding.is_sharded(slice_.active) or (slice_.index.dim() == 1 and slice_.dim == -1):
        return None
    return slice(*sharding.shard_range(slice_.active))


def block_bounds(slice_: Slice) -> list[tuple[int, int]]:
    """First and last (exclusive) row, in this rank's part of the slice, of the blocks that choose for themselves."""
    pairs = bounds(slice_.state.rank, slice_.blocks())
    rows = shard_rows(slice_) if slice_.index.dim() == 1 else None
    if rows is not None:
        pairs = [(max(p, rows.start) - rows.start, min(q, rows.stop) - rows.start) for p, q in pairs]
    return [(first, last) for first, last in pairs if last > first]
