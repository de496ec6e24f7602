"""What a module is to Grass, if its weights can be compressed; `modules.kind_of` finds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Kind:
    """A kind of module that can be converted.

    Attributes:
        name: for people.
        base: the class whose forward makes the product; None where the mixin replaces forward.
        mixin: the converted class's own part, a `modules.GrassModule`.
        transposed: the weight is stored (input, output).
    """

    name: str
    base: type[nn.Module] | None
    mixin: type[nn.Module]
    transposed: bool
