"""The stages of a pipeline (`torch.distributed.pipelining`), one per rank, which `forks.ranks` starts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import VOCABULARY, plain_state, tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    SplitPoint,
    pipeline,
)
from torch.distributed.tensor import DTensor

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops.sharding import whole

STAGES, STEPS, MICRO = 2, 8, 2
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Stage(nn.Module):
    """Half of `tiny_llama`: embedding and first layer, or second layer and head."""

    def __init__(self, number: int):
        super().__init__()
        model = tiny_llama()
        self.embedding = model.model.embed_tokens if number == 0 else None
        self.layer, self.rotary = model.model.layers[number], model.model.rotary_emb
        self.head = nn.Sequential(model.model.norm, model.lm_head) if number == 1 else None

    def forward(self, x):
        x = x if self.embedding is None else self.embedding(x)
        x = self.layer(x, position_embeddings=self.rotary(x, torch.arange(x.shape[1])[None]))
        return x if self.head is None else self.head(x)


def batch(step: int) -> torch.Tensor:
    starts = torch.randint(VOCABULARY, (8, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(10)) % VOCABULARY


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def converted(model: nn.Module, **settings) -> nn.Module:
    fixed = {"density": 0.5, "update_interval": 3, "score_by": "sequence", "target_modules": "all-matrices"}
    fixed |= {
        "selection": "top_r",
        "side": "output",
        "stagger": 1,
    }  # a stage's layers have other names, and so other draws
    return convert_to_grass(model, GrassConfig(**{**fixed, **settings}))


def adamw(model: nn.Module, **options) -> torch.optim.Optimizer:
    return grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, **options)


def alone(**settings) -> dict[str, Any]:
    """What both stages as one model come to in one process: losses, and each stage's rows by step and weights."""
    model = converted(nn.Sequential(Stage(0), Stage(1)).double(), **settings)
    optimizer, losses, rows = adamw(model), [], []
    for step in range(STEPS):
        tokens, total = batch(step), 0.0
        for slice_ in tokens.chunk(2 * MICRO):
            loss = loss_of(model(slice_), slice_) / (2 * MICRO)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        rows.append([[slice_.index.clone() for slice_ in grass_slices(stage)] for stage in model])
    return {"losses": losses, "rows": rows, "weights": [plain_state(stage) for stage in model]}


def train(folder: str, ranks: int, schedule: str, engine: str, settings: dict[str, Any]) -> None:
    """Train the stages; the ranks of the first replica write what came of theirs."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == ranks
    mesh = dist.init_device_mesh("cpu", (STAGES, ranks // STAGES), mesh_dim_names=("pp", "dp"))
    number, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    model = converted(Stage(number).double(), **settings)
    if engine == "fsdp":  # DDP's reducer fails over micro-batches in torch 2.13, without Grass too
        fully_shard(model, mesh=mesh["dp"])
        assert all(isinstance(slice_.active, DTensor) for slice_ in grass_slices(model))
    stage = PipelineStage(model, number, STAGES, torch.device("cpu"), group=mesh["pp"].get_group())
    optimizer = adamw(model, replicas=mesh["dp"].get_group())
    micro = 2 * MICRO * STAGES // ranks  # the same two sequences in each, however many replicas there are
    run = SCHEDULES[schedule](stage, micro, loss_fn=loss_of)
    losses, rows = [], []
    for step in range(STEPS):
        own, found = batch(step).chunk(ranks // STAGES)[replica], []
        run.step(*([own] if number == 0 else []), **({"target": own, "losses": found} if number == 1 else {}))
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack(found).mean().detach() if found else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total, group=mesh["dp"].get_group())
        losses.append(total.item() / mesh["dp"].size())
        rows.append([slice_.index.clone() for slice_ in grass_slices(model)])
    weights = {name: whole(value) for name, value in plain_state(model).items()}
    if replica == 0:
        torch.save({"losses": losses, "rows": rows, "weights": weights}, f"{folder}/{number}.pt")


def stop(case: str) -> None:
    """Two stages of equal names and shapes; every rank prints the sentence with which it stops."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == STAGES
    rank, target = dist.get_rank(), torch.zeros(4, 6)
    halves = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(STAGES)))
    if case == "traced":
        halves = convert_to_grass(halves, GrassConfig(density=0.5))
        model, optimizer = halves, grass_optimizer(halves, torch.optim.SGD, lr=1e-2)
    else:
        model = convert_to_grass(halves[rank], GrassConfig(density=0.5))
        single, _ = dist.new_subgroups(group_size=1)
        replicas = {"zero_bubble": single}.get(case)
        optimizer = grass_optimizer(model, torch.optim.SGD, lr=1e-2, replicas=replicas)
    before = plain_state(model)
    with contextlib.ExitStack() as ended:
        ended.callback(lambda: print("same", all(torch.equal(v, before[k]) for k, v in plain_state(model).items())))
        try:
            if case == "traced":
                split = {"1": SplitPoint.BEGINNING}
                stage = pipeline(halves, (torch.zeros(2, 6),), split_spec=split).build_stage(rank, torch.device("cpu"))
            else:
                stage = PipelineStage(model, rank, STAGES, torch.device("cpu"))
            kind = ScheduleInterleavedZeroBubble if case == "zero_bubble" else ScheduleGPipe
            run = kind([stage] if case == "zero_bubble" else stage, 2, loss_fn=nn.MSELoss())
            run.step(*([torch.randn(4, 6)] if rank == 0 else []), **({"target": target} if rank == 1 else {}))
            optimizer.step()
        except (ValueError, RuntimeError) as error:
            print(f"stopped: {error}", flush=True)
