"""What ranks are made to do by `forks.ranks`; every job asserts its world size."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from helpers import Sequences, arguments, plain_state, tiny_llama, trainer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, last_complete_checkpoint
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops.sharding import shards, whole

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# environment of a rank, by engine
ENGINES = {
    "ddp": {},
    "full": {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "sharded": {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}


# two replicas of two shards each; not one of ENGINES, because it takes four ranks
HYBRID = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


class DieInStep(TrainerCallback):
    """Kills a rank at the beginning of a step."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


class Record(TrainerCallback):
    """Keeps the rows that were trained in every step."""

    def __init__(self):
        self.rows: dict[int, list[torch.Tensor]] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.rows[state.global_step] = [slice_.index.clone() for slice_ in grass_slices(model)]


class DieInSave(TrainerCallback):
    """Kills a rank while it writes a file after a step."""

    def __init__(self, rank: int, step: int, file: str):
        self.rank, self.step, self.file = rank, step, file

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            die_while_writing(self.file)


def die_while_writing(name: str) -> None:
    """Let this process be killed in the middle of the file of that name."""
    save = torch.save

    def half(value, path, *arguments, **options):
        save(value, path, *arguments, **options)
        if Path(path).name == name:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def train(
    file: str,
    folder: str,
    ranks: int,
    resume: str | bool | None = None,
    options: dict | None = None,
    config: dict | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
):
    """Train eight steps of eight sequences, on whatever engine the environment says; rank 0 writes the outcome.

    Args:
        file: of the outcome: losses, rows by step, weights.
        folder: output of the Trainer, which saves after four steps.
        ranks: that there must be.
        resume: as the Trainer's; "last" for the last complete checkpoint, if there is one.
        options: of the TrainingArguments.
        config: of the model.
        callbacks: more of them.
    """
    if resume == "last":
        resume = last_complete_checkpoint(folder)
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:  # accelerate shards nothing without a GPU; see scripts/cpu_fsdp.py
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    defaults = {
        "use_cpu": not sharded,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "per_device_train_batch_size": 8 // ranks,
        "optim_args": "density=0.5,update_interval=3,base=adamw_torch,score_by=sequence",
    }
    if not sharded and ranks > 1:
        defaults["ddp_backend"] = "gloo"
    settings = {**defaults, **(options or {})}
    double = settings.pop("double", True)
    count = settings.pop("sequences", 64)
    record = Record()
    model = tiny_llama(**(config or {}))
    job = Trainer(
        model=model.double() if double else model,
        args=arguments(folder, **settings),
        train_dataset=Sequences(count),
        callbacks=[record, *callbacks],
    )
    job.train(resume_from_checkpoint=resume)
    assert job.args.world_size == ranks == (dist.get_world_size() if ranks > 1 else 1)
    if sharded:
        assert all(isinstance(slice_.active, DTensor) for slice_ in grass_slices(job.model))
        replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))
        assert all(shards(slice_.weight) == ranks // replicas for slice_ in grass_slices(job.model))
    weights = {name: whole(value) for name, value in plain_state(job.model).items()}
    if job.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in job.state.log_history if "loss" in entry}
        outcome = {"losses": losses, "rows": record.rows, "weights": weights, "from": min(record.rows)}
        torch.save(outcome, Path(file).with_suffix(".part"))
        os.replace(Path(file).with_suffix(".part"), file)
    print(json.dumps({"rank": job.args.process_index, "from": min(record.rows)}), flush=True)


def nothing() -> None:
    """Only starts."""


def refusals(folder: str) -> None:
    """Prints the sentences with which models that are sharded already are refused."""
    from transformers.distributed import DistributedConfig  # of transformers 5

    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    mesh = dist.init_device_mesh("cpu", (2,))
    model = tiny_llama()
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, {"up_proj": ColwiseParallel()})
    _print_refusal("torch_tp", lambda: convert_to_grass(model, GrassConfig(density=0.25)))
    saved = Path(folder) / "saved"
    if dist.get_rank() == 0:
        tiny_llama(num_key_value_heads=4).save_pretrained(saved)
    dist.barrier()
    for name in ("tp", "fsdp", "pp"):
        loaded = LlamaForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(**{f"{name}_size": 2}))
        _print_refusal(f"hf_{name}", lambda loaded=loaded: convert_to_grass(loaded, GrassConfig(density=0.25)))
    _print_refusal("trainer", lambda: trainer(folder, loaded))


def _print_refusal(name: str, call) -> None:
    try:
        call()
    except ValueError as error:
        print(f"refused {name}: {error}", flush=True)


def int8_under_ddp(settings: dict) -> None:
    """Five steps of `test_int8.train`, half of the batch on each rank."""
    from test_int8 import TOKENS

    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    model = convert_to_grass(tiny_llama(), GrassConfig(**settings, score_by="sequence"))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    own, losses = TOKENS.chunk(2)[dist.get_rank()], []
    for _ in range(5):
        loss = wrapped(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    print(json.dumps({"losses": losses, "rows": [slice_.index.tolist() for slice_ in grass_slices(model)]}))


def int8_that_stops(settings: dict) -> None:
    """What is said of weights that differ from rank to rank, and of weights that are sharded."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    said = []
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.0 + dist.get_rank())
    convert_to_grass(model, GrassConfig(**settings))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    try:
        tokens = torch.arange(8)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    except RuntimeError as error:
        said.append(str(error).replace("\n", " "))
    model = convert_to_grass(tiny_llama(), GrassConfig(**settings))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    assert all(isinstance(slice_.active, DTensor) for slice_ in grass_slices(model))
    try:
        grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    except ValueError as error:
        said.append(str(error))
    print("\n".join(said))
