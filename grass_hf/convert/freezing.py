"""A weight that is frozen by name, or by itself, after its conversion: its slice is frozen with it.

A weight with a slice is frozen already, and ``weight.requires_grad = False`` would change nothing, while its slice
trains on. So a `FrozenWeight` tells when its flag is set, whenever that is, and the slice gets the same flag; its rows
get no weight decay either then. Setting it to True again lets the slice train again. An optimizer that is made after
that refuses slices that are frozen (`grass_hf.optim.factory`).
"""

from __future__ import annotations

import functools
import logging
import re

from torch import nn

from ..slices.frozen_weight import FrozenWeight
from ..slices.slice import living_slices, slices_made
from .record import conversion_over

logger = logging.getLogger(__name__)


def watch_flags() -> None:
    """Follow the flags of all frozen weights of this process from now on."""
    FrozenWeight.flagged = _follow


def _follow(weight: nn.Parameter, requires_grad: bool) -> None:
    for slice_ in living_slices():
        if slice_.owner._parameters.get(slice_.parameter) is weight and slice_.active.requires_grad != requires_grad:
            slice_.active.requires_grad_(requires_grad)
            conversion = conversion_over([slice_])
            if conversion is not None and conversion.driver is not None:  # others, reference models say, train nothing
                _say(re.sub(r"\d+", "*", slice_.state.name), requires_grad, slices_made())


@functools.cache
def _say(kind: str, requires_grad: bool, conversions: int) -> None:
    if requires_grad:
        logger.warning("%s is trained again: its weight was made trainable, and its slice with it.", kind)
    else:
        logger.warning(
            "%s is not trained from now on: its weight was frozen after the conversion, and its slice with it. "
            "requires_grad_(True) lets both be trained again.",
            kind,
        )
