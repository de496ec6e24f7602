"""What training sends: the collectives of an optimizer step, counted from shapes, without running anything.

    DDP     all-reduce of the gradients of all trainable parameters, in buckets
                AdamW  the sum of all parameters
                Grass  r/m of every target matrix, and the ordinary parameters
    FSDP2   all-gather of a unit's parameters before its forward and again before its backward (the root keeps its
            own), reduce-scatter of the gradients of the trainable ones
                Grass  gathers the frozen weights and the slices: what shrinks is the reduce-scatter
    both    Grass  on a step that selects: one all-reduce of a norm for every selectable row

The size S of a message is that of the whole: what is reduced, what is gathered. In a ring of N ranks each rank sends
(Patarasuk and Yuan 2009)

    all-reduce                    2 (N-1)/N S
    all-gather, reduce-scatter      (N-1)/N S
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...config.settings import GrassConfig
from ...convert.dtypes import gradient_dtype
from ...convert.targets import Target, plan
from ...slices.ops.row_norms import accumulation_dtype
from ...slices.ops.selection import needs_scores, with_replacement

ENGINES = ("ddp", "fsdp2")
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


@dataclass(frozen=True)
class Sent:
    """What one parameter of the plain model becomes on the wire.

    Attributes:
        unit: name of the layer that FSDP2 gathers it with; empty for the root, which is all that is in no layer.
        weights: (shape, bytes per element) of the tensors that are gathered.
        gradients: the same of those that have a gradient.
        forward: multiply-adds per token of the product with the parameter.
        gradient: multiply-adds per token of its gradient.
    """

    unit: str
    weights: tuple[tuple[tuple[int, ...], int], ...]
    gradients: tuple[tuple[tuple[int, ...], int], ...]
    forward: int = 0
    gradient: int = 0

    def weight_bytes(self, ranks: int = 1) -> int:
        """Bytes gathered, every tensor padded to so many equal parts of its first dimension."""
        return sum(_padded(shape, ranks) * width for shape, width in self.weights)

    def gradient_bytes(self, ranks: int = 1) -> int:
        """Bytes reduced, padded alike."""
        return sum(_padded(shape, ranks) * width for shape, width in self.gradients)


@dataclass(frozen=True)
class Traffic:
    """What an optimizer step of one method sends.

    Attributes:
        method: "adamw" or "grass".
        parts: one for every parameter, in the model's order.
        norms: bytes of the norms that a selecting step reduces.
        buffers: bytes of the buffers that DDP broadcasts before every forward pass.
        interval: K, steps between two selections.
    """

    method: str
    parts: tuple[Sent, ...]
    norms: int
    buffers: int
    interval: int

    def units(self) -> list[list[Sent]]:
        """What FSDP2 gathers together: the root, then the layers in the model's order."""
        units: dict[str, list[Sent]] = {"": []}
        for part in self.parts:
            units.setdefault(part.unit, []).append(part)
        return list(units.values())

    def sent(self, engine: str, ranks: int) -> dict[str, float]:
        """Bytes of the messages of an average step, by the kind of collective (`KINDS`).

        Args:
            engine: "ddp" or "fsdp2".
            ranks: N.
        """
        norms = self.norms / self.interval
        if engine == "ddp":
            reduced = sum(part.gradient_bytes() for part in self.parts)
            return dict(zip(KINDS, (reduced + norms, 0.0, 0.0, float(self.buffers)), strict=True))
        scattered = sum(part.gradient_bytes(ranks) for part in self.parts)
        # a layer is gathered again in backward, the root stays gathered
        gathered = sum(part.weight_bytes(ranks) * (2 if part.unit else 1) for part in self.parts)
        return dict(zip(KINDS, (norms, float(scattered), float(gathered), 0.0), strict=True))

    def flops(self, tokens: int, gradient_checkpointing: bool = False) -> float:
        """Floating-point operations of the products with weight matrices in a step of so many tokens.

        Forward and the gradient of the input take the whole matrix, the gradient of a target's weight its slice.
        Left out are attention scores, experts, and the norms of selecting steps.
        """
        forward = sum(part.forward for part in self.parts)
        gradient = sum(part.gradient for part in self.parts)
        return 2.0 * tokens * ((3 if gradient_checkpointing else 2) * forward + gradient)


