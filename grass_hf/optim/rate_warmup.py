"""Learning rates of the slices that rise: at the start of training, and again where a reset drops optimizer state.

With ``scale_warmup`` = N the multiplier `scale` rises linearly: scale * min(1, (t + 1) / (N + 1)) in the step after t.
Weight decay per step, rate times decay, is as without it. With ``state_policy="reset_warmup"`` the rate rises over a
share of the interval after every reset.

The rates of the groups, which schedulers and users see, are changed only for the length of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..config.settings import GrassConfig
from ..slices.slice import Slice
from .parameter_groups import VOCABULARY_KEY, distinct

# With state_policy="reset_warmup" the slices' learning rate rises over this share of the interval after a reset.
RESET_SHARE = 0.05


class Factor(NamedTuple):
    """What a group's learning rate and weight decay are multiplied with in one step."""

    group: dict[str, Any]
    rate: float
    decay: float = 1.0


def factors(
    config: GrassConfig, step: int, slices: list[Slice], groups: Callable[[], dict[int, dict[str, Any]]]
) -> list[Factor]:
    """What the coming step's learning rates are multiplied with.

    Args:
        config: of the run.
        step: number of the optimizer step.
        slices: the slices.
        groups: gives the parameter group of each slice, by the id of its parameter.
    """
    found: list[Factor] = []
    if slices and step < config.scale_warmup:
        scaled = [group for group in groups().values() if VOCABULARY_KEY not in group]
        found += after_start(config.scale_warmup, step, scaled)
    if config.state_policy == "reset_warmup":
        found += after_reset(config, step, slices, groups())
    return found


def scale_reached(steps: int, step: int) -> float:
    """The share of `scale` that the step after `step` others has, of a warm-up of so many steps."""
    return min(1.0, (step + 1) / (steps + 1))


def after_start(steps: int, step: int, groups: Iterable[dict[str, Any]]) -> list[Factor]:
    """Factors of a ``scale_warmup`` of so many steps; none once it is over."""
    share = scale_reached(steps, step)
    return [Factor(group, share, 1 / share) for group in distinct(groups)] if share < 1 else []


def after_reset(config: GrassConfig, step: int, slices: list[Slice], groups: dict[int, dict[str, Any]]) -> list[Factor]:
    """Factors of ``state_policy="reset_warmup"``; a group's last reset counts."""
    steps = max(1, round(RESET_SHARE * config.update_interval))
    last: dict[int, tuple[int, dict[str, Any]]] = {}
    for slice_ in slices:
        if slice_.state.reset_step is not None:
            group = groups[id(slice_.active)]
            last[id(group)] = (max(slice_.state.reset_step, last.get(id(group), (0,))[0]), group)
    since = [(step - reset_step, group) for reset_step, group in last.values()]
    return [Factor(group, age / (steps + 1)) for age, group in since if age <= steps]


@contextmanager
def changed(factors: Iterable[Factor]) -> Iterator[None]:
    """Have the groups their changed rates within the block."""
    before = []
    try:
        for group, rate, decay in factors:
            before.append((group, {key: group[key] for key in ("lr", "weight_decay") if key in group}))
            group["lr"] = group["lr"] * rate
            if decay != 1.0 and group.get("weight_decay"):
                group["weight_decay"] = group["weight_decay"] * decay
        yield
    finally:
        for group, full in reversed(before):
            group.update(full)
