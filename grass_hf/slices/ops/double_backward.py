"""Gradients of gradients stop: a slice knows the gradient of the loss, and nothing of how that depends on the weights.

A penalty on gradients (of the inputs, of the parameters), a Hessian or forces that are fitted differentiate what a
backward pass has computed. The weight is frozen, so its part in it would be missing without a sign. Computing with
``create_graph=True`` and going no further is no such case: only the second differentiation stops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once(values: Tensor) -> Tensor:
    """What a backward pass returns, of any shape and dtype, such that it cannot be differentiated any further."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return values  # no create_graph; a compiled backward pass cannot be differentiated anyway
    return _Once.apply(values, torch.empty(0, requires_grad=True))  # also where the values depend on nothing else


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, _: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor):
        raise RuntimeError(
            "the loss depends on gradients of the model (create_graph=True: a gradient penalty, a Hessian, fitted "
            "forces), and Grass does not know how these depend on the weights that have slices: leave that part out of "
            "the loss, or call restore_model(model) and train the model in full."
        )


def refuse_transforms() -> None:
    """Stop inside the transforms of `torch.func`, which look for gradients by their own means.

    Raises:
        RuntimeError: one of them (vmap, grad, jvp and so on) runs.
    """
    if is_transformed():
        raise RuntimeError(
            "torch.func (vmap, grad, jvp, jacrev and so on) runs this model, and gradients of slices do not pass "
            "through it: call the model itself and loss.backward(), use torch.no_grad() around a vmap that needs no "
            "gradients, or call restore_model(model) first."
        )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs now."""
    return torch._C._functorch.peek_interpreter_stack() is not None
