"""What `WeightDelta` must do with several ranks, case by case; tests/distributed/test_delta_ranks.py reads "ok CASE".

delta_cases.py RANKS CASE...
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from cases import Traffic, run_cases
from helpers import VOCABULARY, tiny_llama
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grass_hf import GrassConfig, WeightDelta, convert_to_grass, grass_optimizer
from grass_hf.convert.record import grass_slices
from grass_hf.integrations.rollouts.files import SyncWriter, read_manifest
from grass_hf.integrations.rollouts.replica import Replica
from grass_hf.integrations.rollouts.trl import PatchStream
from grass_hf.optim.delta_apply import apply_patches
from grass_hf.optim.delta_tensors import plain_tensors
from grass_hf.slices.ops.bits import as_bits
from grass_hf.slices.ops.sharding import is_partitioned

State = dict[str, torch.Tensor]


class Trainer:
    """A model, what steps it, and its whole plain state dict, for which all ranks are asked."""

    def __init__(self, model, optimizer, step: Callable[[torch.Tensor], None], whole: Callable[[], State]):
        self.model, self.optimizer, self._step, self.whole = model, optimizer, step, whole

    def step(self, number: int) -> None:
        draws = torch.Generator().manual_seed(number * 64 + dist.get_rank())
        self._step(torch.randint(VOCABULARY, (2, 10), generator=draws))


def made(**settings):
    model = tiny_llama().to(torch.bfloat16)
    convert_to_grass(model, GrassConfig(**{"update_interval": 3, "stagger": 2, "density": 0.25, **settings}))
    return model


def plain_step(model, optimizer) -> Callable[[torch.Tensor], None]:
    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2_trainer(**settings) -> Trainer:
    model = made(slice_dtype="bfloat16", **settings)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = grass_optimizer(model, lr=1e-3, weight_decay=0.1)
    assert all(isinstance(param, DTensor) for param in model.parameters())

    def whole() -> State:
        return {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in model.state_dict().items()}

    return Trainer(model, optimizer, plain_step(model, optimizer), whole)


def zero_trainer(stage: int) -> Trainer:
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
    assert all(is_partitioned(slice_.weight) == (stage == 3) for slice_ in grass_slices(model))

    def step(ids: torch.Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    def whole() -> State:
        if stage < 3:
            return model.state_dict()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: tensor.detach().clone() for name, tensor in plain_tensors(model)[0].items()}

    trainer = Trainer(model, optimizer, step, whole)
    trainer.engine = engine
    return trainer


def shared_folder() -> str:
    """One that all ranks see; rank 0 made it."""
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place)
    return place[0]


def follow(trainer: Trainer, delta: WeightDelta) -> None:
    """Train, synchronise, and compare replicas with the whole state dict; no patch may want a collective."""
    state = {name: tensor.clone() for name, tensor in trainer.whole().items()}
    folder = shared_folder()
    writer, reader = SyncWriter(delta, folder), Replica(folder)
    read = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for number in range(8):
        trainer.step(number)
        if number % 2 == 0:
            path = writer.write()
            assert path is None or read_manifest(path).is_anchor == (number == 0)
        else:
            with Traffic() as traffic:
                patches = list(delta.patches())
            assert not traffic.seen, traffic.seen
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, patches)
            for given in everyone:
                apply_patches(state, given, delta.aliases)
            check(state, trainer.whole())
            delta.all_changed("the files did not have it")
            writer.write(full=True)
        dist.barrier()
        reader.catch_up(read)
        check(read, trainer.whole())
        apply_patches(state, [(name, None, tensor) for name, tensor in read.items()])
        dist.barrier()


def resume(make: Callable[[], Trainer], save_and_load: Callable[[Trainer, Callable], Trainer]) -> None:
    """A run that ends after a step it has not sent goes on with the same synchronisations, and sends that step too."""
    trainer, folder = make(), shared_folder()
    delta = WeightDelta(trainer.model, trainer.optimizer)
    writer, reader = SyncWriter(delta, folder), Replica(folder)
    state = {name: torch.zeros_like(tensor) for name, tensor in trainer.whole().items()}
    for number in range(4):
        trainer.step(number)
        if number in (1, 2):
            writer.write()
    dist.barrier()
    reader.catch_up(state)
    again = save_and_load(trainer, make)
    delta = WeightDelta(again.model, again.optimizer)
    assert (delta.key, delta.number) == (writer.delta.key, 2)
    writer = SyncWriter(delta, folder)
    for number in range(4, 7):
        again.step(number)
        path = writer.write()
        assert path is None or not read_manifest(path).is_anchor
        assert not delta.last.is_full, delta.last.whole
        dist.barrier()
        assert reader.catch_up(state) == 1
        check(state, again.whole())
        dist.barrier()


def check(state: State, now: State) -> None:
    assert state.keys() == now.keys(), state.keys() ^ now.keys()
    for name, tensor in now.items():
        assert torch.equal(as_bits(tensor.contiguous()), as_bits(state[name])), name


# -- cases -----------------------------------------------------------------------------------------------------------


def ddp() -> None:
    model = made()
    wrapped = DistributedDataParallel(model)
    optimizer = grass_optimizer(model, lr=1e-3, weight_decay=0.1)
    delta = WeightDelta(wrapped, optimizer)
    assert delta.speaks == (dist.get_rank() == 0)
    follow(Trainer(wrapped, optimizer, plain_step(wrapped, optimizer), model.state_dict), delta)


def fsdp2(**settings) -> None:
    trainer = fsdp2_trainer(**settings)
    delta = WeightDelta(trainer.model, trainer.optimizer)
    assert delta.speaks
    follow(trainer, delta)


def fsdp2_rows() -> None:
    fsdp2(side="output")


def zero1() -> None:
    trainer = zero_trainer(1)
    follow(trainer, WeightDelta(trainer.model, trainer.optimizer))


def zero3() -> None:
    trainer = zero_trainer(3)
    follow(trainer, WeightDelta(trainer.model, trainer.optimizer))


def fsdp2_resumes() -> None:
    def save_and_load(trainer: Trainer, make: Callable[[], Trainer]) -> Trainer:
        weights, moments = copy.deepcopy(get_state_dict(trainer.model, trainer.optimizer))
        again = make()
        set_state_dict(again.model, again.optimizer, model_state_dict=weights, optim_state_dict=moments)
        return again

    for settings in ({}, {"side": "output"}):
        resume(lambda settings=settings: fsdp2_trainer(**settings), save_and_load)


def zero_resumes() -> None:
    def save_and_load(trainer: Trainer, make: Callable[[], Trainer]) -> Trainer:
        folder = shared_folder()
        trainer.engine.save_checkpoint(folder)
        again = make()
        again.engine.load_checkpoint(folder)
        return again

    for stage in (1, 3):
        resume(lambda stage=stage: zero_trainer(stage), save_and_load)


def one_rank_sends_for_all() -> None:
    """To vLLM: the first rank has the patches of all shards, each name once."""
    sys.modules["vllm.distributed.weight_transfer.sparse_nccl_engine"] = vllm_stand_in = type(sys)("sparse")
    vllm_stand_in.SparseWeightPatch = lambda **fields: fields
    trainer = fsdp2_trainer()
    delta = WeightDelta(trainer.model, trainer.optimizer)
    state = {name: torch.zeros_like(tensor) for name, tensor in trainer.whole().items()}
    for number in range(4):
        patches = list(PatchStream(delta, torch.device("cpu"), is_known=number > 0))
        assert bool(patches) == (dist.get_rank() == 0)
        assert len({patch["name"] for patch in patches}) == len(patches)
        for patch in patches:
            assert patch["full_shape"] == tuple(state[patch["name"]].shape)
            state[patch["name"]].view(-1)[patch["indices"].long()] = patch["values"]
        now = trainer.whole()
        if dist.get_rank() == 0:
            check(state, now)
        trainer.step(number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(globals())
