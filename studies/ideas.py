"""Ideas that are not in the package: controllers, base optimizers and sides, measured as methods are.

    python studies/ideas.py                         # runs/ideas.jsonl: a row per idea that has none yet
    python studies/ideas.py --only anneal,clock     # some of them
    python studies/ideas.py --only none,adamw,lora --training per_device_train_batch_size=16,max_steps=300
    python studies/ideas.py --settings selection=multinomial_norm_nr,update_interval=200 --multiplier 0.1
    python studies/ideas.py --study studies/defaults.yaml --learning_rate 0.03 --multiplier 0.3

The model, text, schedule and evaluation are those of a study, studies/peers.yaml if no other is named. `none` is the
package itself, with the same settings. What came of them stands in docs/quality.md and docs/settings.md. Those that
follow the interval (ramp, anneal, average) take all layers to select at once (stagger=1).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from idea_controllers import BASES, CONTROLLERS
from torch import Tensor

from grass_hf import GrassConfig, MuonAdamW
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.convert import conversion, targets
from grass_hf.integrations import base
from grass_hf.measure.bench import record
from grass_hf.measure.bench.methods import resolve
from grass_hf.optim import factory, reselection
from grass_hf.optim.controller import GrassController
from grass_hf.recipes.study import grid
from grass_hf.recipes.study.rows import read_rows
from grass_hf.recipes.study.run import run_row
from grass_hf.slices.ops.shared_columns import SharedColumns

STUDY = Path(__file__).parent / "peers.yaml"


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# Other sides for some kinds of layers.
ROWS_OF = {
    "rows_qkv": ATTENTION[:3],
    "rows_o": ATTENTION[3:],
    "rows_gate_up": MLP[:2],
    "rows_down": MLP[2:],
    "rows_qkv_gate_up": ATTENTION[:3] + MLP[:2],
}
MLP_NEURONS = {
    "gate_proj": ("output", "gate_proj"),
    "up_proj": ("output", "gate_proj"),
    "down_proj": ("input", "gate_proj"),
}
VALUES = {"v_proj": ("output", "v_proj"), "o_proj": ("input", "v_proj")}
QUERIES = {"q_proj": ("output", "q_proj"), "k_proj": ("output", "q_proj")}
# Layers that choose together, by the sum of their scores, and on which side: what leads into a neuron and out of it.
NEURONS = {"neurons": MLP_NEURONS | VALUES | QUERIES, "mlp_neurons": MLP_NEURONS, "values": VALUES}


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


def pass_length(part) -> int:
    """Turns after which every row can have had one."""
    return math.ceil(part.state.size / part.state.rank)


def in_passes(part, name, scores, config, step):
    """Rows that had no turn in this pass through the rows come before those that had one, by norms among themselves."""
    turn = reselection.turn_of(config, step)
    waiting = part.state.trained.cpu() <= turn - turn % pass_length(part)
    return _rows(part, name, torch.where(waiting, 1e24 * scores, scores), config, step)


def shuffled(part, name, scores, config, step):
    """The same without the norms: a cycle whose order is drawn anew in every pass."""
    return in_passes(part, name, torch.ones_like(scores), config, step)


def norms_first(part, name, scores, config, step):
    """By norms in as many turns as one pass takes, then a cycle whose order is drawn anew in every pass."""
    early = reselection.turn_of(config, step) < pass_length(part)
    return (_rows if early else shuffled)(part, name, scores, config, step)


def norms_then_cycle(part, name, scores, config, step):
    """By norms in as many turns as one pass takes, then the package's cycle."""
    if reselection.turn_of(config, step) >= pass_length(part):
        config = dataclasses.replace(config, selection="cycle")
    return _rows(part, name, scores, config, step)


WATER = WaterFilling()
RULES = {
    "in_passes": in_passes,
    "shuffled": shuffled,
    "norms_first": norms_first,
    "norms_then_cycle": norms_then_cycle,
}
_side, _rank_for, _rows, _leader = targets._side, GrassConfig.rank_for, reselection._rows, targets._leader


