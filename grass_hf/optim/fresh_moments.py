"""With what second moment a fresh row begins under ``state_policy="carry_seeded"``.

    v0_i = mean over the rows j that the slice had of v_j  *  s_i rho_i^2 / mean over them of s_j rho_j^2

with the squared norms s that were just observed (`slices.ops.selection`) and the multipliers rho of the gradient: the
slice says what a second moment is along a row, the observation says how much larger or smaller this row's is. A rule
that observes nothing takes the ratio as 1. Zero, which a new parameter begins with, makes the first updates of Adam too
large by up to (1 - b1) / sqrt(1 - b2), 3.2 with (0.9, 0.999), because the slice's steps are counted as one.

Means are taken over the block of rows that chooses for itself, which one rank holds whole under FSDP2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..slices.ops.rows import along_slice
from ..slices.ops.selection import Selection, bounds
from ..slices.part import block_bounds, shard_rows
from ..slices.slice import Slice

# A row whose gradient happened to be (nearly) zero when it was observed begins with a hundredth of the mean.
_LEAST = 0.01


@dataclass(frozen=True)
class Seed:
    """What fresh rows of this rank's part of a slice begin with.

    Attributes:
        real: bool (..., r), the rows that the slice had and that are no padding; None if all are.
        ratio: float64 (..., r), of every row that it gets, of its second moment to the mean; None for 1.
        blocks: first and last (exclusive) row of every block that chooses for itself.
    """

    real: Tensor | None = None
    ratio: Tensor | None = None
    blocks: Sequence[tuple[int, int]] = ()

    def of(self, value: Tensor, axis: int) -> Tensor:
        """Seeds, of a shape that broadcasts over a state whose rows lie along `axis`."""
        real = None if self.real is None else along(self.real.to(value.device), value, axis)
        mean = _means(value, real, axis, self.blocks)
        if self.ratio is None:
            return mean
        return mean * along(self.ratio.to(value.device, value.dtype), value, axis)


def seed_for(slice_: Slice, chosen: Selection, norms2: Tensor | None) -> Seed:
    """The seed for a slice that is about to load other rows.

    Args:
        slice_: the slice, with the rows that it has now.
        chosen: the rows that it gets.
        norms2: (size,) or (E, size), squared norms that were observed, the same on all ranks; None without them.
    """
    now, rows = slice_.current_selection(), shard_rows(slice_)
    real = None if now.rho is None else now.rho != 0
    ratio = None
    if norms2 is not None:
        held, got = (norms2.gather(-1, s.index) * (1.0 if s.rho is None else s.rho**2) for s in (now, chosen))
        mean = _means(held, real, -1, bounds(slice_.state.rank, slice_.blocks()))
        ratio = torch.where(mean > 0, got / mean, 1.0).clamp(min=_LEAST)
    real, ratio = (v if v is None or rows is None else v[rows] for v in (real, ratio))
    return Seed(real, ratio, block_bounds(slice_))


def along(rows: Tensor, value: Tensor, axis: int) -> Tensor:
    """One number per row, (..., r), in the shape that broadcasts over a state whose rows lie along `axis`."""
    if rows.dim() == 1:
        return rows.view([-1 if d == axis % value.dim() else 1 for d in range(value.dim())])
    return rows if value.dim() == rows.dim() else along_slice(rows, axis)


def _means(value: Tensor, real: Tensor | None, axis: int, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """Means over the rows of each block that are real."""
    if len(blocks) < 2:
        return _mean(value, real, axis)
    means = []
    for first, last in blocks:
        rows = value.narrow(axis, first, last - first)
        own = None if real is None else real.narrow(axis, first, last - first)
        means.append(_mean(rows, own, axis).expand_as(rows))
    return torch.cat(means, axis)


def _mean(value: Tensor, real: Tensor | None, axis: int) -> Tensor:
    if real is None:
        return value.mean(axis, keepdim=True)
    return value.masked_fill(~real, 0).sum(axis, keepdim=True) / real.sum(axis, keepdim=True)
