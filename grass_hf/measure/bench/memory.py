"""``grass-hf bench memory``: the estimator against real training runs on this machine.

Every case is trained twice, each time in processes of its own: once under `PlainCounter`, which adds up the storages of
all tensors that are alive after every operation, and once under nothing, for what the operating system saw: the growth
of resident memory over what the process had before the model was made. Three figures that should agree.

[Note: resident memory] RSS is a measure of tensors only if freed memory goes back to the system, so blocks above 64 KiB
get mappings of their own (``MALLOC_MMAP_THRESHOLD_``); if libraries have made their pools and threads before the base
is taken, by a small training run of the same kind; and if the peak is the model's and not theirs, so the kernel's
high-water mark is set back (``/proc/self/clear_refs``). On a GPU it is ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from ...config.settings import GrassConfig
from ...convert.conversion import convert_to_grass
from ...convert.sharded import for_shards
from ...optim.driving import controller_of
from ...optim.factory import grass_optimizer
from ..estimate.fake_ranks import shard
from ..estimate.live_bytes import plain_tensors
from ..estimate.memory import MemoryEstimate, estimate_memory
from ..estimate.simulate import enable_checkpointing

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
# Steps 0 and 2 of three observe; the optimizer's state is there from the first on.
STEPS, INTERVAL = 3, 2
# What docs/memory.md was measured with, whatever the defaults are.
ROWS = {"selection": "top_r", "side": "output", "state_policy": "carry", "stagger": 1}


@dataclass(frozen=True)
class Case:
    """One LLaMA and how it is trained; with several ranks by "ddp" or "fsdp2", `batch` on each."""

    name: str
    hidden: int = 768
    layers: int = 8
    vocabulary: int = 8000
    batch: int = 2
    sequence: int = 256
    dtype: str = "float32"
    checkpointing: bool = False
    ranks: int = 1
    engine: str = "fsdp2"
    grass: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            vocab_size=self.vocabulary,
            use_cache=False,
        )
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, self.dtype))

    def config(self) -> GrassConfig:
        return GrassConfig(**{"density": 0.25, "update_interval": INTERVAL, **ROWS, **self.grass})

    def small(self) -> Case:
        """The same with little in it, to warm libraries up."""
        return dataclasses.replace(self, hidden=128, layers=1, vocabulary=256)


CASES = (
    Case("rows, float32"),
    Case("columns, float32, more tokens", batch=4, grass={"side": "input"}),
    Case("all matrices, float32", vocabulary=16000, grass={"target_modules": "all-matrices"}),
    Case("bfloat16, float32 slices", hidden=1024, layers=10, dtype="bfloat16"),
    Case(
        "bfloat16, checkpointing",
        hidden=1024,
        layers=10,
        dtype="bfloat16",
        batch=8,
        checkpointing=True,
        grass={"slice_dtype": "bfloat16"},
    ),
    Case("FSDP2 on two ranks, float32", layers=24, vocabulary=4000, batch=1, ranks=2),
)


class PlainCounter(TorchDispatchMode):
    """Live bytes in the plainest way: after every operation, the sizes of all storages that are not gone."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.peak = 0
        for tensor in known:
            self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> None:
        for inner in plain_tensors(tensor):
            if not inner.is_meta and not isinstance(inner, FakeTensor):  # DTensor keeps such, to know shapes by
                self.storages.add(inner.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor: what is done to the tensor in it is seen
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self.peak = max(self.peak, sum({s._cdata: s.nbytes() for s in self.storages}.values()))
        return out


@dataclass(frozen=True)
class Comparison:
    """Bytes of one case by three ways of finding them; `resident` is rank 0's, as the others are."""

    case: Case
    estimate: int
    counted: int
    resident: int

    @property
    def counted_error(self) -> float:
        """How far the estimate is above what was counted, as a share of it."""
        return self.estimate / self.counted - 1

    @property
    def resident_error(self) -> float:
        """How far the estimate is above the growth of resident (or allocated) memory, as a share of it."""
        return self.estimate / self.resident - 1


def compare(case: Case, device: str) -> Comparison:
    """Estimate a case, then really train it, twice."""
    return Comparison(case, estimate(case).peak, launch(case, "counted", "cpu"), launch(case, "resident", device))


def estimate(case: Case) -> MemoryEstimate:
    return estimate_memory(
        case.model,
        case.config(),
        batch=case.batch,
        sequence=case.sequence,
        gradient_checkpointing=case.checkpointing,
        world_size=case.ranks,
        engine=case.engine,
    )


def launch(case: Case, mode: str, device: str) -> int:
    """Train a case in processes of its own; the bytes that the first of them reports."""
    port = str(random.randint(20000, 40000))
    workers = []
    for rank in range(case.ranks):
        env = os.environ | MALLOC | {"RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        if case.ranks > 1:
            env["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", __spec__.name, json.dumps(dataclasses.asdict(case)), mode, device]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
    try:
        said = [worker.communicate(timeout=900) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, said, strict=True):
        if worker.returncode:
            raise RuntimeError(f"the run of case {case.name!r} ({mode}) failed, and said last:\n{errors[-3000:]}")
    return int(said[0][0].split()[-1])


# -- in a worker -------------------------------------------------------------------------------------------------


def work(case: Case, mode: str, device: str) -> int:
    """Train a case in this process; bytes at the peak."""
    if case.ranks > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if mode == "counted":
        return max(train(case, "cpu", counting=True))
    train(case.small(), device)
    growth = Growth(device)
    train(case, device)
    return growth.peak()


def train(case: Case, device: str, counting: bool = False) -> list[int]:
    """Take the steps of a case; the bytes counted at the peak of each, if they are to be counted."""
    torch.manual_seed(0)
    with torch.device(device):
        model = case.model().train()
        tokens = torch.randint(case.vocabulary, (case.batch, case.sequence))
    if case.checkpointing:
        enable_checkpointing(model)
    sharded = case.ranks > 1 and case.engine == "fsdp2"
    convert_to_grass(model, for_shards(case.config(), model, case.ranks) if sharded else case.config())
    called = model
    if sharded:
        shard(model, dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),)))
    elif case.ranks > 1:
        called = nn.parallel.DistributedDataParallel(model)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-4, fused=True)
    counter = PlainCounter(*_known(model, optimizer), tokens) if counting else None
    peaks = []
    with counter or nullcontext():
        for _ in range(STEPS):
            if counter is not None:
                counter.peak = 0
            called(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if counter is not None:
                peaks.append(counter.peak)
    return peaks


def _known(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """What is there before the first step."""
    yield from (*model.parameters(), *model.buffers())
    for slice_ in controller_of(optimizer).slices:
        yield slice_.state.trained
        if slice_.norms is not None:
            yield slice_.norms


class Growth:
    """The most memory that this process takes from now on, beyond what it has."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # see [Note: resident memory]
        self.base = self._status("VmRSS")

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.base
        return self._status("VmHWM") - self.base

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


if __name__ == "__main__":
    print(work(Case(**json.loads(sys.argv[1])), *sys.argv[2:]))
