"""The gradient tap and the block-wise gradient norms: the tensor work of Grass.

For ``y = x W^T`` with ``W`` (m x n), ``dY = dL/dy`` (T x m, T tokens) and ``x`` (T x n) the full gradient is
``G = dY^T x``. Grass wants only r rows of it, ``C = rho G[index]``, and gathering before multiplying gives

    output side:  C = rho dY[:, index]^T x         (r x n)   T r n multiply-adds instead of T m n
    input side:   C = dY^T x[:, index] rho         (m x r)   the same for columns; only x[:, index] is kept

so the m x n gradient never exists. `tap` is the identity on ``y`` in the forward pass; in the backward pass it
hands dY through untouched and gives C to the active slice. The layer's own forward stays as it is.

[Note: norms as a gradient] Reselection needs the squared norm of every row (column) of G. The tap returns them
as the "gradient" of a leaf vector ``norms``, so autograd itself adds them up over micro-batches and over several
calls of one module, under either kind of gradient checkpointing and in compiled graphs, with no side effect of
ours in a backward pass. What is summed are squared norms of the single contributions, not of their sum: exact for
one call per step, otherwise the second moment of the micro-batch gradients (docs/concepts.md, Deviations).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows of G that exist at one time while norms are computed: large enough for full matmul speed, small enough
# that the block (256 x n) stays far below the m x n gradient that must not exist.
NORM_BLOCK = 256


def tap(
    y: Tensor,
    x: Tensor,
    active: Tensor,
    index: Tensor,
    *,
    side: str,
    multiplier: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Return `y` unchanged and, in backward, give `active` the gradient of the selected rows or columns.

    Args:
        y: the layer's output, (..., m), modified in place as far as autograd is concerned.
        x: the layer's input as it came, (..., n); cast to the dtype of dY in backward, as autocast would.
        active: the active slice, (r, n) for side "output", (m, r) for "input".
        index: int64 (r,), the selected rows (columns) of the weight.
        side: "output" or "input".
        multiplier: rho, (r,), multiplies the rows (columns) of the slice's gradient; None means 1.
        norms: leaf of shape (m,) for "output", (n,) for "input", which receives the squared norms of the rows
            (columns) of the full gradient as its gradient; None when no observation is due.

    Source: Grass, section 3 and Algorithm 1; see the module's docstring.
    """
    return _Tap.apply(y, x, active, index, multiplier, norms, side)


def squared_norms(a: Tensor, b: Tensor, block: int = NORM_BLOCK) -> Tensor:
    """Squared norms of the rows of ``a^T b`` without forming it.

    Args:
        a: (T, p).
        b: (T, q).
        block: rows of the product that exist at a time.

    Returns:
        (p,), in float64 for float64 inputs, else in float32.
    """
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    parts = [torch.mm(columns.t(), b).to(dtype).square().sum(dim=1) for columns in a.split(block, dim=1)]
    return torch.cat(parts)


class _Tap(torch.autograd.Function):
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
    ) -> Tensor:
        ctx.side = side
        ctx.observe = norms is not None
        ctx.active_dtype = active.dtype
        if side == "input" and not ctx.observe:
            x = x.index_select(-1, index).to(y.dtype)  # all that backward needs: activation memory falls to r/n
        ctx.save_for_backward(x, index, multiplier)
        if torch.compiler.is_compiling():
            return y.view_as(y)
        # Declared dirty rather than returned as a view, so that models may go on to modify y in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, index, multiplier = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        x2 = x.reshape(-1, x.shape[-1]).to(dy.dtype)
        norms2 = None
        # A backward called inside an autocast region would autocast these too; ordinary layers' backward does not.
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.side == "output":
                if ctx.observe:
                    norms2 = squared_norms(dy2, x2)
                grad = torch.mm(dy2.index_select(1, index).t(), x2).to(ctx.active_dtype)
                if multiplier is not None:
                    grad = grad * multiplier.to(grad.dtype)[:, None]
            else:
                if ctx.observe:
                    norms2 = squared_norms(x2, dy2)
                    x2 = x2.index_select(1, index)
                grad = torch.mm(dy2.t(), x2).to(ctx.active_dtype)
                if multiplier is not None:
                    grad = grad * multiplier.to(grad.dtype)
        return dy, None, grad, None, None, norms2, None
