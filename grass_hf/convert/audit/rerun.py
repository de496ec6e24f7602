"""Running a forward once more as if it had not run: what it has drawn and written is put back.

Random states are those of Python, NumPy, torch's CPU and the model's devices. Tensors that last (parameters, buffers,
the inputs) are copied at the moment an operation is about to write into them, so that a forward that writes into none
costs no memory.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_VALUES = (Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size, slice)


class NotPlainError(ValueError):
    """An input is an object of its own, which the first forward may have changed."""


class Rerun:
    """What was before a forward.

    Args:
        module: whose forward it is.
        args, kwargs: what it is called with.
    """

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        self.module = module
        self._buffers = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
        self._containers: dict[int, Any] = {}
        self._not_plain: str | None = None
        for value in (*args, *kwargs.values()):
            self._note(value)
        lasting = [*module.parameters(), *module.buffers(), *self._tensors(args), *self._tensors(kwargs)]
        self._lasting: dict[int, list[Tensor]] = {}
        for tensor in lasting:
            if not hasattr(tensor, "__tensor_flatten__"):
                self._lasting.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self._before: list[tuple[Tensor, Tensor]] = []
        self._random = _random_state({tensor.device for tensor in lasting})

    def before(self, schema: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Copy what lasts and is about to be written by an operation of this schema."""
        for place, argument in enumerate(schema.arguments):
            # batch norms write their running means without saying so in their schema
            if not (argument.alias_info and argument.alias_info.is_write) and not argument.name.startswith("running_"):
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    for lasting in self._lasting.pop(tensor.untyped_storage()._cdata, ()):
                        self._before.append((lasting, lasting.detach().clone()))

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The inputs as they were, lists and mappings in them too.

        Raises:
            NotPlainError: an input is something else than tensors, numbers, text and lists and mappings of these.
        """
        if self._not_plain is not None:
            raise NotPlainError(f"its forward has taken a {self._not_plain}, which may have changed in it")
        return (
            tuple(self._containers.get(id(value), value) for value in args),
            {key: self._containers.get(id(value), value) for key, value in kwargs.items()},
        )

    @torch.no_grad()
    def undo(self, output: Any) -> None:
        """Put back all that the forward has changed, and free what its output holds for a backward pass."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None and not tensor._is_view():
                tensor.detach_()
        for tensor, value in self._before:
            tensor.copy_(value)
        for owner, buffers in self._buffers:
            owner._buffers.clear()
            owner._buffers.update(buffers)
        for put_back, state in self._random:
            put_back(state)

    def _note(self, value: Any) -> None:
        copied = self._copied(value)
        if copied is not value:
            # the original is kept too: another object must not get its id
            self._containers[id(value)] = copied
            self._containers.setdefault(-1, []).append(value)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, _VALUES):
            return value
        if type(value) in (list, tuple):
            return type(value)(self._copied(item) for item in value)
        if type(value) is dict:
            return {key: self._copied(item) for key, item in value.items()}
        if isinstance(value, Mapping):  # a tokenizer's batch, a model's output
            for item in value.values():
                self._copied(item)
            return copy.copy(value)
        if type(value).__module__ == "numpy":
            return value
        self._not_plain = self._not_plain or type(value).__name__
        return value

    @staticmethod
    def _tensors(value: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _random_state(devices: set[torch.device]) -> list[tuple[Any, Any]]:
    """Setters and states of everything that a forward may draw from."""
    states: list[tuple[Any, Any]] = [(random.setstate, random.getstate()), (torch.set_rng_state, torch.get_rng_state())]
    if (numpy := sys.modules.get("numpy")) is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            states.append((lambda state, d=device, m=module: m.set_rng_state(state, d), module.get_rng_state(device)))
    return states
