"""What two ranks say of a weight that is read without a call: it cannot be freed under an engine, but named."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from readers import Routers, TiedHead, tokens

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer

KINDS = {"router": Routers, "tied": TiedHead}


def stop() -> None:
    """One forward of a converted model under an engine, and one with the remedy; for each kind and engine."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for kind, engine in itertools.product(KINDS, ("ddp", "fsdp")):
        for excluded in ((), KINDS[kind].behind):
            try:
                _step(kind, engine, list(excluded))
                print(kind, engine, "trained", excluded)
            except RuntimeError as error:
                print(kind, engine, error)


def _step(kind: str, engine: str, excluded: list[str]) -> None:
    from torch.distributed.fsdp import fully_shard

    config = GrassConfig(density=0.5, target_modules="all-matrices", side="input", exclude_modules=excluded or None)
    model = convert_to_grass(KINDS[kind](), config)
    if engine == "fsdp":
        wrapped = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=0.1)
    wrapped(tokens(dist.get_rank())).backward()
    optimizer.step()
