"""Models, engines and steps for the cases of ZeRO, and what they are compared with."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from helpers import VOCABULARY, tiny_llama
from torch.nn.parallel import DistributedDataParallel

import grass_hf  # noqa: F401  (before DeepSpeed, which it teaches)

import deepspeed  # isort: skip

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations.zero import ZeroController

# DeepSpeed would compile a collective of its own for processes on one machine; gloo will do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SETTINGS = {"density": 0.25, "update_interval": 3, "selection": "top_r", "side": "output", "state_policy": "carry"}
STEPS = 7  # selections after steps 0, 3 and 6


def batch(step: int) -> torch.Tensor:
    """This rank's two sequences of a step."""
    draws = torch.Generator().manual_seed(step * 64 + dist.get_rank())
    return torch.randint(VOCABULARY, (2, 10), generator=draws)


def ds_config(stage: int, accumulate=1, clip=0.0, bfloat16=False, fp16=None, gradients=None, **zero) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        # tiny weights would all stay gathered
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        **({"bf16": {"enabled": True}} if bfloat16 else {}),
        **({"fp16": {"enabled": True, **fp16}} if fp16 else {}),
        "data_types": {"grad_accum_dtype": gradients},
    }


def converted(build=tiny_llama, base=torch.optim.AdamW, arguments=None, **settings):
    model = build()
    convert_to_grass(model, GrassConfig(**{**SETTINGS, **settings}))
    # a large eps, because AdamW with a small one makes 1 of the smallest gradients, and -1 of what other sums round to
    smooth = {"eps": 1e-2} if base is torch.optim.AdamW else {}
    return model, grass_optimizer(model, base, **{"lr": 1.0, "weight_decay": 0.1, **smooth, **(arguments or {})})


def zero(stage: int, options=None, **given):
    """An engine whose optimizer Grass follows; the rest as `converted`."""
    model, optimizer = converted(**given)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage, **(options or {})))
    assert engine.zero_optimization_stage() == stage and isinstance(engine.optimizer.grass, ZeroController)
    partitioned = [hasattr(slice_.weight, "ds_tensor") for slice_ in grass_slices(model)]
    assert all(partitioned) == any(partitioned) == (stage == 3)
    return engine


def schedule(optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 3e-2 * (1 - step / 20)


def train(engine, steps, accumulate: int = 1) -> list[float]:
    """Losses, averaged over the ranks."""
    losses = []
    for step in steps:
        schedule(engine.optimizer, step)
        total = torch.zeros(())
        for micro in range(accumulate):
            tokens = batch(step * accumulate + micro)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulate
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def train_ddp(model, optimizer, steps, accumulate: int = 1, clip: float = 0.0) -> list[float]:
    wrapped, losses = DistributedDataParallel(model), []
    for step in steps:
        schedule(optimizer, step)
        total = torch.zeros(())
        for micro in range(accumulate):
            tokens = batch(step * accumulate + micro)
            with contextlib.nullcontext() if micro == accumulate - 1 else wrapped.no_sync():
                loss = wrapped(input_ids=tokens, labels=tokens).loss / accumulate
                loss.backward()
            total += loss.detach().float()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def indices(model) -> list[torch.Tensor]:
    return [slice_.index.clone() for slice_ in grass_slices(model)]


def weights(model) -> dict[str, torch.Tensor]:
    """All parameters, whole."""
    found = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]) if hasattr(param, "ds_tensor") else contextlib.nullcontext():
            found[name] = param.detach().clone()
    return found


def assert_equals_ddp(accumulate=1, clip=0.0, stages=(1, 2, 3), zero_options=None, **given):
    """The same losses, rows and weights in float32; DeepSpeed takes sums in another order."""
    model, optimizer = converted(**given)
    start = indices(model)
    losses = train_ddp(model, optimizer, range(STEPS), accumulate, clip)
    rows, expected = indices(model), weights(model)
    assert any(not torch.equal(a, b) for a, b in zip(start, rows, strict=True))
    for stage in stages:
        options = {"accumulate": accumulate, "clip": clip, **(zero_options or {})}
        engine = zero(stage, options, **given)
        ours = train(engine, range(STEPS), accumulate)
        worst = max(abs(a - b) for a, b in zip(ours, losses, strict=True))
        assert worst <= 5e-6, (stage, ours, losses)
        for mine, theirs in zip(indices(engine.module), rows, strict=True):
            assert torch.equal(mine, theirs), stage
        found = weights(engine.module)
        gap = max(float((found[name] - value).abs().max()) for name, value in expected.items())
        assert gap <= 5e-6, (stage, gap)
        if dist.get_rank() == 0:
            print(f"# stage {stage}: losses within {worst:.1e}, weights within {gap:.1e}", flush=True)
        for slice_ in grass_slices(engine.module):
            assert_slice_is_in_weight(slice_)


def assert_slice_is_in_weight(slice_):
    tensors = [p for p in (slice_.weight, slice_.active) if hasattr(p, "ds_tensor")]
    with deepspeed.zero.GatheredParameters(tensors) if tensors else contextlib.nullcontext():
        index, write = slice_.index, slice_.write
        if index.dim() == 1:
            rows = slice_.weight.index_select(slice_.dim, index)
            active = slice_.active if write is None else slice_.active * write.unsqueeze(-1 if slice_.dim == -2 else -2)
            keep = torch.ones_like(index, dtype=torch.bool) if write is None else slice_.rho != 0
            rows, active = rows.movedim(slice_.dim, 0)[keep], active.movedim(slice_.dim, 0)[keep]
            torch.testing.assert_close(rows, active, rtol=0, atol=0)
