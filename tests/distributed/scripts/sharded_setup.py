"""Models, shards and steps for the cases of FSDP2, and what they are compared with."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import model_matrix
import torch
import torch.distributed as dist
from helpers import VOCABULARY, tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

# so that eight ranks divide the rows of every slice
SETTINGS = {"density": 0.5, "update_interval": 3, "selection": "top_r", "side": "output", "state_policy": "carry"}


def batch(step: int, ranks: int | None = None) -> torch.Tensor:
    """This rank's two sequences of a step."""
    number = dist.get_rank() if ranks is None else ranks
    draws = torch.Generator().manual_seed(step * 64 + number)
    return torch.randint(VOCABULARY, (2, 10), generator=draws)


def shard(model: nn.Module, layers=(), **options) -> nn.Module:
    """fully_shard as people do it: every layer, then the rest."""
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def llama(dtype=torch.float32, **options) -> nn.Module:
    return tiny_llama(**options).to(dtype)


def train(model, optimizer, steps, accumulate=1, wrapped=None) -> list[float]:
    """Losses, averaged over the ranks."""
    losses = []
    for step in steps:
        total = torch.zeros(())
        for micro in range(accumulate):
            tokens = batch(step * accumulate + micro)
            last = micro == accumulate - 1
            if wrapped is not None:
                wait = contextlib.nullcontext() if last else wrapped.no_sync()
            else:
                model.set_requires_gradient_sync(last)
                wait = contextlib.nullcontext()
            with wait:
                loss = (wrapped or model)(input_ids=tokens, labels=tokens).loss / accumulate
                loss.backward()
            total += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def mixtral(dtype=torch.float32, tie_word_embeddings=False) -> nn.Module:
    assert not tie_word_embeddings
    return model_matrix.build("mixtral").to(dtype)


def prepare(sharded: bool, dtype=torch.float32, tied=False, options=None, muon=None, build=llama, **settings):
    model = build(dtype, tie_word_embeddings=tied)
    convert_to_grass(model, GrassConfig(**{**SETTINGS, **settings}))
    wrapped = None
    if sharded:
        shard(model, model.model.layers, **(options or {}))
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW if muon is None else MuonAdamW
    return model, grass_optimizer(model, optimizer, lr=1e-2, weight_decay=0.1, **(muon or {})), wrapped


def full_state(model) -> dict[str, torch.Tensor]:
    full = {}
    for name, value in model.state_dict().items():
        full[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return full


def assert_equals_ddp(accumulate=1, tied=False, atol=1e-6, steps=8, options=None, **settings):
    results = []
    for sharded in (True, False):
        # float64, because engines add gradients up in other orders and AdamW's first steps are little but their signs
        model, optimizer, wrapped = prepare(
            sharded, torch.float64, tied=tied, options=options if sharded else None, **settings
        )
        losses = train(model, optimizer, range(steps), accumulate, wrapped)
        results.append((losses, [slice_.index.clone() for slice_ in grass_slices(model)], full_state(model)))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert abs(ours - theirs) <= atol, f"losses {results[0][0]} sharded, {results[1][0]} under DDP"
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(ours, theirs)
    for name, value in results[1][2].items():
        torch.testing.assert_close(results[0][2][name], value, rtol=0, atol=max(atol, 2e-5), msg=name)
    assert results[0][0][-1] < results[0][0][0] + 0.1
