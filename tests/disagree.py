"""Ranks that do not agree, which `forks.ranks` starts: every rank prints the sentence with which it stops."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from helpers import tiny_llama, trainer

from grass_hf import GrassConfig, convert_to_grass, distributed, grass_optimizer


def start(case: str, folder: str) -> None:
    """Begin to train as the case says, two ranks that each have their own idea of it."""
    distributed.check_agreement.__defaults__ = (5.0,)  # seconds
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:  # see scripts/cpu_fsdp.py
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    options = {"use_cpu": not sharded, **({} if sharded else {"ddp_backend": "gloo"})}
    rank, begun = int(os.environ["RANK"]), time.monotonic()
    try:
        if case == "config":
            trainer(folder, optim_args=f"rank={8 - 2 * rank},base=adamw_torch", **options)
        elif case == "model":
            trainer(folder, tiny_llama(num_hidden_layers=1 + rank), **options)
        elif case == "without":
            trainer(folder, **({} if rank == 0 else {"optim": "adamw_torch", "optim_args": None}), **options)
            if rank == 1:
                time.sleep(8)  # it would wait for the others somewhere in training
                raise RuntimeError("rank 1 trains without Grass")
        elif case in ("loop", "loop_without"):
            dist.init_process_group("gloo")
            _loop(rank, without=case == "loop_without" and rank == 1)
    except RuntimeError as error:
        assert time.monotonic() - begun < 40
        print(f"stopped: {error}", flush=True)
    assert dist.get_world_size() == 2


def _loop(rank: int, without: bool) -> None:
    model = tiny_llama()
    if without:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        convert_to_grass(model, GrassConfig(rank=4, seed=rank))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
