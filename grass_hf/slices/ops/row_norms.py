"""Squared norms of the rows of a gradient that is never formed: block by block of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# How much of G exists at one time while norms are computed: so many rows or columns, along its longer side. Large
# enough for full matmul speed, and far below the m x n gradient that must not exist. See `norm_block` for GPUs.
NORM_BLOCK = 256


def squared_norms(a: Tensor, b: Tensor, block: int | None = None) -> Tensor:
    """Squared norms of the rows of ``a^T b`` without forming it.

    Args:
        a: (T, p).
        b: (T, q).
        block: rows (columns, where q > p) of the product that exist at a time; None for `norm_block`.

    Returns:
        (p,), in float64 for float64 inputs, else in float32.
    """
    if _stand_in is not None:
        return _stand_in(a, b)
    by_rows = a.shape[1] >= b.shape[1]
    block = block or norm_block(max(a.shape[1], b.shape[1]), a.device)
    return norms_by_rows(a, b, block) if by_rows else norms_by_columns(a, b, block)


@contextmanager
def norms_by(stand_in: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Have `squared_norms` computed by something else meanwhile, for an estimator that looks at memory alone."""
    global _stand_in
    _stand_in = stand_in
    try:
        yield
    finally:
        _stand_in = None


_stand_in: Callable[[Tensor, Tensor], Tensor] | None = None


def norm_block(count: int, device: torch.device) -> int:
    """Rows or columns of G, of so many, that exist at one time: on a GPU an eighth of them, but at most 1024, since a
    smaller block would be done sooner than the next is launched."""
    return NORM_BLOCK if device.type == "cpu" else max(NORM_BLOCK, min(4 * NORM_BLOCK, count // 8))


def norms_by_rows(a: Tensor, b: Tensor, block: int) -> Tensor:
    """`squared_norms` with so many rows of the product at a time."""
    dtype = accumulation_dtype(a.dtype)
    return torch.cat([_sums_of_squares(torch.mm(_packed(part).t(), b), dtype) for part in a.split(block, dim=1)])


def norms_by_columns(a: Tensor, b: Tensor, block: int) -> Tensor:
    """`squared_norms` with so many columns of the product at a time."""
    dtype = accumulation_dtype(a.dtype)
    total = torch.zeros(a.shape[1], dtype=dtype, device=a.device)
    for part in b.split(block, dim=1):
        total += _sums_of_squares(torch.mm(a.t(), _packed(part)), dtype)
    return total


def _packed(block: Tensor) -> Tensor:
    """A strided block as it is multiplied best: a CPU takes one of half precision fifty times slower than a copy."""
    return block.contiguous() if block.device.type == "cpu" else block


def _sums_of_squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Of every row, in a dtype; on a GPU by one kernel that makes no copy in it."""
    if rows.device.type == "cpu":
        return rows.to(dtype).square().sum(dim=1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which norms and multipliers are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
