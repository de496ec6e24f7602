"""A slice of a parameter that is several matrices, as the single ones see it.

The parameter is (E, m, n) with a slice (E, r, n), or it is flat, (E m, n) with a slice (E r, n) whose E blocks choose
for themselves; on the other side the slice of a flat one is (E m, r), with one choice of columns for all of its
matrices. Everything is a view that autograd follows, made once per forward: the gradients of the matrices come back
stacked, zero for those without tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .ops.grouped_linear import batched_tap
from .ops.products import Layout, Matrix
from .ops.rows import selected_dim
from .ops.tap import tap


class Matrices:
    """Views of a slice by matrix.

    Args:
        active, index, multiplier, norms: of the slice, see `grass_hf.slices.slice.Slice`.
        dim: -2 or -1, the dimension along which it selects.
        layout: of the parameter.
    """

    def __init__(
        self,
        active: Tensor,
        index: Tensor,
        multiplier: Tensor | None,
        norms: Tensor | None,
        *,
        dim: int,
        layout: Layout,
    ):
        self.side = "output" if dim == selected_dim("output", layout.transposed) else "input"
        self.transposed = layout.transposed
        count = layout.matrices
        if active.dim() == 2:
            active = active.view(count, -1, active.shape[-1])
            if dim == -2:
                first = torch.arange(0, count * layout.rows, layout.rows, device=index.device)
                index = index.view(count, -1) - first[:, None]
                multiplier, norms = (None if v is None else v.view(count, -1) for v in (multiplier, norms))
            else:
                index = index.expand(count, -1)
                multiplier, norms = (None if v is None else v.expand(count, -1) for v in (multiplier, norms))
        self.active, self.index, self.multiplier, self.norms = active, index, multiplier, norms

    def tap(self, y: Tensor, x: Tensor, matrix: Matrix) -> Tensor:
        """`ops.tap.tap` for a product ``y`` of one of the matrices, or of all of them."""
        placed: dict[str, Any] = {"side": self.side, "transposed": self.transposed}
        if matrix.whole:
            return batched_tap(y, x, self.active, self.index, multiplier=self.multiplier, norms=self.norms, **placed)
        active, index, multiplier, norms = self._single
        e = matrix.first
        return tap(y, x, active[e], index[e], multiplier=multiplier[e], norms=norms[e], **placed)

    @cached_property
    def _single(self) -> list:
        every = (self.active, self.index, self.multiplier, self.norms)
        return [[None] * len(self.active) if v is None else v.unbind(0) for v in every]
