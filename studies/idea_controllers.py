"""Ideas of `studies/ideas.py` that change what happens to a slice: its rate, its state, its base optimizer."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from grass_hf.optim import rate_warmup
from grass_hf.optim.controller import GROUP_KEY, GrassController


class Shaped(GrassController):
    """The slices' rate as a function of the steps since their rows came."""

    def factor(self, age: int, interval: int) -> float:
        raise NotImplementedError

    def around(self, original, *args, **kwargs):
        interval = self.config.update_interval
        factor = 1.0 if self.step <= interval else self.factor((self.step - 1) % interval, interval)
        shaped = [group for group in self.optimizer.param_groups if GROUP_KEY in group]
        with rate_warmup.changed(rate_warmup.Factor(group, factor) for group in shaped):
            return super().around(original, *args, **kwargs)


class Ramp(Shaped):
    """A linear rise over ten steps."""

    def factor(self, age, interval):
        return min(1.0, (age + 1) / 11)


class Anneal(Shaped):
    """A rise over five steps and a linear fall to nearly zero: rows leave without the noise of a high rate."""

    def factor(self, age, interval):
        return min(1.0, (age + 1) / 6) * (interval - age) / (interval + 1)


class Average(GrassController):
    """What leaves is the mean of the last half of the interval instead of the last step's rows."""

    def _after_step(self):
        interval = self.config.update_interval
        age = (self.step - 1) % interval
        if self.step and age >= interval // 2:
            taken = age - interval // 2 + 1
            for part in self.slices:
                if taken == 1:
                    part.__dict__["mean"] = part.active.detach().clone()
                else:
                    part.mean.lerp_(part.active.detach(), 1 / taken)
        super()._after_step()

    def _select(self, due, groups):
        for part in due:
            if "mean" in part.__dict__ and self.step:
                part.active.data.copy_(part.__dict__.pop("mean"))
                part.write_back()
        super()._select(due, groups)


class MeanOnly(GrassController):
    """A fresh row's second moment is the slice's mean, whatever was observed."""

    def _carry_state(self, part, source, group, seed):
        super()._carry_state(part, source, group, dataclasses.replace(seed, ratio=None))


class Leaving(GrassController):
    """Knows the rows that a slice had, as `before`, when its state is carried."""

    def _select(self, due, groups):
        for part in due:
            part.__dict__["before"] = part.index.clone()
        super()._select(due, groups)


class LastKnown(Leaving, MeanOnly):
    """A fresh row's second moment is the slice's mean times the ratio that the row had to it when it last left."""

    def _carry_state(self, part, source, group, seed):
        values = self.optimizer.state.get(part.active, {}).get("exp_avg_sq")
        if values is None:
            return
        other = -1 if part.dim == -2 else -2
        levels = values.mean(other)
        super()._carry_state(part, source, group, seed)
        known = part.__dict__.setdefault("known", torch.full((part.state.size,), math.nan))
        known[part.__dict__.pop("before")] = levels / levels.mean()
        ratio = known[part.index]
        values.mul_(torch.where((source < 0) & ~ratio.isnan(), ratio, 1.0).unsqueeze(other))


class Momentum(Leaving):
    """A row that comes back has the first moment that it left with."""

    kept = ("exp_avg",)

    def _carry_state(self, part, source, group, seed):
        state, before = self.optimizer.state.get(part.active, {}), part.__dict__.pop("before")
        left_with = part.__dict__.setdefault("left_with", {})
        moments = {name: state[name].movedim(part.dim, 0) for name in self.kept if name in state}
        for name, rows in moments.items():
            left_with.setdefault(name, rows.new_full((part.state.size, rows.shape[1]), math.nan))[before] = rows
        super()._carry_state(part, source, group, seed)
        for name, rows in moments.items():
            known = left_with[name][part.index]  # of a row that stays what it has
            rows.copy_(torch.where(known.isnan(), rows, known))


class Parked(Momentum):
    """A row that comes back has both moments that it left with, as if host memory kept the state of all rows."""

    kept = ("exp_avg", "exp_avg_sq")


class Clock(GrassController):
    """A fresh row's first moment is corrected by the row's own age instead of the slice's."""

    beta, lasts = 0.9, 30

    def _carry_state(self, part, source, group, seed):
        super()._carry_state(part, source, group, seed)
        age = part.__dict__.get("age", torch.full_like(source, self.lasts))
        part.__dict__["age"] = torch.where(source < 0, 0, age[source.clamp(min=0)])

    def _before_step(self):
        super()._before_step()
        for part in self.slices:
            if "age" in part.__dict__ and bool((part.age < self.lasts).any()):
                part.__dict__["old"] = part.active.detach().clone()

    def _after_step(self):
        for part in self.slices:
            if "old" in part.__dict__:
                part.age.add_(1)
                factor = torch.where(part.age <= self.lasts, 1 / (1 - self.beta ** part.age.double()), 1.0).float()
                old: Tensor = part.__dict__.pop("old")
                part.active.data.copy_(
                    old + factor.unsqueeze(-1 if part.dim == -2 else -2) * (part.active.detach() - old)
                )
        super()._after_step()


