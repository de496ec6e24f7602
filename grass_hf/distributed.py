"""The one collective that Grass adds to data-parallel training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(vectors: list[Tensor]) -> list[Tensor]:
    """Add up each tensor over all ranks, in one all-reduce.

    Every rank must pass tensors of the same shapes in the same order. The sum is bit-identical on every rank,
    which is what lets ranks select the same rows without exchanging them.
    """
    if world_size() == 1 or not vectors:
        return vectors
    flat = torch.cat([v.flatten() for v in vectors])
    dist.all_reduce(flat)
    parts = flat.split([v.numel() for v in vectors])
    return [part.view_as(v) for part, v in zip(parts, vectors, strict=True)]
