"""Rows of a matrix of which one rank holds a run of elements, as DeepSpeed's ZeRO-3 splits parameters up.

A weight (..., p, q) is read as (P, q), the matrices of a batch below each other, and cut into runs of equal length. A
run begins and ends anywhere, so it is the end of a row, whole rows, and the beginning of a row: at most three matrices
over its memory. Every element lies in one run, so what ranks take from theirs adds up to the selected rows exactly, and
nothing of the weight's own size is ever gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Run:
    """The elements [start, start + len) of a weight.

    Attributes:
        values: (len,), this rank's memory; what lies beyond the weight's last element is padding.
        start: number of the first element.
        shape: of the weight, (..., p, q).
    """

    values: Tensor
    start: int
    shape: torch.Size

    def pieces(self) -> Iterator[tuple[Tensor, int, int]]:
        """Matrices (k, w) over the run's memory, with the row and column of (P, q) at which each begins."""
        width = self.shape[-1]
        here, end = self.start, min(self.start + self.values.numel(), self.shape.numel())
        while here < end:
            row, column = divmod(here, width)
            if column or end - here < width:
                rows, columns = 1, min(width - column, end - here)
            else:
                rows, columns = (end - here) // width, width
            yield self.values.narrow(0, here - self.start, rows * columns).view(rows, columns), row, column
            here += rows * columns

    def put(self, index: Tensor, rows: Tensor, dim: int) -> None:
        """Overwrite what of the rows (columns) `index` lies in the run; as `rows.put_rows`.

        Args:
            index: int64 (..., r); numbers that occur twice must come with equal values.
            rows: (..., r, q) for dim -2, (..., p, r) for -1, whole, in the weight's dtype.
            dim: along which rows (columns) are numbered.
        """
        rows = rows.reshape(-1, rows.shape[-1])
        for piece, where, chosen in self._places(index, dim):
            source = rows[chosen]
            if where.dim() == 2:
                piece.scatter_(1, where, source)
            else:
                piece.index_copy_(0 if dim == -2 else 1, where, source)

    def take(self, index: Tensor, dim: int) -> Tensor:
        """What of the rows (columns) `index` lies in the run, zero elsewhere; the sum over all runs is
        `rows.take_rows` of the weight."""
        shape = list(self.shape)
        shape[dim] = index.shape[-1]
        taken = self.values.new_zeros(shape)
        rows = taken.view(-1, shape[-1])
        for piece, where, chosen in self._places(index, dim):
            if where.dim() == 2:
                rows[chosen] = piece.gather(1, where)
            else:
                rows[chosen] = piece.index_select(0 if dim == -2 else 1, where)
        return taken

    def _places(self, index: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor, tuple]]:
        """For each piece: its memory, the numbers of the selected rows (columns) within it, and where the slice, as a
        matrix, has them. Numbers (k, r) are those of columns, each row with its own."""
        height = self.shape[-2]
        if dim == -2:
            index = index.reshape(-1) + _offsets(index, height)
        for piece, row, column in self.pieces():
            rows, columns = slice(row, row + piece.shape[0]), slice(column, column + piece.shape[1])
            if dim == -2:
                chosen = torch.nonzero((index >= rows.start) & (index < rows.stop)).squeeze(1)
                yield piece, index[chosen] - row, (chosen, columns)
            elif piece.shape[0] == 1 or index.dim() == 1:
                own = index if index.dim() == 1 else index[row // height]
                chosen = torch.nonzero((own >= columns.start) & (own < columns.stop)).squeeze(1)
                yield piece, own[chosen] - column, (rows, chosen)
            else:
                matrices = torch.arange(rows.start, rows.stop, device=index.device) // height
                yield piece, index[matrices], (rows, slice(None))


def _offsets(index: Tensor, height: int) -> Tensor:
    """What to add to the row numbers of a batch of matrices to have those of the matrices below each other."""
    if index.dim() == 1:
        return torch.zeros((), dtype=index.dtype, device=index.device)
    return (torch.arange(index.shape[0], device=index.device) * height).repeat_interleave(index.shape[1])
