"""Sixteen bits beside a weight: what a float32 slice knows that its weight does not.

    float32 number  =  the weight's sixteen bits, then sixteen more

A bfloat16 is the upper half of a float32. The weight has the nearest bfloat16 of every number of its slice, so the
weight and the lower half of the bits are the number again, and nothing is lost:

    weight = upper half, plus one where the lower half is 0x8000 or more        low = lower half, as int16
    number = weight's bits * 2^16 + low                                         low from -2^15 to 2^15 - 1

[Note: ties] A number exactly between two bfloat16 numbers has two nearest ones. The sum above needs the one that is
farther from zero, where a cast takes the even one: `nearest`, by which every float32 slice is written to a bfloat16
weight, resident or not. One number in 65,536 is such a tie.

A weight in int8 has codes, and one scale per row; there ``low`` is what the codes left over, in units of scale / 2^16:

    number = (code + low / 2^16) * scale        to 2^-17 of a scale: 2^-24 of the row's largest number
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .ops import int8
from .ops.rows import take_rows

# Place of a float32's lower half among its two halves in memory.
_LOWER = 0 if sys.byteorder == "little" else 1
_UNITS = 2.0**16


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, rounded to nearest; float32 to bfloat16 with ties away from zero, see [Note: ties].

    NaN stays NaN; an infinity of float32 becomes NaN.
    """
    if dtype != torch.bfloat16 or values.dtype != torch.float32:
        return values.to(dtype)
    # one more bit at the very end breaks a tie upward in magnitude, and changes no other rounding
    return values.contiguous().view(torch.int32).bitwise_or(1).view(torch.float32).to(dtype)


def has_low_bits(weight: Tensor) -> bool:
    """Whether float32 slices of a weight can be kept as sixteen bits beside it."""
    return int8.is_int8(weight) or weight.dtype == torch.bfloat16


def joined(weight: Tensor, index: Tensor, dim: int, low: Tensor | None) -> Tensor:
    """The numbers of a slice, in float32; of a weight of another dtype (a model that was cast since) its rows.

    Args:
        weight: (..., m, n), bfloat16 or int8.
        index: int64 (..., r), the rows (columns) of the slice.
        dim: along which they are selected.
        low: int16, shaped like the slice; None for zeros.
    """
    if int8.is_int8(weight):
        rows = int8.read_rows(weight, index)
        if low is not None:
            rows.addcmul_(low, weight.scale.index_select(0, index).float()[:, None], value=1 / _UNITS)
        return rows
    rows = take_rows(weight, index, dim)
    if weight.dtype != torch.bfloat16:
        return rows
    rows = rows.to(torch.float32, memory_format=torch.contiguous_format)
    if low is not None:
        rows.view(torch.int32).add_(low)
    return rows


def low_bits(values: Tensor, weight: Tensor, index: Tensor) -> Tensor | None:
    """int16, shaped like the slice: what the weight does not hold of float32 numbers that were just written to it.

    None where the weight is of a dtype that holds them all, or none of their bits.
    """
    if int8.is_int8(weight):
        scale = weight.scale.index_select(0, index).float()[:, None]
        rest = torch.where(scale > 0, values / scale, 0.0) - weight.int_data.index_select(0, index)
        return rest.mul_(_UNITS).round_().clamp_(-(2**15), 2**15 - 1).to(torch.int16)
    return lower_halves(values) if weight.dtype == torch.bfloat16 else None


def lower_halves(values: Tensor) -> Tensor:
    """int16, of the same shape: the lower sixteen bits of float32 numbers."""
    return values.contiguous().view(torch.int16)[..., _LOWER::2].contiguous()
