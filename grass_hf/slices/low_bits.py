"""Sixteen bits beside a weight: what a float32 slice knows that its weight does not.

    float32 number  =  the weight's sixteen bits, then sixteen more

A bfloat16 is the upper half of a float32. The weight has the nearest bfloat16 of every number of its slice, so the
weight and the lower half of the bits are the number again, and nothing is lost:

    weight = upper half, plus one where the lower half is 0x8000 or more        low = lower half, as int16
    number = weight's bits * 2^16 + low                                         low from -2^15 to 2^15 - 1

[Note: ties] A number exactly between two bfloat16 numbers has two nearest ones. The sum above needs the one that is
farther from zero (`rounded`), where a cast takes the even one. So of slices that keep low bits one number in 131,072 is
written to its other neighbour, as near as the first. All other slices are written by a cast.

A weight in int8 has codes, and one scale per row; there ``low`` is what the codes left over, in units of scale / 2^16:

    number = (code + low / 2^16) * scale        to 2^-17 of a scale: 2^-24 of the row's largest number
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .ops import int8
from .ops.bits import as_bits
from .ops.rows import take_columns, take_rows

# Places of a float32's halves in memory.
_LOWER, _UPPER = (0, 1) if sys.byteorder == "little" else (1, 0)
_UNITS = 2.0**16
_HALF = 2**15


def rounded(values: Tensor) -> Tensor:
    """float32 numbers as the nearest bfloat16, ties away from zero: see [Note: ties]; a view with strides.

    Infinities and NaN stay what they are.
    """
    # one NaN for all: half a unit more would carry others (a GPU's 0x7FFFFFFF) into the sign
    values = values.nan_to_num(torch.nan, torch.inf, -torch.inf).contiguous()
    return values.view(torch.int32).add_(_HALF).view(torch.bfloat16)[..., _UPPER::2]


def joined(weight: Tensor, index: Tensor, dim: int, low: Tensor | None) -> Tensor:
    """The numbers of a slice, in float32.

    Where a weight was overwritten so that it cannot be the upper half of any number with these low bits (a zero or an
    infinity was put there), its own value counts.

    Args:
        weight: (..., m, n), bfloat16 or int8; of another dtype (a model that was cast since) its rows alone count.
        index: int64 (..., r), the rows (columns) of the slice.
        dim: along which they are selected.
        low: int16, shaped like the slice; None for zeros.
    """
    if int8.is_int8(weight):
        numbers = int8.read_rows(weight, index)
        if low is not None:
            numbers.addcmul_(low, _scales(weight, index), value=1 / _UNITS)
        return numbers
    rows = _rows(weight, index, dim)
    numbers = rows.to(torch.float32, memory_format=torch.contiguous_format)
    if low is None or weight.dtype != torch.bfloat16:
        return numbers
    numbers.view(torch.int32).add_(low)
    # what carried into the sign, or beyond an infinity
    return torch.where(numbers.isnan(), rows, numbers)


def low_bits(values: Tensor, weight: Tensor, index: Tensor) -> Tensor | None:
    """int16, shaped like the slice: what the weight does not hold of float32 numbers that were just written to it.

    None where the weight is of a dtype that holds them all, or none of their bits.

    Args:
        values: float32, of which a bfloat16 weight holds `rounded`.
        weight, index: as for `joined`.
    """
    if int8.is_int8(weight):
        codes: Any = weight
        scale = _scales(weight, index)
        rest = torch.where(scale > 0, values / scale, 0.0) - codes.int_data.index_select(0, index)
        return rest.mul_(_UNITS).round_().clamp_(-_HALF, _HALF - 1).to(torch.int16)
    if weight.dtype != torch.bfloat16:
        return None
    return values.contiguous().view(torch.int16)[..., _LOWER::2].contiguous()


def low_bits_of_cast(values: Tensor) -> Tensor:
    """int16: what a bfloat16 weight does not hold of float32 numbers that were cast to it.

    A tie that was rounded toward zero comes back as the float32 number beside it: sixteen bits have no room for both.
    """
    cast = values.to(torch.bfloat16).float()
    return (values.view(torch.int32) - cast.view(torch.int32)).clamp_(-_HALF, _HALF - 1).to(torch.int16)


def castable(low: Tensor) -> Tensor:
    """Low bits with which every number is cast to the weight that it came from: ties as the float32 beside them."""
    return low.clamp(min=1 - _HALF)


def digest(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """int32, shaped like a slice without its last dimension: another one, nearly always, where the rows (columns) of a
    weight were overwritten."""
    if int8.is_int8(weight):
        codes: Any = weight
        rows, scale = codes.int_data.index_select(0, index), _scales(weight, index)
        return rows.sum(dim=-1, dtype=torch.int32) + scale.view(torch.int32)[:, 0]
    return as_bits(_rows(weight, index, dim)).sum(dim=-1, dtype=torch.int32)


def _rows(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    return take_columns(weight, index) if dim == -1 and index.dim() == 1 else take_rows(weight, index, dim)


def _scales(weight: Any, index: Tensor) -> Tensor:
    return weight.scale.index_select(0, index).float()[:, None]
