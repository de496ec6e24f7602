"""The table that a run starts with: what is compressed, what is not and why, and the bytes of both."""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import nn

from ..config.sizes import shown_bytes
from ..convert import experts
from ..convert.conversion import grass_slices
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
class StartReport:
    """What `start_report` found.

    Attributes:
        targets: (weights, pattern of names, shape of the weight, side, rank, density) per kind.
        ordinary: (parameters, pattern of names, elements in all, reason) per kind of uncompressed parameter.
        grass: bytes of this run.
        adamw: bytes of a full AdamW run in the same dtypes.
    """

    targets: list[tuple[int, str, tuple[int, ...], str, int, float]]
    ordinary: list[tuple[int, str, int, str]]
    grass: Bytes
    adamw: Bytes


def start_report(model: nn.Module, optimizer: torch.optim.Optimizer) -> StartReport:
    """Describe a converted model and the optimizer that drives it (an engine's, say)."""
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
    return StartReport(
        [(count, *kind) for kind, count in targets.items()],
        [(len(sizes), name, sum(sizes), reason) for (name, reason), sizes in ordinary.items()],
        _grass_bytes(model, optimizer),
        _adamw_bytes(model),
    )


def render(report: StartReport) -> Group:
    """The report as rich tables, to print."""
    compressed = Table(title="Grass trains a slice of", title_justify="left")
    for heading in ("weights", "modules", "shape", "side", "r", "density"):
        compressed.add_column(heading, justify="left" if heading in ("modules", "side") else "right")
    for count, name, shape, side, rank, density in report.targets:
        compressed.add_row(str(count), name, " x ".join(map(str, shape)), side, str(rank), f"{density:.1%}")
    ordinary = Table(title="and in full", title_justify="left")
    for heading in ("parameters", "names", "elements", "why"):
        ordinary.add_column(heading, justify="left" if heading in ("names", "why") else "right")
    for count, name, elements, reason in report.ordinary:
        ordinary.add_row(str(count), name, f"{elements:,}", reason)
    memory = Table(title="Memory, weights and activations aside", title_justify="left")
    for heading in ("", "Grass", "full AdamW"):
        memory.add_column(heading, justify="right" if heading else "left")
    for field, label in (
        ("slices", "slices"),
        ("gradients", "gradients"),
        ("optimizer_state", "optimizer state"),
    ):
        memory.add_row(label, shown_bytes(getattr(report.grass, field)), shown_bytes(getattr(report.adamw, field)))
    return Group(compressed, ordinary, memory)


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
