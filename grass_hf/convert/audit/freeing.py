"""Taking slices off again: their weights are ordinary parameters from then on, trained in full.

This is for weights that the model reads without calling the module that has them (`convert.audit.weight_reads`): a
slice sees only the gradients of products that its own modules make.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from ...slices.slice import Slice
from ..modules import GrassModule
from ..record import conversion_of
from ..surgery import all_or_nothing, detach_slice
from .exclusion import summary

logger = logging.getLogger(__name__)

READ = "read by its model without calling the module: trained in full"


def free(model: nn.Module, slices: Iterable[Slice], reason: str = READ) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Take slices off a converted model, in place; what their rows are owed must have been settled.

    Args:
        model: the converted model itself.
        slices: some of its slices.
        reason: why, for `Conversion.left_out`.

    Returns:
        The slice's parameter and the weight that is trained in its place, for each.
    """
    gone = set(slices)
    modules = [module for module in model.modules() if isinstance(module, GrassModule)]
    pairs = []
    with all_or_nothing() as undo:
        for slice_ in sorted(gone, key=lambda slice_: slice_.state.name):
            for module in modules:
                if isinstance(module, GrassModule):  # it may have lost its last slice
                    detach_slice(module, slice_, undo)
            slice_.weight.requires_grad_(slice_.active.requires_grad)
            pairs.append((slice_.active, slice_.weight))
    conversion_of(model).left_out.update((slice_.state.name, reason) for slice_ in gone)
    _hand_on_leadership(model, {slice_.state.name for slice_ in gone})
    return pairs


def freed(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that were freed because their model reads them without calling their modules, by name."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    names = sorted(name for name, reason in conversion_of(model).left_out.items() if reason == READ)
    return {name: weights[name if name in weights else f"{name}.weight"] for name in names}


def say(slices: Iterable[Slice]) -> None:
    """Tell once which weights are trained in full."""
    names = [slice_.state.name for slice_ in slices]
    logger.warning(
        "%d weight(s) are read by their model without calling the module, where no slice sees their gradient: they are "
        "trained in full, as ordinary parameters: %s.",
        len(names),
        summary(names),
    )


def _hand_on_leadership(model: nn.Module, gone: set[str]) -> None:
    """Slices that chose rows together with one that is gone choose by the name of the first that is left."""
    heirs: dict[str, str] = {}
    for slice_ in model.modules():
        if isinstance(slice_, Slice) and slice_.state.leader in gone:
            slice_.state.leader = heirs.setdefault(slice_.state.leader, slice_.state.name)
