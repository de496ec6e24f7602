"""TRL's own walks over a model's parameters, shown the plain ones.

`SyncRefModelCallback` pairs the parameters of the trained model with those of a reference model, `BEMACallback` with
those of a new model of the same class, and vLLM is sent every parameter by its name. A converted model has slices
between its weights, and its weights count as frozen. While these walk over it, a converted model therefore names what
the plain model would: its weights, trainable, under their names, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.conversion import grass_slices, is_converted
from ..convert.modules import GrassModule
from ..slices.ops.int8 import dequantize, is_int8
from ..slices.ops.sharding import is_partitioned
from .marks import is_marked, marked


@contextmanager
def plain_parameters(model: nn.Module) -> Iterator[None]:
    """Have a model name its parameters and its state dict as if it were not converted.

    A compressed weight comes as another parameter over the same memory, which counts as trainable. One stored as int8
    has no plain memory: it comes as a copy.
    """
    if not is_converted(model):
        yield
        return
    cls: Any = type(model)
    model.__class__ = _plain_class(cls)
    try:
        yield
    finally:
        model.__class__ = cls


@functools.cache
def _plain_class(cls: Any) -> Any:
    class Plain(cls):
        def __new__(_, *args, **kwargs):
            return cls(*args, **kwargs)  # a new model of "the same class" is an ordinary one

        def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
            slices = list(grass_slices(self))
            actives = {id(slice_.active) for slice_ in slices}
            weights = {id(slice_.weight) for slice_ in slices}
            for name, param in super().named_parameters(*args, **kwargs):
                if id(param) not in actives:
                    yield name, _trainable(param) if id(param) in weights else param

        def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
            whole = super().state_dict(*args, **kwargs)
            for key in [key for key in whole if is_slice_key(key)]:
                del whole[key]
            return whole

    Plain.__name__, Plain.__qualname__, Plain.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Plain


def _trainable(weight: nn.Parameter) -> nn.Parameter:
    if is_partitioned(weight):
        return weight  # DeepSpeed gathers this one only
    return nn.Parameter(dequantize(weight) if is_int8(weight) else weight.detach())


def is_slice_key(name: str) -> bool:
    """Whether a name in a converted model is a slice's."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "active" and parent.endswith("_slice")


def extend_callbacks(callbacks: ModuleType) -> None:
    """Have TRL's callbacks walk over plain parameters."""
    sync, bema = callbacks.SyncRefModelCallback, callbacks.BEMACallback
    if is_marked(sync._sync_target_model):
        return
    sync._sync_target_model = staticmethod(_sync(sync._sync_target_model))
    bema.on_train_begin = _begin_average(bema.on_train_begin)


def _sync(original):
    @functools.wraps(original)
    def _sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        with plain_parameters(model), plain_parameters(target_model):
            original(model, target_model, alpha)
        for slice_ in grass_slices(target_model):  # a reference that was copied from a converted model
            slice_.reload()

    return marked(_sync_target_model)


def _begin_average(original):
    @functools.wraps(original)
    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs: Any):
        inner = self._unwrap_model(model)
        for name, module in inner.named_modules():
            slices = module.own_slices().values() if isinstance(module, GrassModule) else ()
            if any(is_int8(slice_.weight) for slice_ in slices):
                raise ValueError(
                    f"{type(self).__name__} keeps the trained weights at hand, and {name} is stored as int8: leave "
                    "weight_dtype='int8' out, or the callback."
                )
        with plain_parameters(inner):
            return original(self, args, state, control, model=model, **kwargs)

    return on_train_begin


def extend_vllm(generation: ModuleType) -> None:
    """Have TRL send vLLM the weights only."""
    cls = generation.VLLMGeneration
    original = cls._iter_named_params
    if is_marked(original):
        return

    @functools.wraps(original)
    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in original(self):
            if not is_slice_key(name):
                yield name, dequantize(param) if is_int8(param) else param

    cls._iter_named_params = marked(_iter_named_params)


def plain_walk(original):
    """Have a function that walks over a model's parameters see the plain ones, while it walks."""

    @functools.wraps(original)
    def walk(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        with plain_parameters(model):
            yield from original(model)

    return marked(walk)


def extend_online_dpo(trainer_module: ModuleType) -> None:
    """Have OnlineDPO send vLLM the weights only: it walks over the parameters itself."""
    cls = trainer_module.OnlineDPOTrainer
    original = cls._move_model_to_vllm_inner
    if is_marked(original):
        return

    @functools.wraps(original)
    @torch.no_grad()  # what it reads of weights is in no loss
    def _move_model_to_vllm_inner(self) -> None:
        with plain_parameters(self.model):
            original(self)

    cls._move_model_to_vllm_inner = marked(_move_model_to_vllm_inner)
