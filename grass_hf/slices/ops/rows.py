"""Taking and putting selected rows or columns of weights, slices and activations."""

from __future__ import annotations

import torch
from torch import Tensor

_FULL = (torch.float32, torch.float64)


def take_columns(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]`` of (..., d): a gather, which reads any strides without a copy of them all and is several
    times faster than `index_select` along a last dimension of half precision on a CPU; see `selects_faster`."""
    if selects_faster(values) and values.dim() == 2 and values.is_contiguous():
        return values.index_select(-1, index)
    return gathered_columns(values, index.expand(*values.shape[:-1], index.shape[0]))


def selects_faster(values: Tensor) -> bool:
    """Whether `index_select` along the last of two dimensions is faster than a gather: by a third, for float32 and
    float64 on a CPU."""
    return values.dtype in _FULL and values.device.type == "cpu"


def gathered_columns(values: Tensor, index: Tensor) -> Tensor:
    """`take_columns` with an index that has been expanded, (..., r)."""
    if values.element_size() == 2 and values.device.type == "cpu":
        # as bits, because of floating-point halves a CPU makes a float32 copy on the way
        return values.view(torch.int16).gather(-1, index).view(values.dtype)
    return values.gather(-1, index)


def selected_dim(side: str, transposed: bool) -> int:
    """Dimension, -2 or -1, of a stored weight along which a side selects."""
    return -2 if (side == "output") != transposed else -1


def along_slice(vector: Tensor, dim: int) -> Tensor:
    """Shape a vector (..., r) over selected rows or columns so that it multiplies a slice selected along `dim`."""
    return vector.unsqueeze(-1 if dim == -2 else -2)


def take_rows(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """The rows (columns) `index` (..., r) of `tensor` (..., p, q), each matrix of a batch its own."""
    if index.dim() == 1:
        return tensor.index_select(dim, index)
    return tensor.gather(dim, _expanded(index, tensor.shape, dim))


def put_rows(tensor: Tensor, index: Tensor, rows: Tensor, dim: int) -> None:
    """Overwrite the rows (columns) `index` of `tensor`; numbers that occur twice must come with equal values."""
    if index.dim() == 1:
        tensor.index_copy_(dim, index, rows)
    else:
        tensor.scatter_(dim, _expanded(index, tensor.shape, dim), rows)


def _expanded(index: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """An index (E, r) as `gather` wants it: as large as what is gathered, without memory of its own."""
    sizes = list(shape)
    sizes[dim] = index.shape[-1]
    return along_slice(index, dim).expand(sizes)
