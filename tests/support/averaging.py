"""Ranks whose gradients are sent by a communication hook, or whose parameters are averaged now and then."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from helpers import VOCABULARY, plain_state, tiny_llama
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

STEPS = 8
SETTINGS = {"update_interval": 3, "stagger": 1, "side": "output", "state_policy": "carry"}


def _loss(model, step):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens = torch.randint(VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
    return model(input_ids=tokens, labels=tokens).loss


def _model(density):
    model = tiny_llama()
    if density is None:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
    convert_to_grass(model, GrassConfig(density=density, target_modules="all-matrices", **SETTINGS))
    return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2)


def hooks(file: str, ranks: int) -> None:
    """Train with each hook, plainly and with Grass; rank 0 writes the weights, and how often residuals were kept."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == ranks
    found = {}
    for hook in ("fp16", "powersgd"):
        for density in (None, 1.0, 0.25):
            model, optimizer = _model(density)
            wrapped = DistributedDataParallel(model)
            state = None
            if hook == "fp16":
                wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
            else:
                state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
                wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
            kept = []
            for step in range(STEPS):
                _loss(wrapped, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                kept.append(state is not None and bool(state.error_dict))
            found[hook, density] = {"weights": plain_state(model), "kept": kept}
    if dist.get_rank() == 0:
        torch.save(found, file)


def local_sgd(file: str, ranks: int) -> None:
    """torch's averagers, which take parameters with a gradient, and accelerate's, which takes all."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == ranks
    found = {}
    for name in ("averager", "optimizer"):
        model, optimizer = _model(0.25)
        averager = PeriodicModelAverager(period=2, warmup_steps=0)
        stepped = PostLocalSGDOptimizer(optim=optimizer, averager=averager) if name == "optimizer" else optimizer
        try:
            for step in range(STEPS):
                _loss(model, step).backward()
                stepped.step()
                if name == "averager":
                    averager.average_parameters(model.parameters())
                optimizer.zero_grad()
        except RuntimeError as error:
            found[name] = str(error)
    accelerator = Accelerator(cpu=True)
    model, optimizer = _model(0.25)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    with LocalSGD(accelerator=accelerator, model=wrapped, local_sgd_steps=2) as local:
        for step in range(STEPS):
            with accelerator.no_sync(wrapped):
                accelerator.backward(_loss(wrapped, step))
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    agree = all(slice_.rank_part(slice_, False).agrees() for slice_ in grass_slices(model))
    flat = torch.cat([value.flatten() for value in plain_state(model).values()])
    everyone = [torch.empty_like(flat) for _ in range(ranks)]
    dist.all_gather(everyone, flat)
    found["accelerate"] = {"agree": agree, "same": all(torch.equal(flat, other) for other in everyone)}
    if dist.get_rank() == 0:
        torch.save(found, file)
