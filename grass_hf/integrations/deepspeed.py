"""Where grass-hf meets DeepSpeed: `deepspeed.initialize`, and what of its configuration is refused.

`deepspeed.initialize` is the one door through which Accelerate, the Trainer and plain DeepSpeed loops all go, so
`registration.extend_deepspeed` has it call `take_over`. What happens behind the door is in `zero`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ..config.settings import GrassConfig
from ..convert.conversion import describe, is_converted
from ..optim.driving import undriven
from ..optim.muon import MuonAdamW
from ..slices.ops.sharding import check_agreement

_INSTEAD = "use ZeRO-1, 2 or 3 without it, FSDP2 or DDP"

# Settings of "zero_optimization" that change where parameters lie or how they are stored: why not, ordinary values.
_PARTITIONING = {
    "zero_hpz_partition_size": ("ZeRO++ keeps a second copy of weights that Grass would not update", 1),
    "zero_quantized_weights": ("ZeRO++ quantises weights between their uses", False),
    "zero_quantized_nontrainable_weights": ("ZeRO++ quantises the frozen weights that Grass writes to", False),
    "zero_quantized_gradients": ("ZeRO++ quantises gradients, and with them what rows are chosen by", False),
    "mics_shard_size": ("MiCS splits parameters over part of the ranks", -1),
    "zenflow": ("ZenFlow steps on the CPU at other times",),
    "round_robin_gradients": ("DeepSpeed's own table of where masters lie does not know that order", False),
    "elastic_checkpoint": ("its checkpoints do not hold what Grass needs", False),
}


def take_over(arguments: dict[str, Any], initialize: Callable) -> tuple:
    """`deepspeed.initialize` for a model that may be converted.

    Args:
        arguments: of the call, by name.
        initialize: DeepSpeed's own function.

    Raises:
        ValueError: the model is converted, and the configuration asks for what Grass cannot do.
    """
    model: Any = arguments.get("model")
    optimizer: Any = arguments.get("optimizer")
    controller = getattr(optimizer, "grass", None)
    if controller is None:
        # without an optimizer it is inference
        trains = optimizer is not None or arguments.get("model_parameters") is not None
        if trains and isinstance(model, nn.Module) and is_converted(model):
            raise ValueError(
                "the model was converted by Grass, and DeepSpeed makes an optimizer that does not drive its slices: "
                "remove 'optimizer' from its configuration and pass optimizer=grass_optimizer(model, ...)."
            )
        return initialize(**arguments)
    check_config(_read(arguments), controller.config)
    if isinstance(optimizer, MuonAdamW):
        raise ValueError(
            "MuonAdamW orthogonalises matrices, and ZeRO steps optimizers over flat pieces of them: use another base "
            "optimizer (base=adamw_torch), FSDP2 or DDP."
        )
    # before DeepSpeed broadcasts parameters, which would wait for a rank that has others
    check_agreement("deepspeed.initialize", describe(controller.model), group=controller.replicas)
    from .zero import ZeroController

    for slice_ in controller.slices:
        # DeepSpeed wants parameters of one dtype, and keeps float32 masters of its own
        slice_.active.data = slice_.active.data.to(slice_.weight.dtype)
    controller.following = False
    with undriven(optimizer):
        engine, *others = initialize(**arguments)
    ZeroController(controller, engine)
    return engine, *others


def check_config(config: dict[str, Any], settings: GrassConfig) -> None:
    """Refuse what Grass cannot do under DeepSpeed.

    Args:
        config: as DeepSpeed's JSON file has it; "auto" values are taken for their defaults.
        settings: of Grass.

    Raises:
        ValueError: naming the setting and what to use instead.
    """
    if not settings.resident:
        raise ValueError(
            "resident=False does not go with ZeRO, where every rank keeps only its part of what is trained: leave it "
            "out."
        )
    if settings.weight_dtype is not None:
        raise ValueError(
            f"weight_dtype={settings.weight_dtype!r} does not go with ZeRO, which casts and splits weights: leave it "
            "out, or use DDP."
        )
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage}: Grass runs under ZeRO-1, 2 and 3; without ZeRO use DDP.")
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device != "none":
            raise ValueError(
                f"zero_optimization.{name}.device={device!r}: DeepSpeed would step another optimizer on the CPU, or "
                f"move the weights that Grass writes to: {_INSTEAD}. Slices are a fraction of what offloading saves."
            )
    for name, (reason, *ordinary) in _PARTITIONING.items():
        if zero.get(name, "auto") not in ("auto", None, *ordinary):
            raise ValueError(f"zero_optimization.{name}={zero[name]!r}: {reason}: {_INSTEAD}.")
    if "optimizer" in config:
        raise ValueError(
            "the DeepSpeed configuration has an 'optimizer', which would not drive the Grass slices: remove it and say "
            "base=adamw_torch (or another) in optim_args, or pass optimizer=grass_optimizer(model, ...)."
        )
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 0)
    if tensor_parallel not in (0, 1, "auto"):
        raise ValueError(f"tensor_parallel.autotp_size={tensor_parallel} splits layers up: {_INSTEAD}.")


def _read(arguments: dict[str, Any]) -> dict[str, Any]:
    config = arguments.get("config") or arguments.get("config_params")
    config = config or getattr(arguments.get("args"), "deepspeed_config", None)
    if isinstance(config, (str, os.PathLike)):
        with open(config, encoding="utf-8") as file:
            return json.load(file)
    return config or {}