def ring_bytes(sent: Mapping[str, float], ranks: int, gloo: bool = False) -> float:
    """Bytes that each rank sends for these messages around a ring; broadcasts left out.

    Args:
        sent: by `Traffic.sent`.
        ranks: N.
        gloo: whether a reduce-scatter travels as an all-reduce, as gloo's does.
    """
    scattered = (2 if gloo else 1) * sent["reduce_scatter"]
    return (ranks - 1) / ranks * (2 * sent["all_reduce"] + scattered + sent["all_gather"])


def traffic(model: nn.Module, config: GrassConfig | None, engine: str = "ddp") -> Traffic:
    """Count what training a model sends per step; parameters on the meta device will do.

    Args:
        model: a plain model, not converted; it is left as it is.
        config: settings of Grass; None means AdamW, which trains everything.
        engine: "ddp" or "fsdp2". FSDP2 wants one dtype, so slices have the weights' there.

    Raises:
        ValueError: the config does not fit the model, or the engine is unknown.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not known: choose one of {', '.join(ENGINES)}.")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if config is None:
        return Traffic("adamw", tuple(_plain(*held) for held in _parameters(model)), 0, buffers, 1)
    targets = {id(getattr(t.module, t.parameter)): t for t in plan(model, config).targets}
    parts, norms = [], 0
    for unit, module, param in _parameters(model):
        target = targets.get(id(param))
        if target is None:
            parts.append(_plain(unit, module, param))
            continue
        kind = gradient_dtype(param.dtype, config) if engine == "ddp" else param.dtype
        parts.append(_target(unit, module, param, target, kind.itemsize))
        experts = math.prod(param.shape[:-2])
        if needs_scores(config.selection):
            norms += experts * target.size * accumulation_dtype(param.dtype).itemsize
        # the slice's index, and its multipliers, are buffers
        multipliers = 2 * accumulation_dtype(kind).itemsize if with_replacement(config.selection) else 0
        buffers += experts * target.rank * (torch.int64.itemsize + multipliers)
    return Traffic("grass", tuple(parts), norms, buffers, config.update_interval)


def _plain(unit: str, module: nn.Module, param: nn.Parameter) -> Sent:
    own, multiplied = ((tuple(param.shape), param.element_size()),), _multiplied(module, param)
    return Sent(unit, own, own, multiplied, multiplied) if param.requires_grad else Sent(unit, own, (), multiplied)


def _target(unit: str, module: nn.Module, param: nn.Parameter, target: Target, width: int) -> Sent:
    dim = -2 if (target.side == "output") != target.transposed else -1
    shape = list(param.shape)
    shape[dim] = target.rank
    own, part = (tuple(param.shape), param.element_size()), (tuple(shape), width)
    multiplied = _multiplied(module, param)
    return Sent(unit, (own, part), (part,), multiplied, multiplied * target.rank // target.size)


def _multiplied(module: nn.Module, param: nn.Parameter) -> int:
    # an embedding looks its rows up, every other matrix multiplies every token
    return 0 if isinstance(module, nn.Embedding) or param.dim() != 2 else param.numel()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that FSDP2 wraps, by name: the members of the longest list of modules that is in no other list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return {}
    name = max(outer, key=lambda name: len(lists[name]))
    return {f"{name}.{number}": layer for number, layer in enumerate(lists[name])}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter once, with the layer that it is in and the module that uses it."""
    users: dict[int, tuple[nn.Module, nn.Parameter]] = {}
    for module in model.modules():
        for param in module._parameters.values():
            # of a tied matrix the head counts: it multiplies every token
            if param is not None and (id(param) not in users or isinstance(users[id(param)][0], nn.Embedding)):
                users[id(param)] = (module, param)
    units = {id(param): name for name, layer in layers(model).items() for param in layer.parameters()}
    for key, (module, param) in users.items():
        yield units.get(key, ""), module, param


def _padded(shape: tuple[int, ...], ranks: int) -> int:
    return -(-shape[0] // ranks) * ranks * math.prod(shape[1:]) if shape else ranks
