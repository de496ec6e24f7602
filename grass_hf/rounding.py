"""Stochastic rounding to half precision: exact in the mean.

A number x between two neighbours a < b of the lower precision becomes b with probability (x - a) / (b - a), so the
mean of many roundings is x, and an update of a hundredth of a unit in the last place arrives once in a hundred times
instead of never (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", arXiv 1502.02551).
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, dtype: torch.dtype, draws: torch.Generator) -> Tensor:
    """Round float32 or float64 values to bfloat16 or float16, up or down at random.

    Args:
        values: any shape; values that `dtype` holds exactly, infinities and NaN come out unchanged.
        dtype: `torch.bfloat16` or `torch.float16`.
        draws: source of randomness, on the device of `values`.
    """
    nearest = values.to(dtype)
    error = values - nearest.to(values.dtype)
    bits = nearest.view(torch.int16)
    # In both formats the next number away from zero is the next integer, sign apart.
    outward = (error > 0) == (nearest > 0)
    neighbour = torch.where(outward, bits + 1, bits - 1)
    smallest = torch.where(error > 0, 1, -(2**15) + 1).to(torch.int16)  # +-, next to zero
    neighbour = torch.where(nearest == 0, smallest, neighbour).view(dtype)
    gap = (neighbour.to(values.dtype) - nearest.to(values.dtype)).abs()
    uniform = torch.rand(values.shape, generator=draws, dtype=values.dtype, device=values.device)
    moves = (uniform * gap < error.abs()) & neighbour.isfinite()
    return torch.where(moves, neighbour, nearest)


def loses_digits(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` is a half precision and `other` is not."""
    return dtype in (torch.bfloat16, torch.float16) and other in (torch.float32, torch.float64)
