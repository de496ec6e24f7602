"""Products of tokens with experts' matrices, and the gradient of the experts' slices.

Experts are one parameter W of (E, m, n), and each token goes to a few of them. With the tokens sorted by expert,
expert e holds rows first[e] .. last[e] of x and y, and for each expert with tokens

    y_e = x_e W_e^T        dX_e = dY_e W_e        C_e = dY_e[:, index_e]^T x_e   (or dY_e^T x_e[:, index_e])

so neither the E x m x n gradient nor one expert's m x n gradient exists. An expert without tokens gets the gradient
zero, as it does from autograd, and its slice goes on with its momentum as it would in dense training.

`grouped_linear` makes the product itself. Where a forward of another's makes it, `batched_tap` does for the product
with all of the matrices what `ops.tap.tap` does for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .double_backward import once
from .row_norms import squared_norms
from .rows import along_slice, selected_dim
from .tap import alias


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    tokens: list[int],
    active: Tensor,
    index: Tensor,
    *,
    side: str,
    transposed: bool = False,
    multiplier: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Multiply tokens with their experts' frozen matrices; in backward `active` gets the gradient of its rows.

    Args:
        x: (S, n), sorted by expert.
        weight: (E, m, n), or (E, n, m) when transposed.
        tokens: number of rows of `x` that belong to each expert, E numbers of sum S.
        active: the active slice, (E, r, n) for side "output", (E, m, r) for "input", or transposed as the weight is.
        index: int64 (E, r), each expert's selected rows (columns).
        side: "output" or "input".
        transposed: the matrices are stored (input, output).
        multiplier: rho, (E, r); None means 1.
        norms: leaf (E, size) that receives the squared norms of the rows (columns) of the full gradients as its
            gradient; None when no observation is due.

    Returns:
        (S, m), in the dtype of autocast if it is on, else of the weight.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return _GroupedLinear.apply(
            x.to(dtype), weight, active, index, multiplier, norms, tokens, side, transposed
        )  # the cast is autograd's own, so dX comes back in the dtype of x


def batched_tap(
    y: Tensor,
    x: Tensor,
    active: Tensor,
    index: Tensor,
    *,
    side: str,
    transposed: bool = False,
    multiplier: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Return `y` unchanged and, in backward, give `active` the gradient of every matrix's selected rows or columns.

    Args:
        y: (E, T, m), a product of each matrix with its own tokens.
        x: (E, T, n), those tokens; may be expanded.
        active, index, side, transposed, multiplier, norms: as for `grouped_linear`.
    """
    return _BatchedTap.apply(y, x, active, index, multiplier, norms, side, transposed)


class _BatchedTap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        active: Tensor,
        index: Tensor,
        multiplier: Tensor | None,
        norms: Tensor | None,
        side: str,
        transposed: bool,
    ) -> Tensor:
        ctx.side, ctx.transposed, ctx.observe, ctx.active_dtype = side, transposed, norms is not None, active.dtype
        if side == "input" and not ctx.observe:
            ctx.save_for_backward(_columns(x, index).to(y.dtype), None, multiplier)
        else:
            ctx.save_for_backward(x, index, multiplier)
        return alias(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, index, multiplier = ctx.saved_tensors
        norms2 = None
        with torch.autocast(dy.device.type, enabled=False):
            x, rows = x.to(dy.dtype), dy
            if ctx.observe:
                pairs = zip(*((dy, x) if ctx.side == "output" else (x, dy)), strict=True)
                norms2 = torch.stack([squared_norms(a, b) for a, b in pairs])
            if ctx.side == "output":
                rows = _columns(dy, index)
            elif ctx.observe:
                x = _columns(x, index)
            left, right = (x, rows) if ctx.transposed else (rows, x)
            grad = torch.bmm(left.mT, right).to(ctx.active_dtype)
            if multiplier is not None:
                grad = grad * along_slice(multiplier.to(grad.dtype), selected_dim(ctx.side, ctx.transposed))
        return once(dy), None, once(grad), None, None, norms2, None, None


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """``values[e, :, index[e]]`` of (E, T, d) for each e."""
    return values.gather(-1, index[:, None, :].expand(-1, values.shape[1], -1))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        active: Tensor,
        index: Tensor,
        multiplier: Tensor | None,
        norms: Tensor | None,
        tokens: list[int],
        side: str,
        transposed: bool,
    ) -> Tensor:
        ctx.tokens, ctx.side, ctx.transposed = tokens, side, transposed
        ctx.observe = norms is not None
        ctx.active_shape, ctx.active_dtype = active.shape, active.dtype
        y = x.new_empty(x.shape[0], weight.shape[-1 if transposed else -2])
        for expert, rows in _segments(tokens):
            matrix = weight[expert].to(x.dtype)
            torch.mm(x[rows], matrix if transposed else matrix.t(), out=y[rows])
        kept = x
        if side == "input" and not ctx.observe:
            kept = x.new_empty(x.shape[0], index.shape[-1])
            for expert, rows in _segments(tokens):
                torch.index_select(x[rows], 1, index[expert], out=kept[rows])
        ctx.save_for_backward(kept, weight, index, multiplier)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, index, multiplier = ctx.saved_tensors
        dx = dy.new_empty(dy.shape[0], weight.shape[-2 if ctx.transposed else -1]) if ctx.needs_input_grad[0] else None
        grad = torch.zeros(ctx.active_shape, dtype=ctx.active_dtype, device=dy.device)
        norms2: list[Tensor | None] = [None] * len(ctx.tokens)
        with torch.autocast(dy.device.type, enabled=False):
            for expert, rows in _segments(ctx.tokens):
                part_dy, part_x, chosen = dy[rows], x[rows].to(dy.dtype), index[expert]
                if dx is not None:
                    matrix = weight[expert].to(dy.dtype)
                    torch.mm(part_dy, matrix.t() if ctx.transposed else matrix, out=dx[rows])
                if ctx.observe:
                    pair = (part_dy, part_x) if ctx.side == "output" else (part_x, part_dy)
                    norms2[expert] = squared_norms(*pair)
                if ctx.side == "output":
                    part_dy = part_dy.index_select(1, chosen)
                elif ctx.observe:
                    part_x = part_x.index_select(1, chosen)
                left, right = (part_x, part_dy) if ctx.transposed else (part_dy, part_x)
                grad[expert] = torch.mm(left.t(), right)
            if multiplier is not None:
                grad = grad * along_slice(multiplier.to(grad.dtype), selected_dim(ctx.side, ctx.transposed))
        observed = _stacked(norms2) if ctx.observe else None
        return dx if dx is None else once(dx), None, once(grad), None, None, observed, None, None, None


def _segments(tokens: list[int]):
    """(expert, its rows) for every expert with tokens."""
    start = 0
    for expert, count in enumerate(tokens):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _stacked(vectors: list[Tensor | None]) -> Tensor | None:
    """One row per expert, zero for those without tokens; None if there were no tokens at all."""
    some = next((v for v in vectors if v is not None), None)
    return None if some is None else torch.stack([torch.zeros_like(some) if v is None else v for v in vectors])
