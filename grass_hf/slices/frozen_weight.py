"""A frozen weight that notes where its values may be changed without a mark; see `grass_hf.slices.drift`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# torch's own property, to which a class of torch's has no annotation
_DATA: Any = Tensor.data


class FrozenWeight(nn.Parameter):
    """A weight that knows whether somebody has asked for its ``.data``, through which it changes without a mark."""

    touched, reads = False, 0  # and how often, for `slices.changes`

    @property
    def data(self) -> Tensor:
        self.touched = True
        self.reads += 1
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.touched = True
        self.reads += 1
        _DATA.__set__(self, value)


def track(weight: nn.Parameter) -> None:
    """Note from now on who asks for a weight's ``.data``; parameters of other classes are left as they are."""
    if type(weight) is nn.Parameter:
        weight.__class__ = FrozenWeight


def untrack(weight: nn.Parameter) -> None:
    """Undo `track`."""
    if type(weight) is FrozenWeight:
        vars(weight).pop("reads", vars(weight).pop("touched", None))
        weight.__class__ = nn.Parameter  # type: ignore[assignment]  # what it was before `track`
