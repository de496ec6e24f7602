"""Eight sequences a step on any number of ranks under DDP, which `forks.ranks` starts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from helpers import VOCABULARY, plain_state, tiny_llama
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.measure.bench.counting import CountCollectives
from grass_hf.measure.estimate.simulate import enable_checkpointing

STEPS = 8
SETTINGS = {"density": 0.25, "update_interval": 3, "selection": "top_r", "side": "output", "state_policy": "carry"}


def train(file: str, ranks: int, settings: dict[str, dict[str, Any]]) -> None:
    """Train once with each of the settings; rank 0 writes what came of it, by name."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == ranks
    outcomes = {}
    for name, options in settings.items():
        print(name, flush=True)
        outcomes[name] = _run(**options)
    if dist.get_rank() == 0:
        torch.save(outcomes, file)


def _run(
    accumulate=1, clip=None, bfloat16=False, checkpointing=False, ddp=None, cast="float32", **config
) -> dict[str, Any]:
    """Losses, rows and messages of every step, and weights; `config` is of Grass, `ddp` of torch's wrapper.

    `cast` is the dtype of the model.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny_llama().to(getattr(torch, cast))
    if checkpointing:
        enable_checkpointing(model)
    convert_to_grass(model, GrassConfig(**{**SETTINGS, **config}))
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    losses, chosen, sent = [], [], []
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(step))
        own = tokens.chunk(ranks)[rank]
        total = torch.zeros(())
        for number, slice_ in enumerate(own.chunk(accumulate)):
            with contextlib.nullcontext() if number == accumulate - 1 else wrapped.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                    loss = wrapped(input_ids=slice_, labels=slice_).loss / accumulate
                loss.backward()
            total += loss.detach()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        with CountCollectives() as counted:
            optimizer.step()
        optimizer.zero_grad()
        sent.append(counted.messages)
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
        chosen.append([slice_.index.clone() for slice_ in grass_slices(model)])
        _check_same_on_every_rank([*chosen[-1], *plain_state(model).values()])  # before DDP broadcasts buffers again
    norms = sum(slice_.state.size for slice_ in grass_slices(model)) * 4
    outcome = {"ranks": ranks, "losses": losses, "chosen": chosen, "weights": plain_state(model)}
    return outcome | {"sent": sent, "norms": norms}


def _check_same_on_every_rank(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    assert all(torch.equal(other, flat) for other in everyone)


def run_out(ranks: int) -> None:
    """Rank 1 has a batch less, within torch's `Join`; every rank prints the sentence with which it stops."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == ranks
    model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25, update_interval=3))
    wrapped = DistributedDataParallel(model)
    before = plain_state(model)
    tokens = torch.arange(8)[None]
    try:
        with Join([wrapped]):
            for _ in range(3 - dist.get_rank()):
                wrapped(input_ids=tokens, labels=tokens).loss.backward()
    except ValueError as error:
        print(f"refused: {error}", flush=True)
    assert all(torch.equal(value, before[name]) for name, value in plain_state(model).items())
