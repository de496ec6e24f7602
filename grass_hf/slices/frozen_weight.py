"""A frozen weight that notes where its values may be changed without a mark; see `grass_hf.slices.drift`.

[Note: operations shown] Whoever asks (`show_operations`) is shown every operation that is given such a weight, through
``__torch_function__``. That stands on the class and is torch's own "nothing to do" otherwise, so it costs nothing then.
What torch.compile traces always finds "nothing to do": the weight is an ordinary parameter to it, whether somebody
looks or not, and nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# torch's own property, to which a class of torch's has no annotation
_DATA: Any = Tensor.data
_NOTHING: Any = torch._C._disabled_torch_function_impl


class FrozenWeight(nn.Parameter):
    """A weight that knows whether somebody has asked for its ``.data``, through which it changes without a mark.

    Attributes:
        flagged: told of every weight whose ``requires_grad`` is set, and of the new value; `grass_hf.convert.freezing`.
    """

    touched, reads = False, 0  # and how often, for `slices.changes`
    flagged: Callable[[nn.Parameter, bool], None] | None = None
    __torch_function__: Any = _NOTHING

    @property
    def data(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self.detach()  # torch's own property cannot be traced; what a graph writes leaves a mark
        self.touched = True
        self.reads += 1
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.touched = True
        self.reads += 1
        _DATA.__set__(self, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "requires_grad" and FrozenWeight.flagged is not None:
            FrozenWeight.flagged(self, bool(value))

    def requires_grad_(self, requires_grad: bool = True) -> FrozenWeight:
        super().requires_grad_(requires_grad)
        if FrozenWeight.flagged is not None:
            FrozenWeight.flagged(self, requires_grad)
        return self


class _Shown:
    """Hands operations to somebody who looks, but for those that torch.compile traces."""

    def __init__(self, look: Callable[..., Any]):
        self._look = look

    def __get__(self, weight: Any, cls: type) -> Any:
        return self._look if torch._guards.TracingContext.try_get() is None else _NOTHING


def show_operations(look: Callable[..., Any] | None) -> None:
    """Have every operation on a frozen weight carried out by a function, or by torch again.

    Args:
        look: ``(func, types, args, kwargs)``, as ``__torch_function__``; None ends it.
    """
    FrozenWeight.__torch_function__ = _NOTHING if look is None else _Shown(look)


def track(weight: nn.Parameter) -> None:
    """Note from now on who asks for a weight's ``.data``; parameters of other classes are left as they are."""
    if type(weight) is nn.Parameter:
        weight.__class__ = FrozenWeight


def untrack(weight: nn.Parameter) -> None:
    """Undo `track`."""
    if type(weight) is FrozenWeight:
        vars(weight).pop("reads", vars(weight).pop("touched", None))
        weight.__class__ = nn.Parameter  # type: ignore[assignment]  # what it was before `track`


def keep_frozen(weight: nn.Parameter, requires_grad: bool = False) -> None:
    """Set a weight's ``requires_grad`` and tell nobody: it says nothing about its slice."""
    Tensor.requires_grad_(weight, requires_grad)
