"""One rank of many, simulated: DDP and FSDP2 themselves run over a process group that sends nothing.

torch's fake process group says that it has N ranks, and this process is the first of them. DDP's reducer and
`fully_shard` allocate their buckets, shards and gathered layers as ever, and the estimator counts them.
DeepSpeed does not run under fake tensors: what ZeRO holds is computed, in `grass_hf.measure.estimate.zero_sizes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from ...config.fields import unknown_key
from ...config.settings import GrassConfig
from ...convert.sharded import for_shards
from ...integrations.simulation import ddp_of_one_rank

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
# Methods whose optimizers or stand-ins take whole gradients and parameters, or run no operation that is simulated.
_WHOLE = ("galore", "apollo", "adamw8bit")


def check_engine(engine: str, world_size: int, method: str) -> None:
    """Refuse a number of ranks, an engine or a method that is not simulated, with a sentence."""
    if engine not in ENGINES:
        raise ValueError(f"engine={unknown_key(engine, ENGINES, 'an engine that can be estimated')}")
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size={world_size!r} is not a positive whole number: give the number of processes.")
    if world_size == 1:
        return
    if engine != "ddp" and method in _WHOLE:
        raise ValueError(
            f"method={method!r} is not estimated under {engine}, which leaves no rank a whole gradient: give "
            "engine='ddp', or leave the method out."
        )
    if not dist.is_available():
        raise ValueError(
            f"world_size={world_size} needs a torch with torch.distributed, which this build lacks: install another "
            "build, or leave world_size out."
        )
    if dist.is_initialized():
        raise ValueError(
            f"world_size={world_size} is simulated with a process group of its own, and this process has one already: "
            "estimate before torch.distributed is initialised."
        )


class Engine:
    """How one rank of several trains; as a context it is that rank.

    Args:
        name: one of `ENGINES`; under ZeRO the step of one process is simulated, see `measure.estimate.zero_sizes`.
        world_size: number of ranks; with 1 nothing is wrapped.
    """

    def __init__(self, name: str = "ddp", world_size: int = 1):
        self.name, self.world_size = name, world_size

    @property
    def zero_stage(self) -> int:
        """1 to 3 under ZeRO, else 0."""
        return int(self.name[-1]) if self.world_size > 1 and self.name.startswith("zero") else 0

    @contextmanager
    def rank(self) -> Iterator[Engine]:
        """Be the first rank meanwhile; enter it outside a `FakeTensorMode`, since meshes hold real numbers."""
        if self.world_size == 1 or self.zero_stage:
            yield self
            return
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=self.world_size, store=FakeStore())
        try:
            if self.name == "fsdp2":
                self.mesh = dist.device_mesh.init_device_mesh("cpu", (self.world_size,))
            yield self
        finally:
            dist.destroy_process_group()

    def adapt(self, config: GrassConfig, model: nn.Module) -> GrassConfig:
        """The settings as the engine needs them."""
        if self.world_size == 1 or self.name == "ddp":
            return config
        if not config.resident:
            raise ValueError(
                f"resident=False does not go with {self.name}, where every rank holds its part of what is trained: use "
                "resident=True, or engine='ddp'."
            )
        # ZeRO has one dtype for the whole model, and float32 copies of its own
        return for_shards(config, model, 1 if self.zero_stage else self.world_size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What a training loop calls instead of the model: DDP's wrapper, or the model itself, sharded."""
        if self.world_size == 1 or self.zero_stage:
            return model
        if self.name == "ddp":
            return ddp_of_one_rank(model)
        shard(model, self.mesh)
        return model


def shard(model: nn.Module, mesh) -> None:
    """`fully_shard` as accelerate does it: every layer that transformers would not split, then the rest."""
    from torch.distributed.fsdp import fully_shard

    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
