"""Columns of one input that several layers keep for backward, kept once.

With side "input" a layer needs only x[:, index] for its slice's gradient. q_proj, k_proj and v_proj read the same x;
with the same index they need the same columns, and three copies of a quarter would be nearly as much as x itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .rows import take_columns


class SharedColumns:
    """The latest columns gathered for a group of layers; holds nothing alive by itself."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._source: Callable[[], Tensor | None] = lambda: None
        self._columns: Callable[[], Tensor | None] = lambda: None
        self._key: tuple | None = None

    def gather(self, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """``x[..., index]`` in `dtype`: the tensor that was made for another layer of the group, if there is one."""
        # layers of a group select in the same steps, so their indices agree when their versions do
        key = (x._version, index._version, dtype)
        columns = self._columns()
        if columns is None or self._source() is not x or self._key != key:
            columns = take_columns(x.detach(), index).to(dtype)
            self._source, self._columns, self._key = weakref.ref(x), weakref.ref(columns), key
        return columns

    def __getstate__(self):
        return {}  # weak references cannot be pickled, and a copy has its own inputs

    def __setstate__(self, state):
        self._forget()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), SharedColumns())
