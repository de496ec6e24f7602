"""What the engine that Accelerate runs asks of the settings."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from ..config.settings import GrassConfig
from ..convert.sharded import for_shards
from ..slices.ops.sharding import world_size

logger = logging.get_logger(__name__)

_DDP = {kind for kind in DistributedType if kind.name.startswith("MULTI_")}


def engine_kind() -> DistributedType:
    """The engine of this process; `DistributedType.NO` before Accelerate has been set up."""
    return AcceleratorState().distributed_type if AcceleratorState._shared_state else DistributedType.NO


def fsdp_version() -> int:
    """1 or 2, 0 without FSDP."""
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if AcceleratorState._shared_state else None
    return 0 if plugin is None else int(plugin.fsdp_version)


def forget_evaluation(accelerator, model: Any) -> None:
    """Let DDP wrap a model that `Trainer.evaluate` has seen before `train`.

    Evaluation prepares the model without DDP and marks it as prepared, so that `train` would leave it as it is (seen
    with accelerate 1.15, transformers 5.23): every rank would train for itself, without a sign of it.
    """
    if engine_kind() in _DDP and getattr(model, "_is_accelerate_prepared", False):
        model._is_accelerate_prepared = False
        accelerator._models = [other for other in accelerator._models if other is not model]


def refuse_parallelism() -> None:
    """Stop where matrices or sequences, not only batches, are split among ranks.

    Raises:
        ValueError: tensor, context or sequence parallelism.
    """
    config = getattr(AcceleratorState(), "parallelism_config", None) if AcceleratorState._shared_state else None
    for kind in ("tp", "cp", "sp"):
        if (size := getattr(config, f"{kind}_size", None) or 1) > 1:
            raise ValueError(
                f"{kind}_size={size} in the parallelism config splits every sequence or every matrix among ranks, and "
                "a slice's gradient would be a part of it: use data parallelism, DDP or FSDP2 (dp_replicate_size, "
                "dp_shard_size)."
            )


def adapt_to_engine(config: GrassConfig, model: nn.Module) -> GrassConfig:
    """The settings as the engine needs them: the given ones, but under FSDP2 those of `convert.sharded.for_shards`."""
    if fsdp_version() != 2:
        return config
    if not config.resident:
        raise ValueError(
            "resident=False does not go with FSDP2, where every rank holds only its part of the slices already: leave "
            "it out, or use DDP."
        )
    if config.weight_dtype is not None:
        raise ValueError(
            f"weight_dtype={config.weight_dtype!r} does not go with FSDP2, which shards plain weights: leave it out, "
            "or use DDP."
        )
    one_dtype = AcceleratorState().mixed_precision == "no"
    adapted = for_shards(config, model, _shards(), one_dtype=one_dtype)
    if adapted.slice_dtype != config.slice_dtype:
        logger.warning_once(
            f"FSDP2 wants trainable parameters of one dtype, so slices are {adapted.slice_dtype} like the weights, and "
            "updates below half a unit in their last place are lost: load the model in float32 with mixed_precision: "
            "bf16 instead."
        )
    return adapted


def _shards() -> int:
    """Number of parts that a parameter is split into: all ranks, or under HSDP those of one replica."""
    config = getattr(AcceleratorState(), "parallelism_config", None)
    return world_size() if config is None or config.dp_shard_size == 1 else config.dp_shard_size
