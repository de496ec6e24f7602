"""What patterns of module names mean for a model.

Patterns have PEFT's meaning and are matched by PEFT's own function: a list holds name suffixes, a string is a regular
expression for the full module name. Two names stand for patterns: "all-linear" is every linear layer, Conv1D and
expert but the output head, "all-matrices" adds the head and the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..config.fields import check_expression, unknown_key
from ..config.settings import GrassConfig
from ..slices.ops import products
from . import experts
from .modules import kind_of

# What the two named patterns take, by the names of `kind.Kind`.
PRESETS = {
    "all-linear": {"linear", "Conv1D", "experts"},
    "all-matrices": {"linear", "Conv1D", "experts", "embedding"},
}

# The end of a layer's name once PEFT has wrapped it.
BASE = ".base_layer"


@dataclass(frozen=True)
class Use:
    """A weight in a module: the module's (for experts, the parameter's) qualified name, and where it is."""

    name: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)


def uses(model: nn.Module) -> Iterator[Use]:
    """Every weight that a pattern may name."""
    for name, module in model.named_modules():
        if experts.is_experts(module):
            yield from (Use(f"{name}.{leaf}".lstrip("."), module, leaf) for leaf in experts.parameters(module))
        elif found := products.layouts(module):
            leaves = [name if leaf == "weight" else f"{name}.{leaf}".lstrip(".") for leaf in found]
            yield from (Use(leaf_name, module, leaf) for leaf_name, leaf in zip(leaves, found, strict=True))
        # A list of suffixes or a regular expression may name containers too ("mlp"): only weights can be targets, and
        # not what shows a weight that lies in a layer within, as PEFT's layers do (``q_proj``, ``q_proj.base_layer``).
        elif name and isinstance(module._parameters.get("weight"), nn.Parameter):
            yield Use(name, module, "weight")


def matched_uses(model: nn.Module, config: GrassConfig) -> tuple[list[Use], set[str]]:
    """What the patterns name, and the names that are excluded."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    _check_regular_expressions(config)
    preset = preset_name(config.target_modules)
    heads = output_heads(model) if preset == "all-linear" else set()
    # Only the carrier of the patterns; nothing of LoRA is used.
    patterns = LoraConfig(
        target_modules=".*" if preset else _as_peft(config.target_modules),
        exclude_modules=_as_peft(config.exclude_modules),
    )

    def check(use: Use) -> object:
        # experts go by their module's name too, and what PEFT has wrapped by the name that it had before
        names = {use.name, use.name if use.parameter == "weight" else use.name.rpartition(".")[0]} - {""}
        names |= {name.removesuffix(BASE) for name in names}
        results = [check_target_module_exists(patterns, name) for name in sorted(names)]
        return next((r for r in results if _is_excluded(r)), any(results))

    matched, excluded, names = [], set(), []
    for use in uses(model):
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
            f"exclude_modules={shown(config.exclude_modules)} matches no module of {type(model).__name__}: remove "
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


def output_heads(model: nn.Module) -> set[int]:
    """Ids of the output embeddings, or else of a classification head."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return set()
    head = get()
    if head is None:
        return {id(getattr(model, name, None)) for name in SEQ_CLS_HEAD_NAMES}
    # PEFT wraps a head that an adapter, or a copy for `modules_to_save`, belongs to
    copies = getattr(head, "modules_to_save", None)
    inner = [*(copies.children() if isinstance(copies, nn.ModuleDict) else ())]
    inner += [getattr(head, name, None) for name in ("base_layer", "original_module")]
    return {id(head), *(id(module) for module in inner if module is not None)}


def _check_regular_expressions(config: GrassConfig) -> None:
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str):
            check_expression(field, pattern)


def preset_name(patterns) -> str | None:
    """Which of the two named patterns it is, None for suffixes or a regular expression."""
    name = patterns.lower().replace("_", "-") if isinstance(patterns, str) else None
    return name if name in PRESETS else None


def _as_peft(patterns):
    return list(patterns) if isinstance(patterns, tuple) else patterns


def shown(patterns) -> str:
    return repr(list(patterns) if isinstance(patterns, tuple) else patterns)


def _suffixes(model: nn.Module) -> set[str]:
    linear = (use.name for use in uses(model) if _in_preset(use, "all-linear", set()))
    return {name.removesuffix(BASE).rsplit(".", 1)[-1] for name in linear}


def _nothing_matches(model: nn.Module, config: GrassConfig) -> str:
    sentence = (
        f"target_modules={shown(config.target_modules)} matches no module of {type(model).__name__} with a weight"
    )
    linear = sorted(_suffixes(model))
    if isinstance(config.target_modules, str) and not preset_name(config.target_modules):
        sentence += " (a string is a regular expression for the full name, a list holds suffixes)"
    return f"{sentence}: its linear layers are called {', '.join(linear) or 'nothing, it has none'}."
