"""A study: which methods, at which rates and seeds, on which model and text; and which of its runs come next.

A study's file is a pretraining recipe (sections model, data and training) with one more section, ``study``. Every
method has a grid of learning rates times multipliers (the rate of the target matrices as a multiple of the rate of
everything else), all of one size. All points are run with the first seed; the other seeds with every point too, or
only with the best ``finalists`` of a method, which costs less and is the same rule for all.

A run is known by its key, a digest of all that decides about its result but the code: an interrupted study goes on
with the keys that no row has yet.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.fields import unknown_key
from ...measure.bench.methods import resolve
from ..parse import build_recipe, read_document
from .rows import deciding

# Fields of the section ``study``: those of `Study` that have a default, and what every method is made of.
_OPTIONS = ("target_modules", "target_warmup", "seeds", "finalists", "evaluations", "eval_blocks")
_FIELDS = ("rank", *_OPTIONS, "grid", "methods")
_GRID = ("learning_rates", "multipliers")
_METHOD = ("method", "settings", *_GRID)


@dataclass(frozen=True)
class Method:
    """One line of the comparison: a method with settings and a grid.

    Attributes:
        name: in the study.
        kind: a name of `measure.bench.methods.KINDS`.
        settings: all of them.
        learning_rates: of everything but the targets.
        multipliers: of the targets' learning rate; (1.0,) for a method that does not train them.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]
    multipliers: tuple[float, ...]

    def points(self) -> list[tuple[float, float]]:
        """The grid, its middle first: what is run first tells most."""
        middle = [(len(axis) - 1) / 2 for axis in (self.learning_rates, self.multipliers)]
        places = itertools.product(range(len(self.learning_rates)), range(len(self.multipliers)))
        order = sorted(places, key=lambda at: sum(abs(a - b) for a, b in zip(at, middle, strict=True)))
        return [(self.learning_rates[i], self.multipliers[j]) for i, j in order]


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    study: Study
    method: Method
    learning_rate: float
    multiplier: float
    seed: int

    @property
    def key(self) -> str:
        """Digest of what decides about the result."""
        decides = {
            "document": self.study.document,
            "targets": self.study.target_modules,
            "evaluation": [self.study.evaluations, self.study.eval_blocks],
            "method": [self.method.kind, deciding(self.method.kind, self.method.settings)],
            "rates": [self.learning_rate, self.multiplier],
            "seed": self.seed,
        }
        if self.study.target_warmup:
            decides["target_warmup"] = self.study.target_warmup
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        name: of the file, without its ending.
        path: of the file.
        document: the recipe in it, without ``study``.
        rank: of all methods that have one.
        target_modules: what the methods differ in.
        target_warmup: steps in which the multipliers rise linearly from zero, for all methods alike.
        methods: by name.
        seeds: the first runs the whole grid.
        finalists: points of each grid that the other seeds run too; None for all.
        evaluations: evenly spaced evaluations on held-out text, the last at the end.
        eval_blocks: blocks of held-out text that are evaluated, evenly spaced over all.
    """

    name: str
    path: Path
    document: dict[str, Any]
    rank: int
    methods: tuple[Method, ...]
    target_modules: Any = "all-linear"
    target_warmup: int = 0
    seeds: tuple[int, ...] = (0, 1)
    finalists: int | None = None
    evaluations: int = 4
    eval_blocks: int = 256

    def next_runs(self, rows: Iterable[Mapping[str, Any]]) -> list[Run]:
        """Runs that have no row yet, in their order; finalists' only when their grid is done."""
        done = {row["key"]: row for row in rows}
        runs = [run for run in self._grid(self.seeds[:1]) if run.key not in done]
        if self.finalists is None:
            return runs + [run for run in self._grid(self.seeds[1:]) if run.key not in done]
        for method in self.methods:
            if not any(run.method is method for run in runs):
                points = self._best(method, done)
                chosen = [Run(self, method, *point, seed) for seed in self.seeds[1:] for point in points]
                runs += [run for run in chosen if run.key not in done]
        return runs

    def size(self) -> int:
        """Number of runs of the whole study."""
        return sum(len(m.points()) + self._later(m) for m in self.methods)

    def missing(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Number of runs that have no row yet, those of finalists that are not known yet included."""
        runs = self.next_runs(rows)
        if self.finalists is None:
            return len(runs)
        unfinished = {run.method.name for run in runs if run.seed == self.seeds[0]}
        return len(runs) + sum(self._later(m) for m in self.methods if m.name in unfinished)

    def _later(self, method: Method) -> int:
        """Number of runs with other seeds than the first."""
        points = len(method.points())
        return (len(self.seeds) - 1) * (points if self.finalists is None else min(points, self.finalists))

    def _grid(self, seeds: tuple[int, ...]) -> Iterator[Run]:
        # methods alternate, so that an unfinished study compares like with like
        for seed in seeds:
            for points in itertools.zip_longest(*(method.points() for method in self.methods)):
                for method, point in zip(self.methods, points, strict=True):
                    if point is not None:
                        rate, multiplier = point
                        yield Run(self, method, rate, multiplier, seed)

    def _best(self, method: Method, done: Mapping[str, Mapping[str, Any]]) -> list[tuple[float, float]]:
        def loss(point: tuple[float, float]) -> float:
            found = done[Run(self, method, *point, self.seeds[0]).key]["loss"]
            return math.inf if found is None else found

        return sorted(method.points(), key=loss)[: self.finalists]


def load_study(path: str | Path, only: Iterable[str] = ()) -> Study:
    """Read a study's file.

    Args:
        path: of the YAML file.
        only: names of methods; all if none.

    Raises:
        ValueError: it cannot be read, or a section, field, setting or value is not valid.
    """
    path = Path(path)
    document = dict(read_document(path))
    section = document.pop("study", None)
    if not isinstance(section, dict):
        raise ValueError(f"{path} has no section `study`: it says which methods, rates and seeds are compared.")
    document.setdefault("task", "pretraining")
    if document["task"] != "pretraining" or "grass" in document:
        raise ValueError(f"{path}: a study compares pretraining runs; settings of Grass stand under study.methods.")
    build_recipe(document, path, ["--output_dir", "unused"], grass=False)  # its mistakes, before anything is run
    _known(section, _FIELDS, f"{path}: study")
    for name in ("rank", "methods"):
        if not section.get(name):
            raise ValueError(f"{path}: study.{name} is missing: write it as the studies in studies/ do.")
    options = {name: section[name] for name in _OPTIONS if name in section}
    if "seeds" in options:
        options["seeds"] = tuple(options["seeds"])
    _check_numbers(path, section["rank"], options)
    methods = tuple(_method(path, name, said or {}, section) for name, said in section["methods"].items())
    _check_sizes(path, methods)
    wanted = list(only)
    for name in wanted:
        if name not in section["methods"]:
            raise ValueError(f"--only {unknown_key(name, section['methods'], f'a method of {path}')}")
    methods = tuple(method for method in methods if not wanted or method.name in wanted)
    return Study(path.stem, path, document, section["rank"], methods, **options)


def _method(path: Path, name: str, said: Any, section: Mapping[str, Any]) -> Method:
    where = f"{path}: study.methods.{name}"
    if not isinstance(said, dict):
        raise ValueError(f"{where} holds {said!r}: write `field: value` lines under it.")
    _known(said, _METHOD, where)
    kind = said.get("method", name)
    grid: dict[str, Any] = {axis: said.get(axis, (section.get("grid") or {}).get(axis)) for axis in _GRID}
    if kind == "frozen":
        grid["multipliers"] = [1.0]
    for axis, values in grid.items():
        numbers = isinstance(values, list) and values and all(_positive(v) for v in values)
        if not numbers or sorted(set(map(float, values))) != list(map(float, values)):
            raise ValueError(
                f"{where}: {axis}={values!r} is no rising list of positive numbers: write [0.1, 0.3, 1.0]."
            )
    try:
        settings = resolve(
            kind, said.get("settings") or {}, section["rank"], section.get("target_modules", "all-linear")
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    rates, multipliers = (tuple(map(float, grid[axis])) for axis in _GRID)
    return Method(str(name), kind, settings, rates, multipliers)


def _check_sizes(path: Path, methods: tuple[Method, ...]) -> None:
    """A method with more tries than another would be favoured."""
    shapes = {m.name: (len(m.learning_rates), len(m.multipliers)) for m in methods if m.kind != "frozen"}
    sizes = {name: rates * multipliers for name, (rates, multipliers) in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: grids are of equal size for every method, and here they are {sizes}.")


def _check_numbers(path: Path, rank: Any, options: Mapping[str, Any]) -> None:
    seeds = options.get("seeds", (0,))
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"{path}: study.seeds={list(seeds)} is no list of different whole numbers: write [0, 1].")
    numbers = {"rank": rank, **{n: options.get(n, 1) for n in ("finalists", "evaluations", "eval_blocks")}}
    numbers["target_warmup"] = options.get("target_warmup", 0)
    for name, value in numbers.items():
        if name == "finalists" and value is None:
            continue
        least, kind = (0, "whole") if name == "target_warmup" else (1, "positive whole")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{path}: study.{name}={value!r} is not a {kind} number: give {least} or more.")


def _known(given: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    for name in given:
        if name not in fields:
            raise ValueError(f"{where}: {unknown_key(str(name), fields, 'a field here')}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
