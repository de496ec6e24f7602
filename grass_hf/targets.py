"""Which modules of a model are compressed, and why the others are not.

Patterns have PEFT's meaning and are matched by PEFT's own function: "all-linear" is every linear layer but the
output head, a list holds name suffixes, a string is a regular expression for the full module name.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from .config import GrassConfig, unknown_key

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """One matrix to compress: its module, the selected side and the number of rows."""

    name: str
    module: nn.Module
    side: str
    size: int
    rank: int


@dataclass(frozen=True)
class Plan:
    """What a config means for a model: targets, and the reason for every matched module that is left out."""

    targets: list[Target]
    left_out: dict[str, str]


def plan(model: nn.Module, config: GrassConfig) -> Plan:
    """Match the config's patterns against a model, changing nothing.

    Raises:
        ValueError: a pattern matches nothing, nothing that matches can be compressed, or `rank` is above the
            selected side of every target.
    """
    matched = _matched(model, config)
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    targets, left_out, too_small = [], {}, []
    for name, module in matched.items():
        reason = _cannot(module, shared)
        if reason:
            left_out[name] = reason
            continue
        rows, columns = module.weight.shape
        side = config.side
        if side == "auto":
            side = "output" if rows >= columns else "input"
        size = rows if side == "output" else columns
        rank = config.rank_for(size)
        if rank > size:
            left_out[name] = f"its {side} side has {size} rows, fewer than rank={rank}: trained in full"
            too_small.append(size)
        else:
            targets.append(Target(name, module, side, size, rank))
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


def _matched(model: nn.Module, config: GrassConfig) -> dict[str, nn.Module]:
    """Modules that the patterns name, by qualified name."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    _check_regular_expressions(config)
    everything = _is_all_linear(config.target_modules)
    heads = _heads(model)
    # Only the carrier of the patterns; nothing of LoRA is used.
    patterns = LoraConfig(
        target_modules=".*" if everything else _as_peft(config.target_modules),
        exclude_modules=_as_peft(config.exclude_modules),
    )
    matched, excluded = {}, False
    for name, module in model.named_modules():
        if not name:
            continue
        found = check_target_module_exists(patterns, name)
        excluded = excluded or type(found).__name__ == "_ExcludedModule"
        # A list of suffixes or a regular expression may name containers too ("mlp"): only weights can be targets.
        holds_weight = isinstance(getattr(module, "weight", None), nn.Parameter)
        if found and holds_weight and not (everything and (id(module) in heads or not isinstance(module, nn.Linear))):
            matched[name] = module
    if not matched:
        raise ValueError(_nothing_matches(model, config))
    if config.exclude_modules and not excluded:
        raise ValueError(
            f"exclude_modules={_shown(config.exclude_modules)} matches no module of {type(model).__name__}: remove "
            "it or correct it (a list holds name suffixes, a string is a regular expression for the full name)."
        )
    if isinstance(config.target_modules, tuple):
        for suffix in config.target_modules:
            if not any(name == suffix or name.endswith("." + suffix) for name in dict(model.named_modules())):
                raise ValueError("target_modules: " + unknown_key(suffix, _suffixes(model), "a module of the model"))
    return matched


def _cannot(module: nn.Module, shared: Counter) -> str | None:
    """Why a matched module cannot be compressed, or None."""
    weight = module.weight
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not a linear layer: trained in full"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}: left as it is"
    if not weight.requires_grad:
        return "frozen by you: left frozen"
    if shared[id(weight)] > 1:
        return "its weight is tied to another module's: trained in full"
    if "forward" in vars(module):
        return "its forward was replaced (device_map offloading hooks, say): trained in full"
    return None


def _heads(model: nn.Module) -> set[int]:
    """Ids of the modules that "all-linear" leaves out: the output embeddings, else a classification head."""
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


def _is_all_linear(patterns) -> bool:
    return isinstance(patterns, str) and patterns.lower().replace("_", "-") == ALL_LINEAR


def _as_peft(patterns):
    return list(patterns) if isinstance(patterns, tuple) else patterns


def _shown(patterns) -> str:
    return repr(list(patterns) if isinstance(patterns, tuple) else patterns)


def _suffixes(model: nn.Module) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _nothing_matches(model: nn.Module, config: GrassConfig) -> str:
    sentence = (
        f"target_modules={_shown(config.target_modules)} matches no module of {type(model).__name__} with a weight"
    )
    linear = sorted(_suffixes(model))
    if isinstance(config.target_modules, str) and not _is_all_linear(config.target_modules):
        sentence += " (a string is a regular expression for the full name, a list holds suffixes)"
    return f"{sentence}: its linear layers are called {', '.join(linear) or 'nothing, it has none'}."
