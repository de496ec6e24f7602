"""A learning rate of their own for the targets of any method; see [Note: two rates] in `measure.bench.methods`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from ...config.optim_args import config_and_base
from ...config.settings import GrassConfig
from ...optim import rate_warmup
from ...optim.parameter_groups import GROUP_KEY


def grass_config(settings: Mapping[str, Any], multiplier: float, target_warmup: int = 0) -> GrassConfig:
    """The settings of a Grass run; see [Note: two rates]."""
    rates = {"scale": float(multiplier)} | ({"scale_warmup": target_warmup} if target_warmup else {})
    return config_and_base({**settings, **rates})[0]


def two_rates(optimizer: Optimizer, targets: set[int], multiplier: float, target_warmup: int = 0) -> list[int]:
    """Give the parameters of targets a rate of their own; see [Note: two rates]. Slices have theirs already.

    Returns:
        Places of the parameter groups whose rate is to rise in `target_warmup` steps.

    Raises:
        ValueError: the optimizer trains none of them.
    """
    if any(GROUP_KEY in group for group in optimizer.param_groups) or (multiplier == 1.0 and not target_warmup):
        return []
    found = []
    for place, group in enumerate(list(optimizer.param_groups)):
        own = [param for param in group["params"] if id(param) in targets]
        if not own:
            continue
        others = [param for param in group["params"] if id(param) not in targets]
        if others:
            group["params"] = others
            optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": own})
            group = optimizer.param_groups[-1]
        group["lr"] *= multiplier
        if group.get("weight_decay"):
            group["weight_decay"] /= multiplier
        found.append(len(optimizer.param_groups) - 1 if others else place)
    if not found:
        raise ValueError(f"multiplier={multiplier}: the method trains no target matrix, so it has no rate: use 1.")
    return found if target_warmup else []


class _RisingRate(TrainerCallback):
    """Has an optimizer step some of its groups with the rate that slices would have."""

    def __init__(self, optimizer: Optimizer, groups: list[int], steps: int):
        self.optimizer, self.groups, self.steps = optimizer, groups, steps
        self._changed = contextlib.ExitStack()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        own = [self.optimizer.param_groups[place] for place in self.groups]
        self._changed.enter_context(rate_warmup.changed(rate_warmup.after_start(self.steps, state.global_step, own)))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._changed.close()


class TwoRateTrainer(Trainer):
    """The Trainer with a rate for the targets: `targets`, `multiplier` and `target_warmup` as of `two_rates`."""

    def __init__(self, *args: Any, targets: set[int], multiplier: float, target_warmup: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rates = targets, multiplier, target_warmup

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and (rising := two_rates(optimizer, *self.rates)):
            self.add_callback(_RisingRate(optimizer, rising, self.rates[2]))
        return optimizer
