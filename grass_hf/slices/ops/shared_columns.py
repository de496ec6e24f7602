"""Columns of one input that several layers keep for backward, kept once.

With side "input" a layer needs only x[:, index] for its slice's gradient. q_proj, k_proj and v_proj read the same x;
with the same index they need the same columns, and three copies of a quarter would be nearly as much as x itself. One
gather serves them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rows import gathered_columns, selects_faster, take_columns


class SharedColumns:
    """The latest columns gathered for a group of layers; holds nothing alive by itself."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._source: Callable[[], Tensor | None] = lambda: None
        self._columns: Callable[[], Tensor | None] = lambda: None
        self._key: tuple | None = None
        self._index: Tensor | None = None
        self._expanded: Tensor | None = None
        self._count = 0

    def gather(self, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """``x[..., index]`` in `dtype`: the tensor that was made for another layer of the group, if there is one.

        Args:
            x: (..., n).
            index: int64 (r,).
            dtype: of what is returned.

        Returns:
            (T, r), of a contiguous `x` of T rows; else (..., r). It has no gradient.
        """
        columns = self._columns()
        # layers of a group select in the same steps, so their indices agree when their versions do
        key = (x._version, index._version, dtype)
        if columns is None or self._source() is not x or self._key != key:
            columns = self._taken(x.detach() if torch.is_grad_enabled() else x, index)
            if columns.dtype is not dtype:
                columns = columns.to(dtype)
            self._source, self._columns, self._key = weakref.ref(x), weakref.ref(columns), key
        return columns

    def _taken(self, x: Tensor, index: Tensor) -> Tensor:
        if not x.is_contiguous():
            return take_columns(x, index)
        size = x.shape[-1]
        rows = x if x.dim() == 2 else x.view(-1, size)
        if selects_faster(x):
            return rows.index_select(-1, index)
        count = x.numel() // size
        if self._index is not index or self._count != count:  # else the same view of it serves again
            self._index, self._count, self._expanded = index, count, index.expand(count, index.shape[0])
        expanded: Any = self._expanded
        return gathered_columns(rows, expanded)

    def __getstate__(self):
        return {}  # weak references cannot be pickled, and a copy has its own inputs

    def __setstate__(self, state):
        self._forget()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), SharedColumns())
