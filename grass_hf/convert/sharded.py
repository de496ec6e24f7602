"""Settings for a model whose parameters will be sharded."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..config.settings import GrassConfig


def for_shards(config: GrassConfig, model: nn.Module, ranks: int, *, one_dtype: bool = True) -> GrassConfig:
    """The settings as FSDP2 needs them.

    Every rank trains rows of its own shard, so rows are chosen by as many blocks as there are ranks; and the
    trainable parameters of one shard must have one dtype, so half-precision weights get slices of their own dtype.

    Args:
        config: as given.
        model: not converted yet.
        ranks: number of shards.
        one_dtype: False under mixed precision, where accelerate casts what is trained to float32.
    """
    if config.row_blocks % ranks:
        config = dataclasses.replace(config, row_blocks=ranks)
    half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if one_dtype and config.slice_dtype is None and half:
        config = dataclasses.replace(config, slice_dtype=str(half.pop()).removeprefix("torch."))
    return config
