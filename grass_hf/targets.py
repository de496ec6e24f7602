"""Which weights of a model are compressed, and why the others are not.

Patterns have PEFT's meaning and are matched by PEFT's own function: a list holds name suffixes, a string is a regular
expression for the full module name. Two names stand for patterns: "all-linear" is every linear layer, Conv1D and
expert but the output head, "all-matrices" adds the head and the embeddings.

A weight that several modules use (a head tied to the embedding) is one target: all of its users share one slice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from . import experts
from .config import GrassConfig, unknown_key
from .modules import converted_class, kind_of

# What the two named patterns take, by the names of `modules.Kind`.
PRESETS = {
    "all-linear": {"linear", "Conv1D", "experts"},
    "all-matrices": {"linear", "Conv1D", "experts", "embedding"},
}


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
class Use:
    """A weight in a module: the module's (for experts, the parameter's) qualified name, and where it is."""

    name: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)


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
    matched, excluded = _matched(model, config)
    users: dict[int, list[Use]] = {}
    for use in _uses(model):
        users.setdefault(id(use.weight), []).append(use)
    heads = _heads(model)
    targets, left_out, too_small = [], {}, []
    for use in matched:
        sharing = [use, *(other for other in users[id(use.weight)] if other.module is not use.module)]
        if any(use.module in target.sharers for target in targets):
            continue
        reason = _cannot(use) or next((_cannot_share(other, excluded) for other in sharing[1:]), None)
        if reason:
            left_out[use.name] = reason
            continue
        transposed = kind_of(use.module).transposed
        side = _side(sharing, heads, config, transposed)
        size = use.weight.shape[-2 if (side == "output") != transposed else -1]
        rank = config.rank_for(size)
        if rank > size:
            left_out[use.name] = f"its {side} side has {size} rows, fewer than rank={rank}: trained in full"
            too_small.append(size)
            continue
        sharers = tuple(other.module for other in sharing[1:])
        placed = (use.module, use.parameter, sharers, side, transposed, size, rank)
        leader = _leader(use, side, targets) if config.share_index else use.name
        targets.append(Target(use.name, *placed, leader))
    if targets:
        return Plan(targets, left_out)
    if too_small:
        raise ValueError(
            f"rank={config.rank} is above the selected side of every target (the largest has {max(too_small)} rows): "
            f"give rank={max(too_small) // 4 or 1}, or density=0.25."
        )
    first, reason = next(iter(left_out.items()))
    raise ValueError(
        f"target_modules={_shown(config.target_modules)} matches {len(left_out)} modules, and none can be compressed: "
        f"{first}: {reason}."
    )


def _leader(use: Use, side: str, earlier: list[Target]) -> str:
    """Name of the first sibling of a linear layer that selects columns of the same input."""
    parent, _, leaf = use.name.rpartition(".")
    family = next((names for names in SIBLINGS if leaf in names), set())
    for target in reversed(earlier):
        other_parent, _, other_leaf = target.name.rpartition(".")
        if other_parent != parent or use.parameter != "weight" or target.parameter != "weight":
            continue
        alike = target.side == side == "input" and target.module.weight.shape[1] == use.weight.shape[1]
        if alike and other_leaf in family and target.module.weight.dtype == use.weight.dtype:
            return target.leader
    return use.name


def _side(sharing: list[Use], heads: set[int], config: GrassConfig, transposed: bool) -> str:
    # A side of the vocabulary's size is no side to select from: a token's row would be trained once in a while.
    # Feature columns serve the embedding and a tied head alike.
    if any(isinstance(use.module, nn.Embedding) or id(use.module) in heads for use in sharing):
        return "output" if transposed else "input"
    if config.side != "auto":
        return config.side
    rows, columns = sharing[0].weight.shape[-2:]
    return "output" if (columns >= rows if transposed else rows >= columns) else "input"


def _uses(model: nn.Module) -> Iterator[Use]:
    """Every weight that a pattern may name."""
    for name, module in model.named_modules():
        if experts.is_experts(module):
            yield from (Use(f"{name}.{leaf}".lstrip("."), module, leaf) for leaf in experts.parameters(module))
        # A list of suffixes or a regular expression may name containers too ("mlp"): only weights can be targets.
        elif name and isinstance(getattr(module, "weight", None), nn.Parameter):
            yield Use(name, module, "weight")


def _matched(model: nn.Module, config: GrassConfig) -> tuple[list[Use], set[str]]:
    """What the patterns name, and the names that are excluded."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    _check_regular_expressions(config)
    preset = _preset(config.target_modules)
    heads = _heads(model) if preset == "all-linear" else set()
    # Only the carrier of the patterns; nothing of LoRA is used.
    patterns = LoraConfig(
        target_modules=".*" if preset else _as_peft(config.target_modules),
        exclude_modules=_as_peft(config.exclude_modules),
    )

    def check(use: Use) -> object:
        # experts go by their module's name too
        names = {use.name, use.name if use.parameter == "weight" else use.name.rpartition(".")[0]} - {""}
        results = [check_target_module_exists(patterns, name) for name in sorted(names)]
        return next((r for r in results if _is_excluded(r)), any(results))

    matched, excluded, names = [], set(), []
    for use in _uses(model):
        names.append(use.name)
        found = check(use)
        if _is_excluded(found):
            excluded.add(use.name)
        elif found and (not preset or _in_preset(use, preset, heads)):
            matched.append(use)
    if not matched:
        raise ValueError(_nothing_matches(model, config))
    if config.exclude_modules and not excluded:
        raise ValueError(
            f"exclude_modules={_shown(config.exclude_modules)} matches no module of {type(model).__name__}: remove "
            "it or correct it (a list holds name suffixes, a string is a regular expression for the full name)."
        )
    if isinstance(config.target_modules, tuple):
        names += [name for name, _ in model.named_modules()]
        for suffix in config.target_modules:
            if not any(name == suffix or name.endswith("." + suffix) for name in names):
                raise ValueError("target_modules: " + unknown_key(suffix, _suffixes(model), "a module of the model"))
    return matched, excluded


