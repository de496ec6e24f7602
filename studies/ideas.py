"""Ideas that are not in the package: controllers, base optimizers, sides and densities, measured as methods are.

    python studies/ideas.py                         # runs/ideas.jsonl: a row per idea that has none yet
    python studies/ideas.py --only anneal,clock     # some of them
    python studies/ideas.py --only none,adamw,lora --training per_device_train_batch_size=16,max_steps=300
    python studies/ideas.py --settings selection=multinomial_norm_nr,update_interval=200 --multiplier 0.1
    python studies/ideas.py --study studies/defaults.yaml --learning_rate 0.03 --multiplier 0.3

The model, text, schedule and evaluation are those of a study, studies/peers.yaml if no other is named. `none` is the
package itself, with the same settings. What came of them stands in docs/benchmarks.md. They take all layers to select
at once (stagger=1).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
import yaml
from torch import Tensor

from grass_hf import GrassConfig, MuonAdamW, optim, reselect, targets, warmup
from grass_hf.bench import quality, record
from grass_hf.bench.quality_methods import resolve
from grass_hf.bench.quality_rows import read_rows
from grass_hf.bench.quality_run import run_row
from grass_hf.controller import GROUP_KEY, GrassController
from grass_hf.integrations import base
from grass_hf.optim_args import parse_optim_args

STUDY = Path(__file__).parent / "peers.yaml"


class Shaped(GrassController):
    """The slices' rate as a function of the steps since their rows came."""

    def factor(self, age: int, interval: int) -> float:
        raise NotImplementedError

    def _rate_factors(self, layers):
        interval, found = self.config.update_interval, super()._rate_factors(layers)
        if self.step <= interval:
            return found
        factor = self.factor((self.step - 1) % interval, interval)
        return found + [warmup.Factor(group, factor) for group in self.optimizer.param_groups if GROUP_KEY in group]


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

    def _carry_state(self, part, source, group, seed):
        values = self.optimizer.state.get(part.active, {}).get("exp_avg")
        if values is None:
            return
        rows = values.movedim(part.dim, 0)
        known = part.__dict__.setdefault("left_with", rows.new_zeros(part.state.size, rows.shape[1]))
        known[part.__dict__.pop("before")] = rows
        super()._carry_state(part, source, group, seed)
        rows.copy_(known[part.index])  # of a row that stays what it has, of one that never left zero


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
        state, grad, (beta1, beta2) = self.state[param], param.grad, group["betas"]
        square = self.shared(grad)
        if "exp_avg" not in state:
            state |= {"age": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(square)}
        state["age"] += 1
        mean = state["exp_avg"].lerp_(grad, 1 - beta1) / (1 - beta1 ** state["age"])
        root = (state["exp_avg_sq"].lerp_(square, 1 - beta2) / (1 - beta2 ** state["age"])).sqrt()
        param.sub_(group["lr"] * self.trust(param) * mean / (root + group["eps"]))

    def trust(self, param: Tensor) -> float:
        return 1.0


class TrustRatio(PerRow):
    """AdamW whose rate for a slice grows with the size of its elements, as LAMB's does."""

    def shared(self, update):
        return update.square()

    def trust(self, param):
        return float(param.square().mean().sqrt()) / 0.02  # which they begin with


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# Other sides, or other densities at the same budget, for some kinds of layers.
ROWS_OF = {
    "rows_qkv": ATTENTION[:3],
    "rows_o": ATTENTION[3:],
    "rows_gate_up": MLP[:2],
    "rows_down": MLP[2:],
    "rows_qkv_gate_up": ATTENTION[:3] + MLP[:2],
}
DENSITIES = {
    "more_attention": dict.fromkeys(ATTENTION, 0.5) | dict.fromkeys(MLP, 0.125),
    "more_mlp": dict.fromkeys(ATTENTION, 0.125) | dict.fromkeys(MLP, 0.3125),
    "less_qkv": dict.fromkeys(ATTENTION[:3], 0.1) | dict.fromkeys(MLP, 0.325),
}


