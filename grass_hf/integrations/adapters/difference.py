"""What changed between two checkpoints, tensor by tensor: rows and columns touched, and Frobenius norms.

With ``D = tuned - base`` of a weight, a row is touched if any of its numbers differs, the change is ``|D|`` and the
relative change ``|D| / |base|``. Rows and columns are those of the stored tensor (of a transposed Conv1D, rows are
inputs); of experts, those of all experts together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Pairs, as_matrices, blocks, touched


@dataclass(frozen=True)
class Change:
    """One tensor's change.

    Attributes:
        name: in the tuned checkpoint.
        shape: of the stored tensor.
        rows, all_rows: how many rows differ anywhere, of how many; of a vector, its numbers.
        columns, all_columns: the same of columns; (0, 0) for a vector.
        change: Frobenius norm of tuned - base.
        norm: Frobenius norm of base.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    all_rows: int
    columns: int
    all_columns: int
    change: float
    norm: float

    @property
    def relative(self) -> float:
        """change / norm; 0 for what did not change, infinite where base is all zero."""
        if self.change == 0.0:
            return 0.0
        return self.change / self.norm if self.norm else math.inf


def changes(base: Checkpoint, tuned: Checkpoint, pairs: Pairs) -> Iterator[Change]:
    """The change of every tensor that both have in one shape; at most one tensor of each is in memory."""
    for name, base_name in pairs.same.items():
        if base.shape(base_name) == tuned.shape(name):
            yield _change(name, base.tensor(base_name), tuned.tensor(name))


def other_shape(base: Checkpoint, tuned: Checkpoint, pairs: Pairs) -> list[str]:
    """Tensors that both have, in different shapes (a resized vocabulary)."""
    return [name for name, base_name in pairs.same.items() if base.shape(base_name) != tuned.shape(name)]


def total(found: list[Change]) -> tuple[float, float]:
    """Norm of the whole change, absolute and relative to all weights of base."""
    change = math.sqrt(math.fsum(item.change**2 for item in found))
    norm = math.sqrt(math.fsum(item.norm**2 for item in found))
    return change, change / norm if norm else math.inf if change else 0.0


def wide(tensor: Tensor) -> Tensor:
    """In float32 or wider, where differences of half-precision numbers are exact."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _change(name: str, base: Tensor, tuned: Tensor) -> Change:
    shape = tuple(tuned.shape)
    base, tuned = as_matrices(base), as_matrices(tuned)
    if base.dtype != tuned.dtype or base.element_size() == 1:  # 8-bit floats are not compared by torch
        base, tuned = wide(base), wide(tuned)
    rows, columns = touched(base, tuned)
    change = norm = 0.0
    for expert, block in blocks(base):
        old, new = (tensor[expert, block].double() for tensor in (base, tuned))
        norm += old.square().sum().item()
        change += (new - old).square().sum().item()
    vector = len(shape) < 2
    return Change(
        name,
        shape,
        int(rows.sum()),
        rows.numel(),
        0 if vector else int(columns.sum()),
        0 if vector else columns.numel(),
        math.sqrt(change),
        math.sqrt(norm),
    )
