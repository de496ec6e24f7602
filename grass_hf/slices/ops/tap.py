"""The gradient tap and the block-wise gradient norms: the tensor work of Grass.

For ``y = x W^T`` with ``W`` (m x n), ``dY = dL/dy`` (T x m, T tokens) and ``x`` (T x n) the full gradient is
``G = dY^T x``. Grass wants only r rows of it, ``C = rho G[index]``, and gathering before multiplying gives

    output side:  C = rho dY[:, index]^T x         (r x n)   T r n multiply-adds instead of T m n
    input side:   C = dY^T x[:, index] rho         (m x r)   the same for columns; only x[:, index] is kept

so the m x n gradient never exists. `tap` is the identity on ``y`` in the forward pass; in the backward pass it
hands dY through untouched and gives C to the active slice. The layer's own forward stays as it is.
`embedding_tap` is the same for a table of V x d that is looked up, where x is one-hot and C = G[:, index] is V x r;
the grouped products of experts are in `grass_hf.slices.ops.grouped_linear`.

[Note: norms as a gradient] Reselection needs the squared norm of every row (column) of G. The tap returns them
as the "gradient" of a leaf vector ``norms``, so autograd itself adds them up over micro-batches and over several
calls of one module, under either kind of gradient checkpointing and in compiled graphs, with no side effect of
ours in a backward pass. What is summed are squared norms of the single contributions, not of their sum: exact for
one call per step, otherwise the second moment of the micro-batch gradients (docs/concepts.md, Deviations).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .double_backward import once
from .row_norms import NORM_BLOCK, accumulation_dtype, squared_norms
from .rows import along_slice, selected_dim, take_columns


def tap(
    y: Tensor,
    x: Tensor,
    active: Tensor,
    index: Tensor,
    *,
    side: str,
    transposed: bool = False,
    multiplier: Tensor | None = None,
    norms: Tensor | None = None,
    by_sequence: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    """Return `y` unchanged and, in backward, give `active` the gradient of the selected rows or columns.

    Args:
        y: the layer's output, (..., m).
        x: the layer's input as it came, (..., n); cast to the dtype of dY in backward, as autocast would.
        active: the active slice, (r, n) for side "output", (m, r) for "input", or its transpose.
        index: int64 (r,), the selected rows (columns) of the weight.
        side: "output" or "input".
        transposed: the weight is stored n x m (`Conv1D`), and so is the slice.
        multiplier: rho, (r,), multiplies the rows (columns) of the slice's gradient; None means 1.
        norms: leaf of shape (m,) for "output", (n,) for "input", which receives the squared norms of the rows
            (columns) of the full gradient as its gradient; None when no observation is due.
        by_sequence: sum the squared norms of every sequence's own gradient, for ``x`` of (B, T, n), instead of the
            norms of the gradient of all of them: a sum that does not depend on how a batch is split up.
        columns: ``x[..., index]`` in the dtype of `y` for side "input", if it has been gathered already.

    Source: Grass, section 3 and Algorithm 1; see the module's docstring.
    """
    return _Tap.apply(y, x, active, index, multiplier, norms, columns, side, transposed, by_sequence)


def embedding_tap(
    y: Tensor,
    ids: Tensor,
    active: Tensor,
    index: Tensor,
    *,
    padding_idx: int | None = None,
    multiplier: Tensor | None = None,
    norms: Tensor | None = None,
    by_sequence: bool = False,
) -> Tensor:
    """Return the looked-up rows `y` unchanged and, in backward, give `active` the gradient of the selected columns.

    Args:
        y: (..., d), rows of the table.
        ids: int64 (...), their numbers.
        active: the active slice, (V, r).
        index: int64 (r,), the selected columns of the table.
        padding_idx: row that takes no gradient, as in `torch.nn.Embedding`.
        multiplier, norms, by_sequence: as for `tap`; `norms` is of shape (d,).
    """
    padding = -1 if padding_idx is None else padding_idx
    return _EmbeddingTap.apply(y, ids, active, index, multiplier, norms, padding, by_sequence)


def embedding_squared_norms(dy: Tensor, ids: Tensor, padding: int, block: int = NORM_BLOCK) -> Tensor:
    """Squared norms of the columns of a table's gradient, from at most T of its V rows at a time.

    Args:
        dy: (T, d), gradient of the looked-up rows.
        ids: int64 (T,), their numbers.
        padding: row that takes no gradient, or -1.
        block: columns of the gradient that exist at a time.

    Returns:
        (d,), in float64 for float64 inputs, else in float32.
    """
    order = ids.argsort(stable=True)
    ids = ids[order]
    # rows of the table are numbered by first occurrence: shapes do not depend on how many there are
    row = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).cumsum(0)])
    dy = dy[order].masked_fill((ids == padding)[:, None], 0.0).to(accumulation_dtype(dy.dtype))
    return torch.cat([_sum_rows(part, row, len(row)).square().sum(dim=0) for part in dy.split(block, dim=1)])


def _sum_rows(values: Tensor, row: Tensor, rows: int, padding: int = -1) -> Tensor:
    """(rows, d): the sums of `values` (T, d) by row number; torch's own backward of an embedding. On a GPU
    it is deterministic for thousands of tokens only under `torch.use_deterministic_algorithms(True)`."""
    return torch.ops.aten.embedding_dense_backward(values, row, rows, padding, False)


def alias(y: Tensor) -> Tensor:
    """A tensor over the same memory for a `Function` to return, which models may go on to modify in place.

    A view of an input could not be modified; declaring the input dirty would cost a copy in backward where it is a
    view itself, as the output of a linear layer with bias is.
    """
    return y.view_as(y) if torch.compiler.is_compiling() else torch.unsafe_chunk(y, 1)[0]


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
        columns: Tensor | None,
        side: str,
        transposed: bool,
        by_sequence: bool,
    ) -> Tensor:
        ctx.side, ctx.transposed, ctx.by_sequence = side, transposed, by_sequence
        ctx.observe = norms is not None
        ctx.active_dtype = active.dtype
        if side == "input" and not ctx.observe:
            # all that backward needs: activation memory falls to r/n
            kept = take_columns(x, index).to(y.dtype) if columns is None else columns
            ctx.save_for_backward(kept, None, multiplier)
        else:
            ctx.save_for_backward(x, index, multiplier)
        return alias(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        # A backward called inside an autocast region would autocast these products too; ordinary layers' does not.
        on = torch.is_autocast_enabled(dy.device.type)
        with torch.autocast(dy.device.type, enabled=False) if on else nullcontext():
            grad, norms2 = _slice_gradient(ctx, dy)
        return once(dy), None, once(grad), None, None, norms2, None, None, None, None


def _slice_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of the active slice and, when they are observed, the squared norms of all rows (columns)."""
    x, index, multiplier = ctx.saved_tensors
    x = x.to(dy.dtype)
    norms2: Any = None
    if ctx.observe:
        pairs = _pairs(dy, x, ctx.by_sequence)
        if ctx.side == "input":
            pairs = ((b, a) for a, b in pairs)
        norms2 = sum(squared_norms(_flat(a), _flat(b)) for a, b in pairs)
    if ctx.side == "output":
        dy = take_columns(dy, index)
    elif ctx.observe:
        x = take_columns(x, index)
    left, right = (x, dy) if ctx.transposed else (dy, x)
    grad = torch.mm(_flat(left).t(), _flat(right)).to(ctx.active_dtype)
    if multiplier is not None:
        grad = grad * along_slice(multiplier.to(grad.dtype), selected_dim(ctx.side, ctx.transposed))
    return grad, norms2


