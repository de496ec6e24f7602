"""Frozen weights in eight bits, one scale per row: torchao's tensor type, and what Grass does with it.

    W[i, j] = codes[i, j] * scale[i]        codes int8 in [-127, 127], scale in the model's dtype

Rows are what ``side="output"`` selects, so a row that is trained is read, trained in higher precision in its slice,
and stored again with a scale of its own, and no other row changes. Products are ours and not torchao's, whose backward
would form the m x n gradient of the weight:

    y = (x codes^T) scale        dX = (dY scale) codes

[Note: lossless export] A checkpoint holds plain weights, bf16(codes * scale). `quantize` finds the same codes and
scales in them again: the largest code of a row is 127 or a little less, so a few candidates for the scale are tried,
and one that reproduces every element of the row exactly is it. So resuming from a plain checkpoint changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .rounding import round_stochastically

_TYPE = "Int8QuantizedTrainingLinearWeight"
_LARGEST = 127
# Rows that are converted to float32 at a time.
_BLOCK = 256
# Columns by which most candidates for the scales of rows are ruled out.
_FIRST = 64


def is_int8(weight: Tensor) -> bool:
    """Whether a weight is torchao's int8 tensor."""
    return type(weight).__name__ == _TYPE


def quantize(weight: Tensor) -> nn.Parameter:
    """A frozen int8 weight with the values of a plain one, rounded to nearest; see [Note: lossless export].

    Args:
        weight: (m, n), floating point.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.prototype.quantized_training.int8 import Int8QuantizedTrainingLinearWeight
    except ImportError as error:
        raise ValueError(
            f"weight_dtype='int8' stores weights in torchao's int8 tensor, which cannot be imported ({error}): "
            "pip install torchao, or leave weight_dtype out."
        ) from None
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
    if not isinstance(weight, FakeTensor):  # an estimator's has no values, and to look for them takes long
        fill(codes, scale, weight)
    return nn.Parameter(Int8QuantizedTrainingLinearWeight(codes, scale), requires_grad=False)


def fill(codes: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Put the codes (m, n) and scales (m,) of a plain weight into empty tensors, some rows at a time."""
    for own_codes, own_scale, rows in zip(codes.split(_BLOCK), scale.split(_BLOCK), weight.split(_BLOCK), strict=True):
        found_codes, found_scale = _encoded(rows, _found_scale(rows))
        own_codes.copy_(found_codes)
        own_scale.copy_(found_scale)


def dequantize(weight: Tensor) -> Tensor:
    """The plain weight (m, n), in its dtype."""
    return read_rows(weight, None).to(weight.dtype)


def read_rows(weight: Any, index: Tensor | None) -> Tensor:
    """float32 (r, n): rows of an int8 weight; all of them for None."""
    codes = weight.int_data if index is None else weight.int_data.index_select(0, index)
    scale = weight.scale if index is None else weight.scale.index_select(0, index)
    return codes * scale.float()[:, None]


def store_rows(weight: Any, index: Tensor, rows: Tensor, draws: torch.Generator | None = None) -> None:
    """Overwrite rows of an int8 weight, each with a new scale.

    Args:
        weight: (m, n).
        index: int64 (r,), rows that are different from each other.
        rows: (r, n), floating point.
        draws: rounds codes up or down at random, exact in the mean; None rounds to nearest.
    """
    scale = _rounded_up(rows.float().abs().amax(dim=1) / _LARGEST, weight.scale.dtype)
    codes, scale = _encoded(rows, scale, draws)
    weight.int_data.index_copy_(0, index, codes)
    weight.scale.index_copy_(0, index, scale)


def multiply(weight: Any, factor: float, draws: torch.Generator | None = None) -> None:
    """Multiply an int8 weight by a factor: its scales, rounded at random where they would lose it."""
    scale = weight.scale.float() * factor
    if draws is not None and weight.scale.dtype != torch.float32:
        scale = round_stochastically(scale, weight.scale.dtype, draws)
    weight.scale.copy_(scale)


def linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` for a frozen int8 weight: (..., n) to (..., m), in the dtype of autocast or of `x`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    y = _Int8Linear.apply(x, weight.int_data, weight.scale)
    return y if bias is None else y + bias.to(y.dtype)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return torch.matmul(x, codes.t().to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        codes, scale = ctx.saved_tensors
        return torch.matmul(dy * scale.to(dy.dtype), codes.to(dy.dtype)), None, None


def _encoded(rows: Tensor, scale: Tensor, draws: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Codes of rows under given scales; a row of zeros has scale 0."""
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    codes = rows.float() * inverse[:, None]
    if draws is not None:
        codes = (codes + torch.rand(codes.shape, generator=draws, device=codes.device)).floor()
    return codes.round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive float32 values in `dtype`, never below: so that no row's largest element is cut off."""
    near = values.to(dtype)
    return torch.where(near.float() < values, _next(near, 1), near)


def _next(values: Tensor, steps: int) -> Tensor:
    """The number so many places above (below) each, of positive floating-point numbers."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    moved = (values.view(integers) + steps).view(values.dtype)
    return torch.where(values > 0, moved, values)


def _found_scale(rows: Tensor) -> Tensor:
    """The scales with which rows were quantised, where some reproduce them; else the best for their largest element."""
    largest = rows.float().abs().amax(dim=1)
    scale = _rounded_up(largest / _LARGEST, rows.dtype)
    exact = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    for top in (127, 126, 125):
        near = (largest / top).to(rows.dtype)
        for candidate in (near, _next(near, 1), _next(near, -1)):
            found = ~exact & _reproduced(rows[:, :_FIRST], candidate)
            if bool(found.any()):
                found &= _reproduced(rows, candidate)
                scale, exact = torch.where(found, candidate, scale), exact | found
    return scale


def _reproduced(rows: Tensor, scale: Tensor) -> Tensor:
    """bool (r,): which rows come back exactly from their codes under given scales."""
    codes, _ = _encoded(rows, scale)
    return ((codes * scale.float()[:, None]).to(rows.dtype) == rows).all(dim=1)
