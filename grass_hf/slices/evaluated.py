"""Whether what is evaluated and saved is what is trained.

Both use the weights, and a slice may have been moved without them: an average of parameters, or weights clipped
after a step, touch what has ``requires_grad``. A training forward pass that follows is stopped by `slices.drift`;
this is for the end of training, and for an average that is put in place for an evaluation and taken out again.

[Note: averages that copy what is frozen] Such an average (diffusers' EMAModel) overwrites weights with what they were
and slices with averages, so that both have new marks. Whether a weight is an average too shows in a row that left the
slice at the last selection: it was trained while the average was made, and its values stay what they are until the next
selection. Are they still these, and slice and weight differ, then the weight was not averaged.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .drift import agree, comparable, fits, moved, weight_changed, weight_of
from .ops import sharding
from .ops.bits import fingerprint
from .ops.double_backward import is_transformed

if TYPE_CHECKING:
    from .slice import Slice

logger = logging.getLogger(__name__)


def check_after_evaluation(slice_: Slice) -> None:
    """Let the next training forward pass compare values: weights may have been swapped for the evaluation.

    Raises:
        RuntimeError: as `check_use`.
    """
    record = slice_.drift
    if not slice_.training and not torch.compiler.is_compiling() and not is_transformed():
        first, record.look = not record.look, True
        if first:
            check_use(slice_)


def warn_of_parting(slice_: Slice) -> None:
    """Say before a weight is saved that its slice was changed alone; no error: weights must stay within reach."""
    if _moved_alone(slice_):
        logger.warning("%s", _said(slice_))


def check_use(slice_: Slice) -> None:
    """Look before the first evaluation after a training forward pass.

    Raises:
        RuntimeError: the slice was changed alone, by an average that is put into what is trained, say.
    """
    if _moved_alone(slice_):
        raise RuntimeError(_said(slice_))


def follow_weight(slice_: Slice) -> bool:
    """Let a slice take its weight's values wherever they differ; whether it had been moved by itself.

    For the end of training, where the weight is what the model computes with.
    """
    record, weight = slice_.drift, weight_of(slice_)
    if not comparable(slice_, weight) or (fits(slice_, weight) and agree(slice_, record)):
        return False
    alone = moved(slice_, record) == {"slice"}
    slice_.state.owed = 1.0
    if fits(slice_, weight):
        slice_.reload()
    return alone


def follow_edited(slice_: Slice) -> None:
    """Let a slice follow a weight that was changed after the last forward pass, before it is written back."""
    record = slice_.drift
    if record.marks is not None and not sharding.is_sharded(slice_.active) and weight_changed(slice_, record):
        owed = slice_.state.owed
        edited = comparable(slice_, weight_of(slice_)) and fits(slice_, weight_of(slice_))
        edited = edited and slice_.rank_part(slice_, False).partly_agrees()
        follow_weight(slice_)
        slice_.state.owed = owed if edited else slice_.state.owed


def _moved_alone(slice_: Slice) -> bool:
    record, weight = slice_.drift, slice_.owner._parameters.get(slice_.parameter)
    if weight is None or record.marks is None or record.near or sharding.is_sharded(slice_.active):
        return False
    with _disable_current_modes():
        parted = moved(slice_, record)
        if "weight" in parted and record.left is None:
            return False
        if not comparable(slice_, weight) or not fits(slice_, weight) or agree(slice_, record):
            return False
        return "weight" not in parted or _holds_what_it_held(slice_)


def _holds_what_it_held(slice_: Slice) -> bool:
    """Whether a weight that was overwritten has its old values; see [Note: averages that copy what is frozen]."""
    if slice_.drift.left is None or slice_.rank_part(slice_, False).partly_agrees():  # it was edited
        return False
    row, held = slice_.drift.left
    return fingerprint(weight_of(slice_).detach().select(slice_.dim, row)) == held


def _said(slice_: Slice) -> str:
    return (
        f"the slice of {slice_.state.name} was changed and its weight was not, so what is evaluated and saved is not "
        "what the slice holds: something moves the parameters that are trained (an average of parameters that leaves "
        "out or copies those without requires_grad, Lookahead, weights that are clipped). Let it move the weights: "
        "average model.state_dict(), or use torch.optim.swa_utils.AveragedModel(model); change module.weight, "
        "which the slice follows."
    )
