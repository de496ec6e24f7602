"""A linear layer and its tap as one node of the graph.

`ops.tap` stands beside whatever makes the product: a second node, with an output of its own. Where the product is
`F.linear` itself, of plain tensors, and nothing is observed, one node can do both:

    y = x W^T + b        dX = dY W        db = sum dY        C = dY^T x[:, index]   (or dY[:, index]^T x)

They are the operations that autograd makes for `F.linear`, in the same order, so values are the same to the bit; what
is saved is what two nodes cost where a layer has little arithmetic. The weight is frozen and has no gradient here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .double_backward import once
from .rows import along_slice, take_columns
from .shared_columns import SharedColumns


def tapped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: Tensor,
    index: Tensor,
    multiplier: Tensor | None = None,
    columns: SharedColumns | None = None,
    *,
    side: str,
) -> Tensor:
    """``F.linear(x, weight, bias)``, whose backward pass gives `active` the gradient of its rows or columns.

    Args:
        x: (..., n).
        weight: (m, n), frozen.
        bias: (m,), trained as ever.
        active, index, multiplier, side: as for `ops.tap.tap`.
        columns: what keeps ``x[..., index]`` for several layers, for side "input".

    Returns:
        (..., m), in the dtype of autocast if it is on, else of `weight`.
    """
    return _apply(x, bias, active, (weight, index, multiplier, columns, side))


class _TappedLinear(torch.autograd.Function):
    # Few arguments and few attributes: a model has hundreds of layers, and each is looked at in every step.
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, active: Tensor, rest: tuple) -> Tensor:
        weight: Tensor | None
        weight, index, multiplier, columns, side = rest
        device = x.device.type
        if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
            # autocast does the same, and backward needs what it made
            weight = weight.to(torch.get_autocast_dtype(device))
        y = F.linear(x, weight, bias)
        if bias is not None and y._is_view():
            y = torch.unsafe_chunk(y, 1)[0]  # which may be modified in place
        kept = x
        if side == "input":  # all that backward needs: activation memory falls to r/n
            if columns is None:
                kept = take_columns(x, index).to(y.dtype)
            else:
                kept = columns.gather(x, index, y.dtype)
            index = None
        weight = weight if ctx.needs_input_grad[0] else None  # what packs saved tensors gets no more than from autograd
        if multiplier is None and index is None:
            ctx.save_for_backward(weight, kept)
        else:
            ctx.save_for_backward(weight, kept, index, multiplier)
        ctx.known = device, x.shape, x.dtype, active.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        device = ctx.known[0]
        if torch.is_autocast_enabled(device):
            # A backward called inside an autocast region would autocast these products too; ordinary layers' does not.
            with torch.autocast(device, enabled=False):
                return _gradients(ctx, dy)
        return _gradients(ctx, dy)


# Without torch.func's part of `Function.apply`: slices refuse its transforms before.
_apply = super(torch.autograd.Function, _TappedLinear).apply


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, kept, *others = ctx.saved_tensors
    index, multiplier = others or (None, None)
    wants_x, wants_bias, wants_active, _ = ctx.needs_input_grad
    _, shape, dtype, active_dtype, bias_dtype = ctx.known
    dx = dbias = grad = None
    if len(shape) != 2:
        dy = dy.reshape(-1, dy.shape[-1])
    if wants_active:
        grad = _slice_gradient(dy, kept, index, multiplier, active_dtype)
    if wants_x:
        dx = torch.mm(dy, weight)
        if len(shape) != 2:
            dx = dx.view(shape)
        if dx.dtype is not dtype:
            dx = dx.to(dtype)
    if wants_bias:
        dbias = dy.sum(0).to(bias_dtype)
    if torch.is_grad_enabled():  # create_graph
        dx, dbias, grad = (None if value is None else once(value) for value in (dx, dbias, grad))
    return dx, dbias, grad, None


def _slice_gradient(
    dy: Tensor, kept: Tensor, index: Tensor | None, multiplier: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """C of the slice, from dY (T, m) and x or its columns; `index` selects columns of dY, None where x had them."""
    if kept.dim() != 2:
        kept = kept.reshape(-1, kept.shape[-1])
    rows = dy if index is None else take_columns(dy, index)
    if kept.dtype is not dy.dtype:
        kept = kept.to(dy.dtype)
    grad = torch.mm(rows.t(), kept)
    if grad.dtype is not dtype:
        grad = grad.to(dtype)
    if multiplier is not None:
        grad = grad * along_slice(multiplier.to(grad.dtype), -1 if index is None else -2)
    return grad
