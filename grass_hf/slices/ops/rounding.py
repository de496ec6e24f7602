"""Stochastic rounding to half precision: exact in the mean.

A number x between two neighbours a < b of the lower precision becomes b with probability (x - a) / (b - a), so the
mean of many roundings is x, and an update of a hundredth of a unit in the last place arrives once in a hundred times
instead of never (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", arXiv 1502.02551).

[Note: a draw per cut digit] A bfloat16 is the first half of a float32, so a to b are 2^16 numbers of float32 apart, and
x is the k-th of them. Adding a random number below 2^16 to x's bits and cutting the second half off carries into the
first with probability k / 2^16: one random half word and three passes over the numbers, against the fifteen of the
definition, which serves the other pairs of dtypes.
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
    if dtype == torch.bfloat16 and values.dtype == torch.float32:
        return _cut_at_random(values, draws)
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


def _cut_at_random(values: Tensor, draws: torch.Generator) -> Tensor:
    """float32 to bfloat16, see [Note: a draw per cut digit]."""
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=draws)
    digits = words.view(torch.int16)[: values.numel()].view(values.shape)  # -2^15 to 2^15 - 1
    bits = torch.add(values.contiguous().view(torch.int32), digits).add_(2**15)
    rounded = bits.bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)
    # beyond the largest there is no other neighbour, and a carry would leave NaN
    return torch.where(values.abs() <= torch.finfo(torch.bfloat16).max, rounded, values.to(torch.bfloat16))


def loses_digits(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` is a half precision and `other` is not."""
    return dtype in (torch.bfloat16, torch.float16) and other in (torch.float32, torch.float64)
