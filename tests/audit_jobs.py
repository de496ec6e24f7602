"""What two ranks say of a weight that is read without a call: it cannot be freed under an engine, but named."""

from __future__ import annotations

import torch
import torch.distributed as dist
from readers import Routers, TiedHead, tokens

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer

KINDS = {"router": Routers, "tied": TiedHead}


def stop(kind: str, engine: str) -> None:
    """One forward of a converted model under an engine, and one with the remedy."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for excluded in ((), KINDS[kind].behind):
        settings = {"density": 0.5, "target_modules": "all-matrices", "side": "input"}
        model = convert_to_grass(KINDS[kind](), GrassConfig(**settings, exclude_modules=list(excluded) or None))
        if engine == "fsdp":
            wrapped = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = grass_optimizer(model, torch.optim.SGD, lr=0.1)
        try:
            wrapped(tokens(dist.get_rank())).backward()
            optimizer.step()
            print("trained", [name for name in excluded])
        except RuntimeError as error:
            print(error)
