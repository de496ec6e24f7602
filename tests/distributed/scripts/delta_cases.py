"""What `WeightDelta` must do with several ranks, case by case; tests/test_delta_ranks.py runs it and reads "ok CASE".

delta_cases.py CASE...       ddp, fsdp2, fsdp2_rows, zero1, zero3
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from helpers import VOCABULARY, leave, tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from grass_hf import GrassConfig, WeightDelta, convert_to_grass, grass_optimizer
from grass_hf.integrations.rollouts.files import SyncWriter
from grass_hf.integrations.rollouts.replica import Replica
from grass_hf.optim.delta_apply import apply_patches
from grass_hf.slices.ops.bits import as_bits


class Gathers(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def batch(step: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(step * 64 + dist.get_rank())
    return torch.randint(VOCABULARY, (2, 10), generator=draws)


def made(**settings):
    model = tiny_llama().to(torch.bfloat16)
    convert_to_grass(model, GrassConfig(**{"update_interval": 3, "stagger": 2, "density": 0.25, **settings}))
    return model


def follow(delta, step, whole, folder) -> None:
    """Train, synchronise, and compare rank 0's replicas with the whole state dict."""
    state = {name: tensor.clone() for name, tensor in whole().items()}
    with tempfile.TemporaryDirectory() as own:
        place = [own]
        dist.broadcast_object_list(place)
        writer, reader = SyncWriter(delta, place[0]), Replica(place[0])
        read = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for number in range(8):
            step(number)
            with_files = number % 2 == 0
            if with_files:
                writer.write()
            else:
                with Gathers() as traffic:
                    patches = list(delta.patches())
                assert not traffic.seen, traffic.seen
            if not with_files:
                everyone = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, patches)
                for given in everyone:
                    apply_patches(state, given, delta.aliases)
                check(state, whole())
                delta.all_changed("the files did not have it")
                writer.write(full=True)
            dist.barrier()
            reader.catch_up(read)
            check(read, whole())
            apply_patches(state, [(name, None, tensor) for name, tensor in read.items()])
            dist.barrier()


def check(state, now) -> None:
    assert state.keys() == now.keys(), state.keys() ^ now.keys()
    for name, tensor in now.items():
        assert torch.equal(as_bits(tensor.contiguous()), as_bits(state[name])), name


def ddp() -> None:
    model = made()
    wrapped = DistributedDataParallel(model)
    optimizer = grass_optimizer(model, lr=1e-3, weight_decay=0.1)
    delta = WeightDelta(wrapped, optimizer)
    assert delta.speaks == (dist.get_rank() == 0)
    follow(delta, stepper(wrapped, optimizer), model.state_dict, None)


def stepper(model, optimizer):
    def step(number: int) -> None:
        ids = batch(number)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2(**settings) -> None:
    model = made(slice_dtype="bfloat16", **settings)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = grass_optimizer(model, lr=1e-3, weight_decay=0.1)
    delta = WeightDelta(model, optimizer)
    assert delta.speaks

    def whole():
        return {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in model.state_dict().items()}

    follow(delta, stepper(model, optimizer), whole, None)


def fsdp2_rows() -> None:
    fsdp2(side="output")


def zero(stage: int) -> None:
    import grass_hf  # noqa: F401
    import deepspeed  # isort: skip

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = made(decay="active")
    optimizer = grass_optimizer(model, lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
    }
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    delta = WeightDelta(model, optimizer)

    def step(number: int) -> None:
        ids = batch(number)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    def whole():
        if stage < 3:
            return model.state_dict()
        from grass_hf.optim.delta_tensors import plain_tensors

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: tensor.detach().clone() for name, tensor in plain_tensors(model)[0].items()}

    follow(delta, step, whole, None)


def zero1() -> None:
    zero(1)


def zero3() -> None:
    zero(3)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        globals()[case]()
        if dist.get_rank() == 0:
            print("ok", case, flush=True)
    leave()
