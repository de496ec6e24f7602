"""Overwriting selected rows or columns, with a note of which elements got other bits.

On a CPU only those elements are written where they are few: after a small step that is faster than to write all. So a
step that is followed may take less time than one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .bits import Elements, differing
from .rows import gathered_columns, put_rows, take_rows

# Elements that are compared at a time, with temporary copies of them that stay in a CPU's caches.
_AT_A_TIME = 2**18


def replace_rows(tensor: Tensor, index: Tensor, rows: Tensor, dim: int, changed: Elements) -> None:
    """`rows.put_rows`, and add to a set the elements of ``rows`` that were others in the tensor.

    Args:
        tensor: (..., p, q).
        index: int64 (..., r), the rows (columns).
        rows: as `put_rows` takes them, in the tensor's dtype.
        dim: -2 or -1.
        changed: of elements of ``rows``, read flat.
    """
    rows = rows.contiguous()
    lines = tensor.is_contiguous() and index.dim() == 1 and (dim == -1 or tensor.dim() == 2)
    if not lines or tensor.device.type != "cpu":
        before = take_rows(tensor, index, dim).contiguous()
        put_rows(tensor, index, rows, dim)
        changed.add(differing(before, rows))
        return
    width = tensor.shape[-1]
    table, rows = tensor.view(-1, width), rows.view(-1, rows.shape[-1])
    for first, last in _blocks(*rows.shape):
        new = rows[first:last]
        if dim == -1:
            own = table[first:last]
            found = differing(gathered_columns(own, index.expand(last - first, -1)), new)
            numbers = index
        else:
            own, numbers = table, index[first:last]
            found = differing(own.index_select(0, numbers), new)
        if found.dtype is torch.bool:
            own.index_copy_(dim, numbers, new)
        elif found.numel():
            line = found // rows.shape[1]
            within = found - line * rows.shape[1]
            flat = line * width + numbers[within] if dim == -1 else numbers[line] * width + within
            own.view(-1).index_copy_(0, flat, new.reshape(-1)[found])
        changed.add(found, first * rows.shape[1])


def _blocks(lines: int, width: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) line of blocks that begin at a multiple of eight elements."""
    step = max(8, _AT_A_TIME // max(width, 1) // 8 * 8)
    for first in range(0, lines, step):
        yield first, min(first + step, lines)