class WaterFilling:
    """The budget goes to the columns with most observed gradient energy per element, of whichever layer: more of them
    in some layers, fewer in others, and at least a sixteenth. Takes a run before, which observes."""

    def __init__(self) -> None:
        # of every group of layers that choose together: its columns' energy, and the elements of a column
        self.energy: dict[str, tuple[Tensor, int]] = {}
        self.ranks: dict[str, int] = {}

    @staticmethod
    def group(name: str) -> str:
        layer, _, kind = name.rpartition(".")
        return f"{layer}.{next((g for g in ('qkv', 'gate_up') if kind.split('_')[0] in g), kind)}"

    def observe(self, part, name, scores, config, step):
        group = self.group(name)
        members = {"qkv": 3, "gate_up": 2}.get(group.rpartition(".")[2], 1)
        before = self.energy.get(group, (torch.zeros(()), 0))[0]
        self.energy[group] = before + scores, members * part.active.shape[-2]
        return _rows(part, name, scores, config, step)

    def fill(self, density: float) -> None:
        columns = [(float(e) / cost, cost, group) for group, (es, cost) in self.energy.items() for e in es]
        budget = density * sum(cost for _, cost, _ in columns)
        self.ranks = {group: energy.numel() // 16 for group, (energy, _) in self.energy.items()}
        budget -= sum(rank * self.energy[group][1] for group, rank in self.ranks.items())
        seen = dict.fromkeys(self.ranks, 0)
        for _, cost, group in sorted(columns, reverse=True):
            seen[group] += 1
            if seen[group] > self.ranks[group] and cost <= budget:
                self.ranks[group], budget = seen[group], budget - cost
        self.energy = {}


WATER = WaterFilling()
BASES = {"per_row": PerRow, "trust_ratio": TrustRatio}
_side, _rank_for, _rows = targets._side, GrassConfig.rank_for, reselect._rows


def arrange(name: str) -> None:
    """Have the package follow an idea; `none` takes all back."""
    layer = [""]

    def kind():
        return layer[0].rpartition(".")[2]

    def side(sharing, *others):
        layer[0] = sharing[0].name
        return "output" if kind() in ROWS_OF.get(name, ()) else _side(sharing, *others)

    def rank_for(config, size):
        if name == "water_filling":
            return WATER.ranks[WATER.group(layer[0])]
        return max(1, round(DENSITIES[name].get(kind(), config.density) * size))

    targets._side = side
    GrassConfig.rank_for = rank_for if name in (*DENSITIES, "water_filling") else _rank_for
    reselect._rows = WATER.observe if name == "observe" else _rows
    optim.GrassController = CONTROLLERS.get(name, GrassController)
    base.MuonAdamW = BASES.get(name, MuonAdamW)  # under the name "muon", see `main`


CONTROLLERS = {
    "none": GrassController,
    "ramp": Ramp,
    "anneal": Anneal,
    "average": Average,
    "mean_only": MeanOnly,
    "last_known": LastKnown,
    "momentum": Momentum,
    "clock": Clock,
    "growth_limit": GrowthLimit,
}
IDEAS = (*CONTROLLERS, *BASES, *ROWS_OF, *DENSITIES, "water_filling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(IDEAS), help="names, with commas; peers (lora, say) too")
    parser.add_argument(
        "--settings",
        default="density=0.25,update_interval=100,selection=multinomial_norm_nr,side=input,state_policy=carry_seeded,"
        "stagger=1",
        help="of Grass, as in optim_args",
    )
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--multiplier", type=float, default=0.15)
    parser.add_argument("--training", default="", help="other TrainingArguments than the study's: adam_beta2=0.95,...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/ideas.jsonl"))
    parser.add_argument("--study", type=Path, default=STUDY)
    args = parser.parse_args()
    study = quality.load_study(args.study)
    pairs = (pair.split("=") for pair in filter(None, args.training.split(",")))
    changed = {name: yaml.safe_load(value) for name, value in pairs}
    document = {**study.document, "training": {**study.document["training"], **changed}}
    study = dataclasses.replace(study, document=document)
    settings = parse_optim_args(args.settings).config.to_dict()
    del settings["scale"]
    settings = resolve("grass", settings, study.rank, study.target_modules)
    for name in args.only.split(","):
        kind = "grass" if name in IDEAS else name
        own = settings | ({"base": "muon"} if name in BASES else {})
        if kind != "grass":
            own = resolve(kind, {}, study.rank, study.target_modules)
        rates = (args.learning_rate,), (args.multiplier,)
        run = quality.Run(study, quality.Method(name, kind, own, *rates), *(r[0] for r in rates), args.seed)
        row = next((r for r in read_rows(args.json) if (r["method"], r["key"]) == (name, run.key)), None)
        if row is None:
            if name == "water_filling":
                arrange("observe")
                run_row(run)
                WATER.fill(run.method.settings["density"])
                print(json.dumps({"ranks": WATER.ranks}))
            arrange(name)
            row = run_row(run)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            record.append(args.json, row)
        print(json.dumps({k: row[k] for k in ("method", "perplexity", "learning_rate", "multiplier", "seed")}))


if __name__ == "__main__":
    main()
