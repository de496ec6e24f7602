"""Floating-point numbers compared by their bits, and sets of elements."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Moves the lowest bit of byte i of eight bytes to bit i of the highest byte; no two of the sums meet, so none carries.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))
# Bytes of a set that are read at a time.
_AT_A_TIME = 2**15
# Words of eight bytes that differ are few while there are so many times more.
_FEW = 4
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
    own = (bits[some].unsqueeze(1) >> places).bitwise_and_(1).view(-1).nonzero().squeeze(1)
    byte = own // 8
    return some[byte] * 8 + (own - byte * 8)


def differing(old: Tensor, new: Tensor) -> Tensor:
    """Where two contiguous tensors of one shape and dtype have other bits.

    Eight bytes are compared at a time: where little has changed, most of the work is reading.

    Returns:
        int64 (k,), ascending, the elements read flat, if they are few; else bool, of the tensors' shape. Always the
        latter on a GPU, which would have to be waited for to count them.
    """
    left, right = as_bits(old).view(-1), as_bits(new).view(-1)
    per = 8 // old.element_size()
    aligned = all(tensor.storage_offset() % per == 0 for tensor in (left, right))
    if old.device.type == "cpu" and aligned and left.numel() and left.numel() % per == 0:
        pair = left.view(torch.int64), right.view(torch.int64)
        words = (pair[0] != pair[1]).nonzero().squeeze(1)
        if words.numel() * per * _FEW <= left.numel():
            left, right = (as_words.index_select(0, words).view(left.dtype) for as_words in pair)
            own = (left != right).nonzero().squeeze(1)
            word = own // per
            return words[word] * per + (own - word * per)
    return (left != right).view(old.shape)


class Elements:
    """A set of the elements of one tensor: their numbers while these take less memory, else one bit for each.

    Args:
        size: of the tensor, in elements.
        device: where the set is kept.
    """

    def __init__(self, size: int, device: torch.device):
        self.size, self._device = size, device
        self._numbers: list[Tensor] = []
        self._bits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of memory, at most an eighth of a byte for each element of the tensor."""
        return sum(numbers.nbytes for numbers in self._numbers) + (0 if self._bits is None else self._bits.nbytes)

    def add(self, found: Tensor, first: int = 0) -> None:
        """Add elements.

        Args:
            found: what `differing` returns.
            first: number of the element at which it begins, a multiple of eight.
        """
        if found.dtype is torch.bool:
            bits = self._as_bits()
            place = bits[first // 8 : first // 8 + -(-found.numel() // 8)]
            place.bitwise_or_(pack(found))
        elif found.numel():
            self._numbers.append((found + first).to(torch.int32 if self.size <= 2**31 else torch.int64))
            if self.nbytes * 8 > self.size:
                self._as_bits()

    def positions(self) -> Tensor:
        """int64 (k,), ascending, each once."""
        return torch.cat(list(self.blocks()))

    def blocks(self) -> Iterator[Tensor]:
        """`positions` in parts of limited size, what is made of which stays in a CPU's caches."""
        if self._bits is None and len(self._numbers) == 1:
            yield self._numbers[0].long()
        elif self._bits is None and self._numbers:
            yield torch.cat(self._numbers).unique().long()
        else:
            for number, bits in enumerate(self._as_bits().split(_AT_A_TIME)):
                yield positions(bits) + number * _AT_A_TIME * 8

    def _as_bits(self) -> Tensor:
        """With the numbers in them."""
        if self._bits is None:
            self._bits = torch.zeros(-(-self.size // 8), dtype=torch.uint8, device=self._device)
        if self._numbers:
            mask = torch.zeros(self.size, dtype=torch.bool, device=self._device)
            for numbers in self._numbers:
                mask[numbers.long()] = True
            self._bits.bitwise_or_(pack(mask))
            self._numbers = []
        return self._bits


def fingerprint(values: Tensor) -> int:
    """A number that other values have too, but hardly ever: the sum of their bits, each in its place.

    Args:
        values: of any dtype; a GPU is waited for.
    """
    words = as_bits(values.contiguous()).to(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=words.device)
    return int((words.flatten() * places).sum())
