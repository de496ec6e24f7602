"""The table that a run starts with: what is compressed, what is not and why, and the bytes of both."""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..config.settings import GrassConfig
from ..convert import experts
from ..convert.conversion import grass_slices, is_converted
from ..convert.modules import kind_of
from ..convert.record import conversion_of
from ..optim.driving import controller_of, plain_class
from ..optim.parameter_groups import GROUP_KEY, VOCABULARY_KEY
from ..slices.ops import products
from ..slices.ops.sharding import shape_of
from ..slices.slice import Slice
from .coverage import Coverage, coverage_of
from .table_text import render


@dataclass(frozen=True)
class Bytes:
    """Bytes of one training state: slices, gradients and optimizer state; None where not known before a step."""

    slices: int
    gradients: int
    optimizer_state: int | None


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
    for slice_ in grass_slices(model):
        state = slice_.state
        shape = tuple(shape_of(slice_.weight))
        targets[pattern_of(state.name), shape, slice_.side, state.rank, state.rank / state.size] += 1
    actives = {id(slice_.active) for slice_ in grass_slices(model)}
    ordinary: dict[tuple[str, str], list[int]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in actives:
            ordinary.setdefault((pattern_of(name), _reason(model, name, param)), []).append(shape_of(param).numel())
    controller = controller_of(optimizer)
    slices = list(grass_slices(model))
    others = sum(sum(sizes) for sizes in ordinary.values())
    weights = {id(slice_.weight): shape_of(slice_.weight).numel() for slice_ in slices}
    beside = {id(p): shape_of(p).numel() for p in model.parameters() if id(p) not in actives}
    sizes = [(slice_.state.rank, slice_.state.size, weights[id(slice_.weight)]) for slice_ in slices]
    return StartReport(
        plain_class(controller.base).__name__,
        controller.config,
        _rates(optimizer, slices=True),
        _rates(optimizer, slices=False),
        others + sum(shape_of(slice_.active).numel() for slice_ in slices),
        others + sum(weights.values()),
        sum((beside | weights).values()),
        coverage_of(sizes, controller.config, steps) if steps else None,
        [(count, *kind) for kind, count in targets.items()],
        [(len(sizes), name, sum(sizes), reason) for (name, reason), sizes in ordinary.items()],
        _grass_bytes(model, optimizer),
        _adamw_bytes(model),
    )


def _rates(optimizer: torch.optim.Optimizer, *, slices: bool) -> list[float]:
    groups = [group for group in optimizer.param_groups if (GROUP_KEY in group) is slices and group["params"]]
    return sorted({float(group.get("initial_lr", group["lr"])) for group in groups})


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
    slices = sum(_slice_bytes(slice_) for slice_ in grass_slices(model))
    return Bytes(slices, sum(map(_bytes, trainable)), _state_bytes(optimizer))


def _slice_bytes(slice_: Slice) -> int:
    """Of one between steps: sixteen bits a number of a released one that has more digits than its weight."""
    if slice_.resident:
        return _bytes(slice_.active)
    return shape_of(slice_.active).numel() * torch.int16.itemsize if slice_.keeps_low else 0


def _adamw_bytes(model: nn.Module) -> Bytes:
    converted = list(grass_slices(model))
    slices = {id(slice_.active) for slice_ in converted}
    weights = sum(_bytes(slice_.weight) for slice_ in converted)
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
