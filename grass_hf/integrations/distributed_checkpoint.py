"""Where grass-hf meets torch.distributed.checkpoint, whose loader and saver walk a model's parameters.

Its state dicts of models are `nn.Module.state_dict()`, in which slices are not, and two of its options ask more of
them. Loading strictly through a wrapper (DDP, torch.compile) it wants a value for every parameter by name; and saving
without what is frozen (accelerate does so for adapters) it leaves out the weights that slices train.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from ..slices.doors import KEY
from ..slices.frozen_weight import keep_frozen
from ..slices.slice import Slice


def load_model_state(original: Callable, names_of: Callable) -> Callable:
    """torch's ``_load_model_state_dict``, which finds a value for every slice; the slice takes its weight's.

    Args:
        original: of torch.
        names_of: torch's ``_get_fqns``, the names of a parameter without wrappers' prefixes.
    """

    @functools.wraps(original)
    def load(model: nn.Module, state_dict: dict[str, Any], info: Any) -> Any:
        if not state_dict or not info.strict:
            return original(model, state_dict, info)
        named = [f"{name}.{KEY}" for name, module in model.named_modules() if isinstance(module, Slice)]
        plain = {key for name in named for key in names_of(model, name)}
        # no tensor, so that nothing of it is sent
        state_dict.update(dict.fromkeys(plain - state_dict.keys(), 0))
        try:
            return original(model, state_dict, info)
        finally:
            for key in plain.union(named):  # it has put the wrappers' names in the plain ones' places
                if isinstance(state_dict.get(key), int):
                    del state_dict[key]

    return load


def get_model_state(original: Callable) -> Callable:
    """torch's ``_get_model_state_dict``, to which weights that are trained by a slice are not frozen."""

    @functools.wraps(original)
    def get(model: nn.Module, info: Any) -> Any:
        with _thawed(model) if info.ignore_frozen_params else nullcontext():
            return original(model, info)

    return get


@contextmanager
def _thawed(model: nn.Module) -> Iterator[None]:
    weights = [module.weight for module in model.modules() if isinstance(module, Slice)]
    for weight in weights:
        keep_frozen(weight, True)
    try:
        yield
    finally:
        for weight in weights:
            keep_frozen(weight)
