"""Ranks that do not agree, which `forks.ranks` starts: every rank prints the sentence with which it stops.

A rank that runs without Grass runs none of its code. What ends it is that its peers are gone: here gloo sees their
connections closed; else the launcher, which kills all when one has failed.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from helpers import tiny_llama, trainer

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.slices.ops import sharding

ZERO = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
# environment of a rank, by engine
ZERO_ENGINES = {f"zero{stage}": {**ZERO, "ZERO_STAGE": str(stage)} for stage in (1, 2, 3)}


def start(case: str, folder: str) -> None:
    """Begin to train as the case says, two ranks that each have their own idea of it."""
    sharding.check_agreement.__defaults__ = (5.0,)  # seconds
    stage = int(os.environ.get("ZERO_STAGE", 0))
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded or stage:  # see scripts/cpu_fsdp.py
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    options = {"use_cpu": False} if sharded or stage else {"use_cpu": True, "ddp_backend": "gloo"}
    if stage:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel to compile
        options["deepspeed"] = _zero(stage)
    rank, begun = int(os.environ["RANK"]), time.monotonic()
    foreign = rank == 1 and case.endswith("without")
    try:
        if case == "config":
            trainer(folder, optim_args=f"rank={8 - 2 * rank},base=adamw_torch", **options)
        elif case == "model":
            trainer(folder, tiny_llama(num_hidden_layers=1 + rank), **options)
        elif case == "without":
            trainer(folder, **({"optim": "adamw_torch", "optim_args": None} if foreign else {}), **options).train()
        elif case in ("loop", "loop_without"):
            dist.init_process_group("gloo")
            _loop(rank, foreign, stage)
    except Exception as error:
        assert dist.get_world_size() == 2
        print(f"{'ended' if foreign else 'stopped'}: {type(error).__name__}: {error}", flush=True)
    else:
        raise AssertionError("nothing stopped this rank")
    assert time.monotonic() - begun < 40
    if case.endswith("without"):  # as a process that has failed: without another word to its peers
        sys.stdout.flush()
        os._exit(0)


def _zero(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def _loop(rank: int, foreign: bool, stage: int) -> None:
    model, tokens = tiny_llama(), torch.arange(8)[None]
    if foreign:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        settings = {"rank": 4 + rank} if stage else {"rank": 4, "seed": rank}
        convert_to_grass(model, GrassConfig(**settings))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
    if stage:
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_zero(stage))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        return
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    if foreign:  # a loop of its own sends nothing: what it does next with the others
        dist.barrier()
