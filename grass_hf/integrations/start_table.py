"""The table that a run starts with: what is compressed, what is not and why, and the bytes of both."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn

from ..config.settings import GrassConfig
from ..config.sizes import shown_bytes
from ..convert import experts
from ..convert.conversion import grass_slices, is_converted
from ..convert.modules import kind_of
from ..convert.record import conversion_of
from ..optim.driving import controller_of, plain_class
from ..optim.parameter_groups import GROUP_KEY, VOCABULARY_KEY
from ..slices.ops import products
from ..slices.ops.sharding import shape_of


@dataclass(frozen=True)
class Bytes:
    """Bytes of one training state: slices, gradients and optimizer state; None where not known before a step."""

    slices: int
    gradients: int
    optimizer_state: int | None


@dataclass(frozen=True)
class Coverage:
    """How much of the compressed weights a run of so many steps reaches.

    Attributes:
        steps: that are planned.
        turn: steps that a weight's rows take together, K / density, of the smallest density.
        most: the share that is trained at most, if no row is selected twice before all were.
        expected: the share to expect; None where the rule's choice cannot be foretold.
    """

    steps: int
    turn: int
    most: float
    expected: float | None


@dataclass(frozen=True)
class StartReport:
    """What `start_report` found; as text it is the table.

    Attributes:
        optimizer: name of the base optimizer's class.
        config: settings of the run.
        slice_rates, other_rates: learning rates of the groups of slices and of the others, as the run begins (the
            schedule's highest, where one is made already).
        trained_now, trained_in_all, elements: numbers of the model that are trained at a time, that can be trained in
            the end, and all of them.
        coverage: None where the number of steps is not known.
        targets: (weights, pattern of names, shape of the weight, side, rank, density) per kind.
        ordinary: (parameters, pattern of names, elements in all, reason) per kind of uncompressed parameter.
        grass: bytes of this run.
        adamw: bytes of a full AdamW run in the same dtypes.
    """

    optimizer: str
    config: GrassConfig
    slice_rates: list[float]
    other_rates: list[float]
    trained_now: int
    trained_in_all: int
    elements: int
    coverage: Coverage | None
    targets: list[tuple[int, str, tuple[int, ...], str, int, float]]
    ordinary: list[tuple[int, str, int, str]]
    grass: Bytes
    adamw: Bytes

    def __str__(self) -> str:
        console = Console(width=80, color_system=None)
        with console.capture() as text:
            console.print(render(self))
        return text.get().rstrip()


def summary(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int | None = None) -> StartReport:
    """Print what is trained and how: the table that a Trainer's run starts with, for a loop of your own.

    Args:
        model: converted by `convert_to_grass`.
        optimizer: that `grass_optimizer` made for it, or Accelerate's around it.
        steps: optimizer steps that are planned; with them the table says how much of the weights will be trained.

    Returns:
        The same as numbers; ``str`` of it is the table at 80 columns.

    Raises:
        ValueError: the model is not converted, the optimizer does not drive its slices, or `steps` is not positive.
    """
    if not is_converted(model):
        raise ValueError("summary: the model is not converted: call convert_to_grass(model, ...) first.")
    while getattr(optimizer, "grass", None) is None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if getattr(optimizer, "grass", None) is None:
        raise ValueError(
            "summary: the optimizer does not drive the model's slices: make it with grass_optimizer(model, ...)."
        )
    if steps is not None and steps < 1:
        raise ValueError(f"summary: steps={steps} is not a positive number of optimizer steps: leave it out.")
    report = start_report(model, optimizer, steps)
    Console().print(render(report))
    return report


def start_report(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int | None = None) -> StartReport:
    """Describe a converted model and the optimizer that drives it (an engine's, say), for a run of `steps`."""
    targets: Counter = Counter()
    for layer in grass_slices(model):
        state = layer.state
        shape = tuple(shape_of(layer.weight))
        targets[pattern_of(state.name), shape, layer.side, state.rank, state.rank / state.size] += 1
    slices = {id(layer.active) for layer in grass_slices(model)}
    ordinary: dict[tuple[str, str], list[int]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in slices:
            ordinary.setdefault((pattern_of(name), _reason(model, name, param)), []).append(shape_of(param).numel())
    controller = optimizer.grass
    layers = list(grass_slices(model))
    others = sum(sum(sizes) for sizes in ordinary.values())
    weights = {id(layer.weight): shape_of(layer.weight).numel() for layer in layers}
    beside = {id(p): shape_of(p).numel() for p in model.parameters() if id(p) not in slices}
    return StartReport(
        plain_class(controller.base).__name__,
        controller.config,
        _rates(optimizer, slices=True),
        _rates(optimizer, slices=False),
        others + sum(shape_of(layer.active).numel() for layer in layers),
        others + sum(weights.values()),
        sum((beside | weights).values()),
        steps
        and coverage_of(
            [(layer.state.rank, layer.state.size, weights[id(layer.weight)]) for layer in layers],
            controller.config,
            steps,
        ),
        [(count, *kind) for kind, count in targets.items()],
        [(len(sizes), name, sum(sizes), reason) for (name, reason), sizes in ordinary.items()],
        _grass_bytes(model, optimizer),
        _adamw_bytes(model),
    )


def coverage_of(slices: list[tuple[int, int, int]], config: GrassConfig, steps: int) -> Coverage | None:
    """What share of the weights is trained within `steps`.

    Args:
        slices: (rank, size of the side that is selected from, elements of the weight) of each.
        config: of the run.
        steps: optimizer steps.
    """
    if not slices:
        return None
    choosing = min(steps, config.select_until or steps)
    # with stagger, some layers select once more, before their first interval is over
    turns = math.ceil(choosing / config.update_interval) + (config.stagger > 1 and choosing > 1)
    weights = sum(elements for _, _, elements in slices)
    most = sum(min(1.0, turns * rank / size) * elements for rank, size, elements in slices) / weights
    if config.selection == "cycle":
        expected = most
    elif config.selection == "top_r":
        expected = None
    else:  # as if all rows were equally likely
        expected = sum((1 - (1 - rank / size) ** turns) * elements for rank, size, elements in slices) / weights
    turn = max(math.ceil(config.update_interval * size / rank) for rank, size, _ in slices)
    return Coverage(steps, turn, most, expected)


def _rates(optimizer: torch.optim.Optimizer, *, slices: bool) -> list[float]:
    groups = [group for group in optimizer.param_groups if (GROUP_KEY in group) is slices and group["params"]]
    return sorted({float(group.get("initial_lr", group["lr"])) for group in groups})


def render(report: StartReport) -> Group:
    """The report as rich tables and lines, to print; at 80 columns every name can be read."""
    compressed = _table("Grass trains a slice of", weights="right", modules="left", shape="right", side="left")
    for heading in ("r", "density"):
        compressed.add_column(heading, justify="right", no_wrap=True)
    for count, name, shape, side, rank, density in report.targets:
        sizes = " x ".join(map(str, shape))
        compressed.add_row(str(count), _broken(name, 36), sizes, side, str(rank), f"{density:.1%}")
    ordinary = _table("and in full", parameters="right", names="left", elements="right")
    ordinary.add_column("why", overflow="fold")
    for count, name, elements, reason in report.ordinary:
        ordinary.add_row(str(count), _broken(name, 30), f"{elements:,}", reason)
    memory = _table("Memory, weights and activations aside", **{"": "left", "Grass": "right", "full AdamW": "right"})
    for field, label in (
        ("slices", "slices"),
        ("gradients", "gradients"),
        ("optimizer_state", "optimizer state"),
    ):
        memory.add_row(label, shown_bytes(getattr(report.grass, field)), shown_bytes(getattr(report.adamw, field)))
    said = "\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in _lines(report))
    return Group(compressed, ordinary, memory, Text(said))


def _table(title: str, **columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _broken(name: str, width: int) -> str:
    """A module's name on lines of at most `width` characters, each but the last ending with a dot."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _lines(report: StartReport) -> Iterator[str]:
    config, elements = report.config, report.elements
    yield (
        f"{report.optimizer} steps over the slices; others are selected every K = {config.update_interval} steps by "
        f"{config.selection}, state {config.state_policy}"
    )
    scaled = "" if config.scale == 1 else f" (scale {config.scale:g})"
    others = f", others {_numbers(report.other_rates)}" if report.other_rates else ""
    yield f"learning rate: slices {_numbers(report.slice_rates)}{scaled}{others}"
    yield (
        f"trained now: {report.trained_now:,} of {elements:,} parameters ({report.trained_now / elements:.1%}); "
        f"in all: {report.trained_in_all:,} ({report.trained_in_all / elements:.1%})"
    )
    found = report.coverage
    if found is None:
        return
    if found.expected is None:
        yield f"after {found.steps:,} steps: at most {found.most:.0%} of the compressed weights are trained"
    else:
        yield f"after {found.steps:,} steps: about {found.expected:.0%} of the compressed weights are trained"
    if found.turn > found.steps:
        yield (
            f"K / density = {found.turn:,} steps would reach every row, and {found.steps:,} are planned: at most "
            f"{found.most:.0%} of the compressed weights will ever be trained; a smaller update_interval reaches more"
        )


def _numbers(values: list[float]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def pattern_of(name: str) -> str:
    """`model.layers.3.mlp` and its siblings are one kind: `model.layers.*.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def _reason(model: nn.Module, name: str, param: nn.Parameter) -> str:
    owner, _, leaf = name.rpartition(".")
    left_out = conversion_of(model).left_out
    if name in left_out or (leaf == "weight" and owner in left_out):
        return left_out.get(name) or left_out[owner]
    if len(shape_of(param)) < 2:
        return "a vector: nothing to select from"
    module = model.get_submodule(owner)
    if module is getattr(model, "get_output_embeddings", lambda: None)():
        return "the output head, not in target_modules"
    if isinstance(module, nn.Embedding):
        return "an embedding, not in target_modules"
    kind = kind_of(module)
    if kind is None:
        return f"a parameter of {type(module).__name__}, which is no linear layer, Conv1D, embedding or experts"
    if leaf != "weight" and leaf not in {*experts.parameters(module), *products.layouts(module)}:
        return f"a parameter beside the {kind.name} weights"
    return "not in target_modules"


def _grass_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    trainable = [p for p in model.parameters() if p.requires_grad]
    slices = sum(_bytes(layer.active) for layer in grass_slices(model) if layer.resident)
    return Bytes(slices, sum(map(_bytes, trainable)), _state_bytes(optimizer))


def _adamw_bytes(model: nn.Module) -> Bytes:
    converted = list(grass_slices(model))
    slices = {id(layer.active) for layer in converted}
    weights = sum(_bytes(layer.weight) for layer in converted)
    full = weights + sum(_bytes(p) for p in model.parameters() if p.requires_grad and id(p) not in slices)
    return Bytes(0, full, 2 * full)


def _bytes(param: nn.Parameter) -> int:
    return shape_of(param).numel() * param.element_size()


def _state_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes of state after a first step, found by taking one on the meta device; None if the class cannot."""
    controller = controller_of(optimizer)
    base = controller.base
    base_class: Any = plain_class(base)
    known = inspect.signature(base_class).parameters
    settings = {key: value for key, value in base.defaults.items() if key in known}
    settings.update({key: False for key in ("fused", "foreach", "capturable") if key in settings})
    # an optimizer may treat the slices' groups in its own way, and those of embeddings in another
    owns = controller.groups()
    groups: defaultdict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list)
    for param in controller.parameters():
        alike = torch.empty(shape_of(param), dtype=controller.stepped_dtype(param), device="meta", requires_grad=True)
        alike.grad = torch.empty_like(alike)
        keys = owns.get(id(param), {})
        groups[tuple(key for key in (GROUP_KEY, VOCABULARY_KEY) if key in keys)].append(alike)
    try:
        own = [{"params": alikes, **dict.fromkeys(keys, -1)} for keys, alikes in groups.items()]
        trial = base_class(own, **settings)
        trial.step()
    except Exception:  # third-party kernels without a meta implementation: the table says "after the first step"
        return None
    return sum(v.nbytes for state in trial.state.values() for v in state.values() if isinstance(v, torch.Tensor))
