"""Who runs an operation, as Python's own stack tells it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, cast

from torch import nn
from torch.autograd import Function

from ..modules import GrassModule, classes_made

_APPLY = cast(Any, Function.apply).__func__.__code__
# of the functions that stand around what torch.compile has made
_COMPILED = "/torch/_dynamo/eval_frame.py"
# of the forwards that torch.fx writes
_TRACED = "<eval_with_key>"


def caller(uses: Callable[[Any], bool], *, certain: bool = False) -> tuple[bool, bool]:
    """Who runs an operation on a weight.

    Args:
        uses: says whether an object is one of the modules that have the weight.
        certain: leave out functions that may run under `no_grad`, and reentrant checkpoints, which run again later.

    Returns:
        Whether one of these modules makes its tapped product; and whether an autograd function runs whose gradients are
        recorded, inside of which gradients are off though one is wanted.
    """
    tapped, is_recorded = _tapped(classes_made()), False
    below: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _APPLY:
            is_recorded = is_recorded or _records(below, certain)
        elif code in tapped and uses(frame.f_locals.get("self")):
            return True, is_recorded
        below, frame = frame, frame.f_back
    return False, is_recorded


def in_compiled() -> bool:
    """Whether what torch.compile, torch.export or torch.fx has made runs, of whose modules nothing is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_TRACED):
            return True
        if frame.f_code.co_filename.replace("\\", "/").endswith(_COMPILED):
            context = frame.f_locals.get("self")
            # such a one stands around what is not to be compiled, a checkpoint say
            if context is not None and type(context).__name__ != "DisableContext":
                return True
        frame = frame.f_back
    return False


def _records(forward: FrameType | None, certain: bool) -> bool:
    """Whether autograd records the function whose forward this is.

    Nothing follows it in backward under `no_grad`, nor where it is given nothing that requires a gradient: frozen
    weights alone, which would require one without Grass. The two are told apart only where something does.
    """
    if forward is None or not forward.f_code.co_varnames:
        return True
    context = forward.f_locals.get(forward.f_code.co_varnames[0])
    if isinstance(context, tuple) and context:  # a decorator that hands its arguments on
        context = context[0]
    if certain and type(context).__name__ == "CheckpointFunctionBackward":
        return False
    if getattr(context, "next_functions", None) != ():
        return True
    return not certain and not any(getattr(context, "needs_input_grad", None) or ())


@functools.lru_cache(maxsize=1)
def _tapped(classes: int) -> set[CodeType]:
    """The code of the forwards around which a product is tapped, of so many classes."""
    kinds = GrassModule.__subclasses__()
    found, package = set(), __name__.partition(".")[0]
    while kinds:
        kind = kinds.pop()
        if kind.__module__.startswith(package) and "forward" in vars(kind):
            found.add(inspect.unwrap(kind.forward).__code__)
        kinds += kind.__subclasses__()
    return found


def has(module: Any, weight: nn.Parameter) -> bool:
    """Whether an object is a module that has a weight."""
    return isinstance(module, nn.Module) and any(each is weight for each in module._parameters.values())