def _in_preset(use: Use, preset: str, heads: set[int]) -> bool:
    kind = kind_of(use.module)
    return kind is not None and kind.name in PRESETS[preset] and id(use.module) not in heads


def _is_excluded(found: object) -> bool:
    return type(found).__name__ == "_ExcludedModule"


def _cannot(use: Use) -> str | None:
    """Why a matched weight cannot be compressed, or None."""
    module, weight = use.module, use.weight
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is no linear layer, Conv1D, embedding or experts: trained in full"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}: left as it is"
    if not weight.requires_grad:
        return "frozen by you: left frozen"
    if "forward" in vars(module):
        return "its forward was replaced (device_map offloading hooks, say): trained in full"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it: trained in full"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return "an embedding with max_norm, scale_grad_by_freq or sparse gradients: trained in full"
    if converted_class(module) is None:
        return f"{type(module).__name__} computes something else than a plain {kind.name} product: trained in full"
    return None


def _cannot_share(other: Use, excluded: set[str]) -> str | None:
    """Why a weight cannot be compressed because of another module that uses it, or None."""
    if other.name in excluded:
        return f"its weight is tied to {other.name}, which exclude_modules names: trained in full"
    reason = _cannot(other)
    return reason and f"its weight is tied to {other.name}, and there: {reason}"


def _heads(model: nn.Module) -> set[int]:
    """Ids of the output embeddings, or else of a classification head."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return set()
    head = get()
    return {id(head)} if head is not None else {id(getattr(model, name, None)) for name in SEQ_CLS_HEAD_NAMES}


def _check_regular_expressions(config: GrassConfig) -> None:
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{field}={pattern!r} is not a valid regular expression ({error}).") from error


def _preset(patterns) -> str | None:
    name = patterns.lower().replace("_", "-") if isinstance(patterns, str) else None
    return name if name in PRESETS else None


def _as_peft(patterns):
    return list(patterns) if isinstance(patterns, tuple) else patterns


def _shown(patterns) -> str:
    return repr(list(patterns) if isinstance(patterns, tuple) else patterns)


def _suffixes(model: nn.Module) -> set[str]:
    return {use.name.rsplit(".", 1)[-1] for use in _uses(model) if _in_preset(use, "all-linear", set())}


def _nothing_matches(model: nn.Module, config: GrassConfig) -> str:
    sentence = (
        f"target_modules={_shown(config.target_modules)} matches no module of {type(model).__name__} with a weight"
    )
    linear = sorted(_suffixes(model))
    if isinstance(config.target_modules, str) and not _preset(config.target_modules):
        sentence += " (a string is a regular expression for the full name, a list holds suffixes)"
    return f"{sentence}: its linear layers are called {', '.join(linear) or 'nothing, it has none'}."
