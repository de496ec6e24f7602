"""`estimate_memory`: the peak of live tensor bytes of a training step, simulated without allocating anything.

The real model class, the real conversion and the real optimizer run under torch's `FakeTensorMode`, in which tensors
have shapes and no memory, while `LiveBytes` counts what would live. After an optimizer step that makes the state,
two steps are counted: an ordinary one, and for Grass one that observes and selects rows. The larger peak is the peak.

Counted are tensors. What comes on top of them on a device: the allocator's rounding and fragmentation, what kernels
allocate inside themselves, and the driver's context.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)

from ...config.settings import GrassConfig
from ...integrations.simulation import as_in_training
from .fake_ranks import Engine, check_engine
from .live_bytes import LiveBytes
from .methods import COMPUTED, check_method, default_optimizer_args
from .simulate import Breakdown, Loss, Simulation, cast_parameters, causal_loss, vocabulary_of
from .zero_sizes import on_one_rank

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate_memory` found, in bytes.

    Attributes:
        method: grass, adamw, frozen, lora, adamw8bit, galore or apollo.
        step: at the peak of an ordinary step.
        observing: at the peak of a step that observes gradient norms and selects rows; None for other methods, for
            selection rules that never observe, and under ZeRO, whose one step has the larger parts of both.
        computed: whether what the optimizer holds is given by a formula instead of running it: galore, apollo, ZeRO.
    """

    method: str
    step: Breakdown
    observing: Breakdown | None
    computed: bool

    @property
    def at_peak(self) -> Breakdown:
        """The step with the larger peak."""
        return max((s for s in (self.step, self.observing) if s is not None), key=lambda s: s.total)

    @property
    def peak(self) -> int:
        """Bytes at the larger peak."""
        return self.at_peak.total


def estimate_memory(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    config: GrassConfig | None = None,
    *,
    method: str = "grass",
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    optimizer_args: Mapping[str, Any] | None = None,
    batch: int = 1,
    sequence: int = 256,
    dtype: str | None = None,
    gradient_checkpointing: bool | int = False,
    loss: Loss | None = None,
    world_size: int = 1,
    engine: str = "ddp",
) -> MemoryEstimate:
    """Simulate training steps and count the bytes of live tensors at the peak; nothing is allocated.

    Args:
        model_or_factory: a model, which is left as it is, or a function that makes one: called with fake tensors
            as the default, so import what it needs before.
        config: settings of Grass; its targets and its rank serve the other methods too. None takes the defaults.
        method: "grass", "adamw", "frozen" (targets frozen), "lora" (same rank and targets), "adamw8bit", "galore"
            or "apollo" (optimizer state computed, see `grass_hf.measure.estimate.methods`).
        optimizer: class of grass, frozen and lora.
        optimizer_args: of that class; None means fused AdamW, or the learning rate alone for another class.
        batch: sequences per step.
        sequence: tokens per sequence, none of them padding.
        dtype: of the parameters, "bfloat16" say; None keeps the model's.
        gradient_checkpointing: recompute layers in backward, without reentry: True for all, n for every n-th one.
        loss: the scalar loss of a model; None means a causal language model of transformers on random tokens.
        world_size: processes that train together; the estimate is one rank's, and `batch` is too.
        engine: how they do, if there are several: "ddp", "fsdp2" (both simulated), "zero1", "zero2" or "zero3".

    Returns:
        A `MemoryEstimate`, in bytes.

    Raises:
        ValueError: a setting is out of range or does not fit the model, or what it does depends on values of
            tensors (experts that tokens choose), which fake tensors do not have.
    """
    config = config or GrassConfig()
    check_method(method)
    check_engine(engine, world_size, method)
    every = gradient_checkpointing or 1
    for name, value in (("batch", batch), ("sequence", sequence), ("gradient_checkpointing", every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive whole number: give 1 or more.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(_DTYPES)}.")
    if optimizer_args is None:
        optimizer_args = default_optimizer_args(optimizer)
    mode, model = FakeTensorMode(allow_non_fake_inputs=True), None
    try:
        with Engine(engine, world_size).rank() as one, mode:
            model = _fake_model(model_or_factory, mode, dtype)
            with as_in_training(), LiveBytes(vocabulary_of(model)) as live:
                loss = loss or causal_loss(model, batch, sequence)
                simulated = Simulation(live, model, loss, gradient_checkpointing, one)
                step, observing = simulated.run(method, config, optimizer, optimizer_args)
                if one.zero_stage:
                    step = on_one_rank(one.zero_stage, world_size, step, simulated.transient, simulated.model)
                    observing = None
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = "the model" if model is None else type(model).__name__
        raise ValueError(
            f"{what} decides by the values of tensors ({error.func}), which a simulation does not have: its memory "
            "cannot be estimated; measure a real step instead (torch.cuda.max_memory_allocated)."
        ) from error
    computed = method in COMPUTED or bool(one.zero_stage)
    return MemoryEstimate(method, step, observing, computed)


def _fake_model(
    model_or_factory: nn.Module | Callable[[], nn.Module], mode: FakeTensorMode, dtype: str | None
) -> nn.Module:
    if isinstance(model_or_factory, nn.Module):
        with FakeCopyMode(mode):
            model = copy.deepcopy(model_or_factory)
    else:
        model = model_or_factory()
    return model if dtype is None else cast_parameters(model, getattr(torch, dtype))


def largest_rank(peak_of: Callable[[int], int], budget: int, highest: int) -> tuple[int, int] | None:
    """The largest rank whose peak is within a budget.

    Bisection, with the cut where a straight line through the ends puts the budget: peaks are nearly linear in the
    rank. What is returned was measured, and so was the next rank, unless `highest` fits.

    Args:
        peak_of: peak in bytes of a rank, growing with it.
        budget: bytes.
        highest: the largest rank to try.

    Returns:
        The rank and its peak; None if not even rank 1 fits.
    """
    low, low_peak = 1, peak_of(1)
    if low_peak > budget:
        return None
    high, high_peak = highest, peak_of(highest)
    if high_peak <= budget:
        return high, high_peak
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (budget - low_peak) / max(high_peak - low_peak, 1)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        peak, width = peak_of(middle), high - low
        if peak <= budget:
            low, low_peak = middle, peak
        else:
            high, high_peak = middle, peak
        halve = high - low > width // 2  # the line cut off too little
    return low, low_peak
