"""Sets of elements as one bit each, and floating-point numbers compared by their bits."""

from __future__ import annotations

import torch
from torch import Tensor

# Moves the lowest bit of byte i of eight bytes to bit i of the highest byte; no two of the sums meet, so none carries.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which differ exactly where bits do: NaN is NaN's equal, and -0 is not 0's."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def pack(mask: Tensor) -> Tensor:
    """uint8 (ceil(numel / 8),): element i of a boolean tensor, read flat, is bit ``i % 8`` of byte ``i // 8``."""
    flat = mask.reshape(-1)
    if missing := -flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    eights = flat.view(torch.int64)
    return ((eights * _GATHER) >> 56).bitwise_and_(0xFF).to(torch.uint8)


def positions(bits: Tensor) -> Tensor:
    """int64, ascending: the elements that are true in what `pack` returned."""
    some = bits.nonzero().squeeze(1)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    own = (bits[some].unsqueeze(1) >> places).bitwise_and_(1)
    byte, bit = own.nonzero(as_tuple=True)
    return some[byte] * 8 + bit
