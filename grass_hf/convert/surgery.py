"""Giving modules slices, and taking them away again: all of it or nothing.

Before anything is changed, how to undo it is put on a stack (`contextlib.ExitStack`). What stops in the middle, for
lack of memory or in somebody's ``__setattr__``, is undone from the top, and the model is what it was: classes, flags,
gradients, attributes. Undoing goes around the classes' own ``__setattr__``, which may be what failed.

[Note: int8 undone] Weights are stored in eight bits after all slices are there, the largest first: the peak of memory
is at the first, where there is nothing to undo. The plain ones are kept until the end only as far as they are small
together (`_KEPT`), since memory is what int8 is for; of the others the dequantised values are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..slices.frozen_weight import track, untrack
from ..slices.ops import int8
from ..slices.slice import Slice
from .modules import GrassModule, converted_class, plain_class

logger = logging.getLogger(__name__)

# Bytes of plain weights that are kept to be put back.
_KEPT = 2**30
_ABSENT = object()


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Yields a stack for callbacks that undo; they run, the last one first, if the block does not end well."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


@dataclass(frozen=True)
class Before:
    """What a weight was before it got a slice.

    Attributes:
        requires_grad: its flag.
        int8: whether it was stored in eight bits already.
    """

    requires_grad: bool
    int8: bool


def attach_slice(
    module: nn.Module,
    parameter: str,
    undo: ExitStack,
    *,
    transposed: bool = False,
    sharers: Iterable[nn.Module] = (),
    as_int8: bool = False,
    **settings,
) -> Slice:
    """Give a module's weight an active slice, in place, and freeze the weight.

    Args:
        module: of a kind that `modules.kind_of` knows.
        parameter: name of the weight in it.
        undo: takes what undoes it.
        transposed: the weight is stored (input, output).
        sharers: other modules that use the same weight; they tap into the same slice.
        as_int8: `store_as_int8` is to follow, and brings the class that it needs.
        settings: name, rank, side, weighted, dtype and phase, see `Slice`.
    """
    weight: nn.Parameter = getattr(module, parameter)
    attribute = f"{parameter}_slice"
    made = Slice(module, parameter, transposed=transposed, **settings)
    made.before = Before(weight.requires_grad, int8.is_int8(weight))
    # looked up again, because it may be another object by then
    undo.callback(_set_gradient, module, parameter, weight.requires_grad, weight.grad)
    weight.requires_grad_(False)
    weight.grad = None
    undo.callback(untrack, weight)
    track(weight)
    if not as_int8:
        _swap(module, undo)
    undo.callback(_remove, module, attribute)
    setattr(module, attribute, made)
    made.drift.note(made)
    for sharer in sharers:
        _swap(sharer, undo)
        # not registered, so that the slice has one name and one place
        undo.callback(_remove, sharer, attribute)
        sharer.__dict__[attribute] = made
    return made


def store_as_int8(weights: Iterable[tuple[nn.Module, str]], undo: ExitStack) -> None:
    """Store weights that have slices in eight bits, see [Note: int8 undone].

    Args:
        weights: modules and the names of the weights in them.
        undo: takes what undoes it.
    """
    kept = 0
    for module, parameter in sorted(weights, key=lambda each: getattr(*each).nbytes, reverse=True):
        plain: nn.Parameter = getattr(module, parameter)
        if not int8.is_int8(plain):
            kept += plain.nbytes
            undo.callback(_put_plain, module, parameter, plain if kept <= _KEPT else None)
            setattr(module, parameter, int8.quantize(plain))
            del plain
        _swap(module, undo)


def detach_slices(module: GrassModule, undo: ExitStack) -> None:
    """Turn a module back into what it was, in place; its weights must be up to date."""
    for slice_ in list(module.own_slices().values()):
        detach_slice(module, slice_, undo)


def detach_slice(module: GrassModule, slice_: Slice, undo: ExitStack) -> None:
    """Take one slice off a module, if it has it, in place; with its last slice gone, the module is of its own class."""
    names = [name for name, own in module.own_slices().items() if own is slice_]
    if not names:
        return
    for name in names:
        if name in module._modules:
            undo.callback(_put_members, module._modules, dict(module._modules))
        else:
            undo.callback(vars(module).__setitem__, name, slice_)
        delattr(module, name)
    weight: nn.Parameter = getattr(module, slice_.parameter)
    undo.callback(track, weight)
    untrack(weight)
    if int8.is_int8(weight) and not slice_.before.int8:
        undo.callback(_put_int8, module, slice_.parameter)
        setattr(module, slice_.parameter, nn.Parameter(int8.dequantize(weight)))
    undo.callback(_set_gradient, module, slice_.parameter, weight.requires_grad, weight.grad)
    # one that was frozen since stays so
    trained = slice_.before.requires_grad and slice_.active.requires_grad
    getattr(module, slice_.parameter).requires_grad_(trained)
    if not module.own_slices():
        _set_class(module, plain_class(module), undo)


def set_attribute(owner: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    """Set a plain attribute of a module."""
    undo.callback(_put_attribute, owner, name, vars(owner).get(name, _ABSENT))
    setattr(owner, name, value)


def remove_attribute(owner: nn.Module, name: str, undo: ExitStack) -> None:
    """Remove a plain attribute of a module."""
    undo.callback(_put_attribute, owner, name, vars(owner)[name])
    delattr(owner, name)


def _swap(module: nn.Module, undo: ExitStack) -> None:
    if not isinstance(module, GrassModule):
        cls = converted_class(module)
        assert cls is not None  # `targets.plan` leaves others out
        _set_class(module, cls, undo)


def _set_class(module: nn.Module, cls: type[nn.Module], undo: ExitStack) -> None:
    undo.callback(object.__setattr__, module, "__class__", type(module))
    module.__class__ = cls


def _set_gradient(module: nn.Module, parameter: str, requires_grad: bool, grad: Tensor | None) -> None:
    weight: nn.Parameter = getattr(module, parameter)
    weight.requires_grad_(requires_grad)
    weight.grad = grad


def _put_members(members: dict[str, Any], before: dict[str, Any]) -> None:
    members.clear()
    members.update(before)  # in their order


def _remove(module: nn.Module, attribute: str) -> None:
    module._modules.pop(attribute, None)
    module.__dict__.pop(attribute, None)


@torch.no_grad()
def _put_plain(module: nn.Module, parameter: str, plain: nn.Parameter | None) -> None:
    weight: nn.Parameter = getattr(module, parameter)
    if plain is None and not int8.is_int8(weight):
        return
    if plain is None:
        logger.warning(
            "%s of a %s was stored in eight bits when the conversion failed, and keeps its rounded values: load the "
            "model again before you convert it without weight_dtype.",
            parameter,
            type(module).__name__,
        )
        plain = nn.Parameter(int8.dequantize(weight))
    module._parameters[parameter] = plain


def _put_int8(module: nn.Module, parameter: str) -> None:
    weight: nn.Parameter = getattr(module, parameter)
    if not int8.is_int8(weight):  # finds the same codes: [Note: lossless export] in `grass_hf.slices.ops.int8`
        module._parameters[parameter] = int8.quantize(weight)


def _put_attribute(owner: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value
