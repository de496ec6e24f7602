"""One rank of a benchmark, ``python -m grass_hf.measure.bench.worker``: does what lines of JSON on its standard input
say.

    {"join": {...}}  {"make": {...}}  {"step": {...}}  {"count": {...}}  {"probe": {...}}  {"drop": {...}}

are calls of `Rank`'s methods; every line is answered by one. At the end of the input, or of the process that writes
it, the rank ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from ...config.settings import GrassConfig
from ...convert.conversion import convert_to_grass
from ...optim.factory import grass_optimizer
from ..estimate.traffic import layers
from .counting import CountCollectives

_PR_SET_PDEATHSIG = 1


class Rank:
    """A rank of a process group, with the models that it trains."""

    def __init__(self):
        self.runs: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}

    def hello(self) -> int:
        """This process has begun, and is in the namespaces that it was started in."""
        return os.getpid()

    def join(self, rank: int, ranks: int, address: str, port: int, interface: str, timeout: int) -> int:
        """Join the process group, over gloo; the number of ranks in it."""
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        where = f"tcp://{address}:{port}"
        dist.init_process_group("gloo", where, timedelta(seconds=timeout), ranks, rank)
        return dist.get_world_size()

    def make(
        self,
        name: str,
        engine: str,
        model: dict[str, Any],
        grass: dict[str, Any] | None,
        dtype: str,
        batch: int,
        sequence: int,
    ) -> int:
        """Make a model that is trained with AdamW, or with Grass and AdamW; the number of its trained elements.

        Args:
            name: by which the other calls know it.
            engine: "ddp", "fsdp2", "alone" for the bare model, or "quiet" for FSDP2 over a group that sends nothing.
            model: config of a causal language model, as a dict.
            grass: settings of Grass, as a dict; None for AdamW.
            dtype: of the weights.
            batch, sequence: sequences of a step, and their tokens.
        """
        torch.manual_seed(0)
        config = AutoConfig.for_model(**{**model, "use_cache": False})
        plain = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).train()
        wrapped = layers(plain).values()
        if grass is not None:
            convert_to_grass(plain, GrassConfig.from_dict(grass))
        if engine in ("fsdp2", "quiet"):
            mesh = _quiet_mesh() if engine == "quiet" else None  # None: all ranks
            for layer in wrapped:
                fully_shard(layer, mesh=mesh)
            fully_shard(plain, mesh=mesh)
        run = DistributedDataParallel(plain) if engine == "ddp" else plain
        optimizer: torch.optim.Optimizer
        settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
        if grass is None:
            optimizer = torch.optim.AdamW(plain.parameters(), **settings)
        else:
            optimizer = grass_optimizer(plain, torch.optim.AdamW, **settings)
        self.runs[name] = run, optimizer
        self.shape = (batch, sequence, config.get_text_config().vocab_size)
        return sum(p.numel() for p in plain.parameters() if p.requires_grad)

    def step(self, name: str, number: int) -> dict[str, float]:
        """Take an optimizer step on this rank's batch of that number; seconds of its parts, and the loss."""
        run, optimizer = self.runs[name]
        batch, sequence, vocabulary = self.shape
        draws = torch.Generator().manual_seed(number * dist.get_world_size() + dist.get_rank())
        tokens = torch.randint(vocabulary, (batch, sequence), generator=draws)
        began = time.perf_counter()
        loss = run(input_ids=tokens, labels=tokens).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        ended = time.perf_counter()
        parts = {"forward": forward - began, "backward": backward - forward, "optimizer": ended - backward}
        return parts | {"step": ended - began, "loss": loss.item()}

    def count(self, name: str, number: int) -> list[tuple[str, int]]:
        """Take an optimizer step; (kind, bytes) of every message."""
        with CountCollectives() as counted:
            self.step(name, number)
        return counted.messages

    def drop(self, name: str) -> None:
        """Forget a model."""
        del self.runs[name]

    def probe(self, numbers: int, repeat: int) -> float:
        """Seconds that an all-reduce of so many float32 numbers takes, the median."""
        seconds, message = [], torch.zeros(numbers)
        for _ in range(repeat):
            began = time.perf_counter()
            dist.all_reduce(message)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)


def _quiet_mesh() -> DeviceMesh:
    """All ranks, with torch's fake process group between them: what is gathered is this rank's shard, repeated."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (makes the backend known)

    return DeviceMesh.from_group(dist.new_group(backend="fake"), "cpu")


def main() -> None:
    """Answer one line per line; libraries that print to standard output print to standard error instead."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    rank = Rank()
    for line in sys.stdin:
        ((name, arguments),) = json.loads(line).items()
        answers.write(json.dumps(getattr(rank, name)(**arguments)) + "\n")
    os._exit(0)  # peers may be gone already, and a process group's end would wait for them


if __name__ == "__main__":
    main()
