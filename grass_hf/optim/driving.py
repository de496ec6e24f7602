"""The class of an optimizer that drives slices.

An optimizer drives slices because of its class: it becomes an instance of a subclass of its own class, which is made
once for each, as modules do when they are converted. So copies drive too: `copy.deepcopy` and pickle keep an object's
class, and lose what was put on one instance.

    GrassAdamW.step:  controller.around(AdamW.step)          what happens before and after a step
    state_dict, load_state_dict, zero_grad:                  the rest of what the controller must know of

An optimizer that holds slices and does not drive them is stopped by `grass_hf.convert.undriven`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .controller_protocol import Controller


def controller_of(optimizer: Any) -> Controller:
    """The controller of an optimizer that drives slices."""
    return optimizer.grass


# The class beside which the mixin stands, to a reader of types; when it runs `driving_class` puts it there.
if TYPE_CHECKING:
    _Optimizer = torch.optim.Optimizer
else:
    _Optimizer = object


class Driving:
    """Mixin of whatever takes the steps that count for slices: an optimizer, or an engine's object that has one.

    Attributes:
        grass: its `GrassController`.
    """

    grass: Controller
    drives_slices = True

    def step(self, *args: Any, **kwargs: Any) -> Any:
        plain: Any = plain_class(self)
        original = functools.partial(plain.step, self)
        return self.grass.around(original, *args, **kwargs) if self.grass.follows(self) else original(*args, **kwargs)

    # torch wraps the step of a class that has not said this, and would run its hooks twice
    step.hooked = True  # type: ignore[attr-defined]  # a function takes any attribute


class DrivingOptimizer(Driving, _Optimizer):
    """Mixin of a `torch.optim.Optimizer` that drives slices."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=set_to_none)
        if self.grass.follows(self):
            # norms observed belong to the gradients: a step whose gradients are dropped leaves none behind
            self.grass.forget_norms()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return self.grass.saved(state) if self.grass.follows(self) else state

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if not self.grass.follows(self):
            super().load_state_dict(state_dict, *args, **kwargs)
            return
        super().load_state_dict(self.grass.loading(state_dict), *args, **kwargs)
        self.grass.loaded(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # a controller of its own, also for copy.copy
        return {**super().__getstate__(), "grass": copy.copy(self.grass)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = {key: value for key, value in state.items() if key != "grass"}
        super().__setstate__(rest)
        if "grass" in state:
            self.grass = state["grass"]
            self.grass.belongs_to(self)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the classes are made as they are needed, so pickle is told how to make them
        return _new, (plain_class(self),), self.__getstate__()


@functools.cache
def driving_class(plain: type) -> type:
    """The subclass of an optimizer's class (or of an engine's) whose instances drive slices."""
    mixin = DrivingOptimizer if issubclass(plain, torch.optim.Optimizer) else Driving
    # the module's name stays: by it the Trainer recognises bitsandbytes
    return type(f"Grass{plain.__name__}", (mixin, plain), {"__module__": plain.__module__})


def after_closure(check: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], bool]:
    """The arguments of a step, in which a closure is followed by a check, since it is what makes the gradients; and
    whether there is a closure."""
    closure = kwargs["closure"] if "closure" in kwargs else args[0] if args else None
    if not callable(closure):
        return args, kwargs, False

    def checked(*inner: Any, **named: Any) -> Any:
        result = closure(*inner, **named)
        check()
        return result

    if "closure" in kwargs:
        return args, {**kwargs, "closure": checked}, True
    return (checked, *args[1:]), kwargs, True


@contextlib.contextmanager
def undriven(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have an optimizer of its plain class, for an engine that compares classes."""
    driving, optimizer.__class__ = type(optimizer), plain_class(optimizer)
    try:
        yield
    finally:
        optimizer.__class__ = driving


def plain_class(optimizer: object) -> type:
    """The class that an optimizer had before it drove slices, and has if it drives none."""
    cls = type(optimizer)
    return cls.__mro__[cls.__mro__.index(Driving) + 1] if isinstance(optimizer, Driving) else cls


def _new(plain: type) -> torch.optim.Optimizer:
    made: Any = driving_class(plain)
    return made.__new__(made)
