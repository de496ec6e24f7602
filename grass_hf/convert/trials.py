"""Trials of a module's forward on two tokens, before it is converted; see [Note: where the tap goes] in modules.py."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor

from .kind import Kind

# What says nothing about a module that is tried: memory, and the estimator's fake tensors, which have no values.
_NOTHING_SAID = (torch.OutOfMemoryError, MemoryError, DataDependentOutputException, DynamicOutputShapeException)


def _trial(module: Any, kind: Kind) -> Tensor:
    weight: Tensor = module.weight
    if isinstance(module, nn.Embedding):
        return torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    features = weight.shape[0 if kind.transposed else 1]
    values = torch.linspace(-1.0, 1.0, 2 * features, device=weight.device)
    return values.view(1, 2, features).to(weight.dtype)


@torch.no_grad()
def reaches(module: nn.Module, kind: Kind) -> bool:
    """Whether the module's forward calls its base class's."""
    cls, reached = type(module), []

    class Listener(kind.base):  # type: ignore[name-defined]  # a class that is known when this runs
        def forward(self, input):
            reached.append(True)
            return super().forward(input)

    module.__class__ = type(cls.__name__, (cls, Listener), {})
    try:
        module(_trial(module, kind))
    except _NOTHING_SAID:
        raise
    except Exception:  # whatever it wants, it is not one input
        return False
    finally:
        module.__class__ = cls
    return bool(reached)


@torch.no_grad()
def computes_product(module: Any, kind: Kind) -> bool:
    """Whether a module that does not call its base class's forward computes the same."""
    x = _trial(module, kind)
    try:
        output = module(x)
    except _NOTHING_SAID:
        raise
    except Exception:
        return False
    if kind.base is nn.Embedding:
        expected = F.embedding(x, module.weight)
    else:
        expected = F.linear(x, module.weight.t() if kind.transposed else module.weight, module.bias)
    return _same(output, expected)


@torch.no_grad()
def agree(module: nn.Module, converted: type, *inputs: Tensor) -> bool:
    """Whether the module computes the same with another class; its own plain forward is the reference."""
    cls = type(module)
    try:
        expected = inspect.unwrap(cls.forward)(module, *inputs)
        module.__class__ = converted
        output = module.forward(*inputs)
    except _NOTHING_SAID:
        raise
    except Exception:
        return False
    finally:
        module.__class__ = cls
    return _same(output, expected)


def _same(output: object, expected: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    if output.is_meta or isinstance(output, FakeTensor):
        return True  # no values to compare; shapes agree
    half = output.dtype in (torch.bfloat16, torch.float16)
    return torch.allclose(output.float(), expected.float(), rtol=0.05 if half else 1e-3, atol=1e-2 if half else 1e-4)
