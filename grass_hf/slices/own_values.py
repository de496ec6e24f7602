"""This rank's part of a tensor as a plain checkpoint has it: a run of its elements, read flat.

Without shards that is all of the tensor; under FSDP2 the elements of some rows, and under DeepSpeed's ZeRO-3 a run that
begins and ends anywhere. Nothing is gathered: a run is this rank's own memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import int8
from .ops.sharding import is_partitioned, is_sharded, local, shape_of, shard_range

# Rows of an int8 weight that become plain ones at a time.
_BLOCK = 4096


@dataclass(frozen=True)
class OwnValues:
    """The elements [start, start + count) of a tensor.

    Attributes:
        tensor: this rank's memory, of any shape; an int8 weight of its own rows.
        start: number of the first element.
        count: of elements.
        shape: of the whole tensor.
        replica: whether another rank has the same elements and is to speak of them.
    """

    tensor: Tensor
    start: int
    count: int
    shape: torch.Size
    replica: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the plain checkpoint."""
        return self.tensor.dtype

    @property
    def is_whole(self) -> bool:
        """Whether these are all elements of the tensor."""
        return self.count == self.shape.numel()

    def at(self, flat: Tensor) -> Tensor:
        """The values at some of these elements, counted from the first; a copy."""
        if not int8.is_int8(self.tensor):
            return self._flat().index_select(0, flat)
        width = self.tensor.shape[-1]
        rows, place = torch.unique(flat // width, return_inverse=True)
        values = flat.new_empty(flat.shape, dtype=self.dtype)
        for first in range(0, rows.numel(), _BLOCK):
            own = (place >= first) & (place < first + _BLOCK)
            plain = int8.read_rows(self.tensor, rows[first : first + _BLOCK]).to(self.dtype)
            values[own] = plain[place[own] - first, flat[own] % width]
        return values

    def all(self) -> Tensor:
        """All of these elements, (count,); of a contiguous tensor its own memory."""
        return int8.dequantize(self.tensor).reshape(-1) if int8.is_int8(self.tensor) else self._flat()

    def _flat(self) -> Tensor:
        return self.tensor.reshape(-1)[: self.count]


def own_values(tensor: Any, *, first: bool) -> OwnValues:
    """What this rank has of a parameter or buffer.

    Args:
        tensor: any.
        first: whether this rank is the first of those that hold tensors which are not sharded.
    """
    if is_partitioned(tensor):
        own, shape = tensor.ds_tensor.data, shape_of(tensor)
        start = dist.get_rank(tensor.ds_process_group) * own.numel()
        return OwnValues(own, start, max(0, min(own.numel(), shape.numel() - start)), shape)
    own = local(tensor.detach())
    if not is_sharded(tensor):
        return OwnValues(own, 0, own.numel(), own.shape, replica=not first)
    width = tensor.shape[1:].numel()
    copies = [tensor.device_mesh.get_local_rank(d) for d, place in enumerate(tensor.placements) if place.is_replicate()]
    return OwnValues(own, shard_range(tensor)[0] * width, own.numel(), tensor.shape, replica=any(copies))
