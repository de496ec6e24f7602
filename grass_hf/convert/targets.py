"""Which weights of a model are compressed, and why the others are not.

A weight that several modules use (a head tied to the embedding) is one target: all of its users share one slice.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from torch import nn

from ..config.settings import GrassConfig
from ..slices.ops.int8 import is_int8
from ..slices.ops.selection import fits
from ..slices.ops.sharding import shape_of
from .modules import converted_class, kind_of, layout_of
from .patterns import BASE, Use, matched_uses, output_heads, preset_name, shown, uses

logger = logging.getLogger(__name__)

# Linear layers of one parent module that read the same input, by the field's names for them.
SIBLINGS = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"query", "key", "value"},
    {"q", "k", "v"},
    {"q_lin", "k_lin", "v_lin"},
    {"wi_0", "wi_1"},
    {"w1", "w3"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
)


@dataclass(frozen=True)
class Target:
    """One matrix (or one tensor of experts' matrices) to compress.

    Attributes:
        name, module, parameter: its first use.
        sharers: other modules that use the same weight.
        side: the selected side, "output" or "input".
        transposed: the weight is stored (input, output).
        size: rows (columns) on that side.
        rank: how many of them are trained at a time.
        leader: name of the first target that selects the same columns of the same input; its own, mostly.
        blocks: parts of the stored rows that choose for themselves.
        vocabulary: whether it is an embedding, or the head, or both.
    """

    name: str
    module: nn.Module
    parameter: str
    sharers: tuple[nn.Module, ...]
    side: str
    transposed: bool
    size: int
    rank: int
    leader: str
    blocks: int
    vocabulary: bool


@dataclass(frozen=True)
class Plan:
    """What a config means for a model: targets, and the reason for every matched weight that is left out."""

    targets: list[Target]
    left_out: dict[str, str]


def plan(model: nn.Module, config: GrassConfig) -> Plan:
    """Match the config's patterns against a model, changing nothing.

    Raises:
        ValueError: a pattern matches nothing, nothing that matches can be compressed, or `rank` is above the
            selected side of every target.
    """
    matched, excluded = matched_uses(model, config)
    users: dict[int, list[Use]] = {}
    for use in uses(model):
        users.setdefault(id(use.weight), []).append(use)
    heads, frozen = output_heads(model), "by PEFT" if any(map(_of_peft, model.modules())) else "by you"
    targets: list[Target] = []
    left_out: dict[str, str] = {}
    too_small = []
    for use in matched:
        sharing = [use, *(other for other in users[id(use.weight)] if other.module is not use.module)]
        if any(use.module in target.sharers for target in targets):
            continue
        # can it be compressed at all?
        reason = _cannot(use, frozen) or next((_cannot_share(other, excluded, frozen) for other in sharing[1:]), None)
        if reason:
            left_out[use.name] = reason
            continue
        # which side of it, and how many of its rows or columns?
        layout = layout_of(use.module, use.parameter)
        transposed = layout.transposed
        vocabulary = any(isinstance(each.module, nn.Embedding) or id(each.module) in heads for each in sharing)
        side = _side(sharing, vocabulary, config, transposed)
        by_rows = (side == "output") != transposed
        size = layout.rows if by_rows else shape_of(use.weight)[-1]
        rank = config.rank_for(size, use.name)
        if rank > size:
            left_out[use.name] = f"its {side} side has {size} rows, fewer than rank={rank}: trained in full"
            too_small.append(size)
            continue
        # the matrices of a flat parameter choose their own rows, and the same columns
        flat = layout.matrices if by_rows and len(shape_of(use.weight)) == 2 else 1
        size, rank = size * flat, rank * flat
        # who chooses them?
        sharers = tuple(other.module for other in sharing[1:])
        placed = (use.module, use.parameter, sharers, side, transposed, size, rank)
        leader = _leader(use, side, rank, targets) if config.share_index else use.name
        blocks = math.lcm(config.row_blocks, flat) if by_rows and len(shape_of(use.weight)) == 2 else 1
        if not fits(size, rank, blocks):
            raise ValueError(
                f"{use.name}: rank={rank} of its {size} rows cannot be split over row_blocks={blocks}, the last would "
                f"have fewer rows than it should train: give a rank that {blocks} divides, or side='input'."
            )
        targets.append(Target(use.name, *placed, leader, blocks, vocabulary))
    # what is wrong with the config, if nothing is left?
    if targets:
        _check_pattern(model, config, targets)
        _warn_of_adapters(model, config, targets, sum(f"frozen {frozen}" in reason for reason in left_out.values()))
        return Plan(targets, left_out)
    if too_small:
        raise ValueError(
            f"rank={config.rank} is above the selected side of every target (the largest has {max(too_small)} rows): "
            f"give rank={max(too_small) // 4 or 1}, or density=0.25."
        )
    first, reason = next(iter(left_out.items()))
    raise ValueError(
        f"target_modules={shown(config.target_modules)} matches {len(left_out)} modules, and none can be compressed: "
        f"{first}: {reason}."
    )


def _check_pattern(model: nn.Module, config: GrassConfig, targets: list[Target]) -> None:
    """Stop if a key of `rank_pattern` or `density_pattern` says nothing about any target."""
    read = {config.pattern_key(target.name) for target in targets}
    for key in config.pattern:
        if key not in read:
            field = "rank_pattern" if config.rank_pattern else "density_pattern"
            examples = ", ".join(dict.fromkeys(target.name.rpartition(".")[2] for target in targets))
            raise ValueError(
                f"{field}: {key!r} says the rank of no target of {type(model).__name__}: a key is a regular expression "
                f"for a module's whole name ({targets[0].name}) or its end after a dot ({examples}), and of several "
                "that match the first one counts."
            )


def _leader(use: Use, side: str, rank: int, earlier: list[Target]) -> str:
    """Name of the first sibling of a linear layer that selects as many columns of the same input."""
    parent, _, leaf = use.name.rpartition(".")
    family = next((names for names in SIBLINGS if leaf in names), set())
    for target in reversed(earlier):
        other_parent, _, other_leaf = target.name.rpartition(".")
        if other_parent != parent or use.parameter != "weight" or target.parameter != "weight":
            continue
        weight: nn.Parameter = getattr(target.module, target.parameter)
        alike = target.side == side == "input" and shape_of(weight)[1] == shape_of(use.weight)[1]
        alike = alike and weight.dtype == use.weight.dtype
        if alike and other_leaf in family and target.rank == rank:
            return target.leader
    return use.name


def _side(sharing: list[Use], vocabulary: bool, config: GrassConfig, transposed: bool) -> str:
    # A side of the vocabulary's size is no side to select from: a token's row would be trained once in a while.
    # Feature columns serve the embedding and a tied head alike.
    if vocabulary:
        return "output" if transposed else "input"
    if config.side != "auto":
        return config.side
    rows, columns = layout_of(sharing[0].module, sharing[0].parameter).rows, shape_of(sharing[0].weight)[-1]
    return "output" if (columns >= rows if transposed else rows >= columns) else "input"


def _warn_of_adapters(model: nn.Module, config: GrassConfig, targets: list[Target], frozen: int) -> None:
    """Say that a preset takes adapters' factors, where PEFT has frozen layers that it would have taken."""
    names = _adapters(model)
    factors = [target.name for target in targets if target.name in names]
    if factors and frozen and preset_name(config.target_modules):
        logger.warning(
            "target_modules=%s takes %d factors of PEFT's adapters (%s, ...), because the %d other layers are frozen "
            "by PEFT: free those that are to be trained (param.requires_grad_(True)) before converting, or train the "
            "factors whole with another optim.",
            shown(config.target_modules),
            len(factors),
            factors[0],
            frozen,
        )


def _adapters(model: nn.Module) -> set[str]:
    """Names of the modules that PEFT has put beside the layers of a model."""
    layers = [(name, module) for name, module in model.named_modules() if _of_peft(module, "tuners.")]
    inner = {f"{name}.{leaf}" for name, layer in layers if hasattr(layer, "base_layer") for leaf in _leaves(layer)}
    return {name for name in inner if f"{BASE}." not in f"{name}."}


def _leaves(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_modules() if name]


def _of_peft(module: nn.Module, package: str = "") -> bool:
    return type(module).__module__.startswith(f"peft.{package}")


def _cannot(use: Use, frozen: str) -> str | None:
    """Why a matched weight cannot be compressed, or None; `frozen` says by whom it would be."""
    module, weight = use.module, use.weight
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is no linear layer, Conv1D, embedding or experts: trained in full"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}: left as it is"
    if not weight.requires_grad and not is_int8(weight):
        return f"frozen {frozen}: left frozen"
    if "forward" in vars(module):
        return "its forward was replaced (device_map offloading hooks, say): trained in full"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it: trained in full"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return "an embedding with max_norm, scale_grad_by_freq or sparse gradients: trained in full"
    if converted_class(module) is None:
        return f"{type(module).__name__} computes something else than a plain {kind.name} product: trained in full"
    return None


def _cannot_share(other: Use, excluded: set[str], frozen: str) -> str | None:
    """Why a weight cannot be compressed because of another module that uses it, or None."""
    if other.name in excluded:
        return f"its weight is tied to {other.name}, which exclude_modules names: trained in full"
    reason = _cannot(other, frozen)
    return reason and f"its weight is tied to {other.name}, and there: {reason}"