def arrange(name: str) -> None:
    """Have the package follow an idea; `none` takes all back."""
    layer = [""]

    def kind():
        return layer[0].rpartition(".")[2]

    def side(sharing, *others):
        layer[0] = sharing[0].name
        if kind() in NEURONS.get(name, ()):
            return NEURONS[name][kind()][0]
        return "output" if kind() in ROWS_OF.get(name, ()) else _side(sharing, *others)

    def leader(use, *others):
        parent, _, leaf = use.name.rpartition(".")
        found = NEURONS.get(name, {}).get(leaf)
        return f"{parent}.{found[1]}" if found else _leader(use, *others)

    def rank_for(config, size, module):
        return WATER.ranks[WATER.group(module)]

    targets._side = side
    targets._leader = leader if name in NEURONS else _leader
    # who choose together in these need not read the same input
    conversion.SharedColumns = (lambda: None) if name in NEURONS else SharedColumns
    GrassConfig.rank_for = rank_for if name == "water_filling" else _rank_for
    reselection._rows = WATER.observe if name == "observe" else RULES.get(name, _rows)
    factory.GrassController = CONTROLLERS.get(name, GrassController)
    base.MuonAdamW = BASES.get(name, MuonAdamW)  # under the name "muon", see `main`


IDEAS = (*CONTROLLERS, *BASES, *ROWS_OF, *NEURONS, *RULES, "water_filling")


def point_parser(description: str, json_path: str, learning_rate: float, multiplier: float) -> argparse.ArgumentParser:
    """Arguments that say which point of which study is run, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--multiplier", type=float, default=multiplier)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(json_path))
    return parser


def point(study: grid.Study, name: str, kind: str, settings: dict, args: argparse.Namespace) -> grid.Run:
    """The run of a method at the point that the arguments name."""
    method = grid.Method(name, kind, settings, (args.learning_rate,), (args.multiplier,))
    return grid.Run(study, method, args.learning_rate, args.multiplier, args.seed)


def file_row(run: grid.Run, path: Path, prepare: Callable[[], object]) -> None:
    """Print a run's row, after `prepare` and the run itself if the file has none yet."""
    row = next((r for r in read_rows(path) if (r["method"], r["key"]) == (run.method.name, run.key)), None)
    if row is None:
        prepare()
        row = run_row(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        record.append(path, row)
    print(json.dumps({k: row[k] for k in ("method", "perplexity", "learning_rate", "multiplier", "seed")}))


def prepare(run: grid.Run) -> None:
    """Have the package follow the idea of a run."""
    if run.method.name == "water_filling":
        arrange("observe")
        run_row(run)
        WATER.fill(run.method.settings["density"])
        print(json.dumps({"ranks": WATER.ranks}))
    arrange(run.method.name)


def main() -> None:
    parser = point_parser(__doc__, "runs/ideas.jsonl", learning_rate=0.02, multiplier=0.15)
    parser.add_argument("--only", default=",".join(IDEAS), help="names, with commas; peers (lora, say) too")
    parser.add_argument(
        "--settings",
        default="density=0.25,update_interval=100,selection=multinomial_norm_nr,side=input,state_policy=carry_seeded,"
        "stagger=1",
        help="of Grass, as in optim_args",
    )
    parser.add_argument("--training", default="", help="other TrainingArguments than the study's: adam_beta2=0.95,...")
    args = parser.parse_args()
    study = grid.load_study(args.study)
    pairs = (pair.split("=") for pair in filter(None, args.training.split(",")))
    changed = {name: yaml.safe_load(value) for name, value in pairs}
    document = {**study.document, "training": {**study.document["training"], **changed}}
    study = dataclasses.replace(study, document=document)
    asked = parse_optim_args(args.settings)
    settings = asked.config.to_dict()
    del settings["scale"]
    if asked.base is not None:
        settings["base"] = asked.base
    settings = resolve("grass", settings, study.rank, study.target_modules)
    for name in args.only.split(","):
        kind = "grass" if name in IDEAS else name
        own = settings | ({"base": "muon"} | BASES[name].needs if name in BASES else {})
        if kind != "grass":
            own = resolve(kind, {}, study.rank, study.target_modules)
        run = point(study, name, kind, own, args)
        file_row(run, args.json, functools.partial(prepare, run))


if __name__ == "__main__":
    main()