class GrowthLimit(GrassController):
    """The norm of a slice's update is at most 1.01 times that of the step before (Fira, APOLLO)."""

    gamma = 1.01

    def _before_step(self):
        super()._before_step()
        for part in self.slices:
            part.__dict__["old"] = part.active.detach().clone()

    def _after_step(self):
        for part in self.slices:
            old: Tensor = part.__dict__.pop("old")
            change = part.active.detach() - old
            norm, last = change.norm(), part.__dict__.get("last")
            if last is not None and norm > self.gamma * last > 0:
                change *= self.gamma * last / norm
                norm = self.gamma * last
                part.active.data.copy_(old + change)
            part.__dict__["last"] = norm
        super()._after_step()


class PerRow(torch.optim.AdamW):
    """Of slices one second moment per row of the weight, the mean of its elements': half of AdamW's state."""

    needs: ClassVar[dict[str, str]] = {}  # of Grass's settings

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.plain = torch.optim.AdamW([torch.zeros(1)], fused=self.defaults["fused"])

    def shared(self, update: Tensor) -> Tensor:
        return update.square().mean(-1, keepdim=True)

    @torch.no_grad()
    def step(self, closure=None):
        self.plain.state = self.state
        self.plain.param_groups = [group for group in self.param_groups if GROUP_KEY not in group]
        self.plain.step()
        for group in self.param_groups:
            for param in group["params"] if GROUP_KEY in group else ():
                self.update(param, group)

    def update(self, param, group):
        mean, root = self.moments(self.state[param], param.grad, self.shared(param.grad), group["betas"])
        param.sub_(group["lr"] * self.trust(param) * mean / (root + group["eps"]))

    def moments(self, state, values: Tensor, squares: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The corrected means of values, and the roots of those of squares, a step later."""
        if "exp_avg" not in state:
            state |= {"age": 0, "exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(squares)}
        state["age"] += 1
        mean, square = (
            state[name].lerp_(seen, 1 - beta) / (1 - beta ** state["age"])
            for name, seen, beta in zip(("exp_avg", "exp_avg_sq"), (values, squares), betas, strict=True)
        )
        return mean, square.sqrt()

    def trust(self, param: Tensor) -> float:
        return 1.0


class TrustRatio(PerRow):
    """AdamW whose rate for a slice grows with the size of its elements, as LAMB's does."""

    def shared(self, update):
        return update.square()

    def trust(self, param):
        return float(param.square().mean().sqrt()) / 0.02  # which they begin with


class Scaled(PerRow):
    """Of a slice only Adam's moments of its projection to 16 dimensions: they say how far each column moves along its
    gradient, as in APOLLO (arXiv 2412.05270). The state is next to nothing, and dropped at reselection."""

    needs: ClassVar[dict[str, str]] = {"state_policy": "reset"}  # its state has no row per row
    size, growth = 16, 1.01

    def update(self, param, group):
        state, grad, rows = self.state[param], param.grad, len(param)
        if "project" not in state:
            project = torch.randn(self.size, rows, generator=torch.Generator().manual_seed(0)) / math.sqrt(self.size)
            state |= {"project": project, "norm": math.inf}
        seen = state["project"] @ grad
        mean, root = self.moments(state, seen, seen.square(), group["betas"])
        # as long as an update of Adam's, whose elements are of size one
        length = (mean / (root + group["eps"])).norm(dim=0) * math.sqrt(rows / self.size)
        change = grad * (length / (seen.norm(dim=0) + 1e-8))
        norm = float(change.norm())
        change *= min(1.0, self.growth * state["norm"] / max(norm, 1e-30))
        state["norm"] = min(norm, self.growth * state["norm"])
        param.sub_(group["lr"] * change)


BASES = {"per_row": PerRow, "trust_ratio": TrustRatio, "scaled": Scaled}
CONTROLLERS = {
    "none": GrassController,
    "ramp": Ramp,
    "anneal": Anneal,
    "average": Average,
    "mean_only": MeanOnly,
    "last_known": LastKnown,
    "momentum": Momentum,
    "parked": Parked,
    "clock": Clock,
    "growth_limit": GrowthLimit,
}