def _flat(values: Tensor) -> Tensor:
    """(..., d) as (T, d)."""
    return values.reshape(-1, values.shape[-1])


def _pairs(dy: Tensor, inputs: Tensor, by_sequence: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """What is scored together: each sequence of dY (B, T, m) with its inputs, or all tokens at once."""
    return zip(dy, inputs, strict=True) if by_sequence and dy.dim() > 2 else [(dy, inputs)]


class _EmbeddingTap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        ids: Tensor,
        active: Tensor,
        index: Tensor,
        multiplier: Tensor | None,
        norms: Tensor | None,
        padding: int,
        by_sequence: bool,
    ) -> Tensor:
        ctx.observe, ctx.by_sequence = norms is not None, by_sequence
        ctx.rows, ctx.active_dtype, ctx.padding = active.shape[0], active.dtype, padding
        ctx.save_for_backward(ids, index, multiplier)
        return alias(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        ids, index, multiplier = ctx.saved_tensors
        norms2 = None
        if ctx.observe:
            pairs = _pairs(dy, ids, ctx.by_sequence)
            norms2 = sum(embedding_squared_norms(_flat(a), b.reshape(-1), ctx.padding) for a, b in pairs)
        grad = _sum_rows(_flat(take_columns(dy, index)), ids.reshape(-1), ctx.rows, ctx.padding)
        grad = grad.to(ctx.active_dtype)
        if multiplier is not None:
            grad = grad * multiplier.to(grad.dtype)
        return once(dy), None, once(grad), None, None, norms2, None, None
