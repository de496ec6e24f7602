"""Whether a slice and its weight still hold the same values.

[Note: drift] All that Grass does rests on ``weight[index] = write * active``. Optimizers that nobody told of the
slices, averaged or copied models, SAM, a weight that is overwritten: each moves one of the two, or both in its own way,
and training would go on without a sign. So a slice remembers a mark of both tensors from the last moment when they
agreed: version counters and addresses, which cost nothing to read. A training forward pass that finds other marks
compares the values once. If they agree, it takes the new marks (DDP's first broadcast, a move to another device). If
only the weight was changed, the slice follows it. Else training stops.

Not everything leaves a mark: fused optimizers do not count versions up, and neither does what is done to ``.data``. So

* a frozen weight is a `FrozenWeight`, which notes that somebody asked for its ``.data``;
* values are compared whatever the marks say in the forward passes 1, 2, 4, 8, ... and in the first one after an
  evaluation, where weights are swapped and averaged, and where weights are used that no mark was left on: in the first
  evaluation after training, and in a state dict;
* an optimizer that holds a slice and does not drive it is stopped before its first step (`grass_hf.convert.undriven`).

In an ordinary step no value is read and no device is waited for, and a compiled graph has nothing of this. There, and
where parameters are sharded, whose whole tensors come and go, marks are compared before the optimizer's step. A weight
that is overwritten between the passes and the step is followed there too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .frozen_weight import FrozenWeight, track
from .ops import sharding
from .ops.int8 import is_int8
from .ops.rounding import loses_digits
from .part import local_part
from .parted import sentence, warn_of_other_weights

if TYPE_CHECKING:
    from .slice import Slice

logger = logging.getLogger(__name__)


class Drift:
    """What a slice remembers of the last moment when it and its weight agreed.

    Attributes:
        marks: of the slice and of the weight; None where that is not known, as in a copy.
        dtype: of the weight, at that moment.
        passes: training forward passes so far.
        look: whether the next forward pass compares values whatever the marks say.
        seen: whether a forward pass has looked since the last step.
        near: whether they agree but for the weight's rounding.
        left: number of a row (column) that left at the last selection, and the weight's values there, which stay what
            they are until the next; None where that is not known. See `slices.evaluated`.
        sharded: whether parameters are sharded, and marks are compared at steps only; None before the first step.
    """

    def __init__(self):
        self.marks: tuple | None = None
        self.dtype: torch.dtype | None = None
        self.passes = 0
        self.look = self.seen = self.near = False
        self.left: tuple[int, int] | None = None
        self.sharded: bool | None = None

    def __getstate__(self):
        return {**vars(self), "marks": None}  # a copy has tensors of its own

    def forget(self) -> None:
        """Take nothing for granted: values are compared before they are used next."""
        self.marks = None

    def note(self, slice_: Slice, dtype: torch.dtype | None = None) -> None:
        """The slice and its weight agree now; in a coarser dtype than the weight's, if one is given."""
        weight = weight_of(slice_)
        self.marks, self.dtype, self.near = _marks(slice_, weight), dtype or weight.dtype, False
        if getattr(weight, "touched", False):  # FSDP2 gives its parameters the attributes of those before
            weight.touched = False  # type: ignore[attr-defined]  # whatever class FSDP2 gave it

    def note_plain(self, active: Tensor, weight: FrozenWeight, dtype: torch.dtype) -> None:
        """`note` for tensors that are known, of plain classes: after every step."""
        self.marks = active._version, active.data_ptr(), weight._version
        self.dtype, self.near = dtype, False
        if weight.touched:
            weight.touched = False


def check_pass(slice_: Slice) -> None:
    """Look before a training forward pass.

    Raises:
        RuntimeError: the slice and its weight have parted, see [Note: drift].
    """
    record = slice_.drift
    if record.sharded:
        return
    record.seen = True
    record.passes = passes = record.passes + 1
    if record.look or not passes & (passes - 1) or _changed(slice_, record):
        confirm(slice_)


def check_plain_pass(slice_: Slice, active: Tensor, weight: Tensor) -> None:
    """`check_pass` in as few operations as can be, for every layer's every pass.

    Args:
        slice_: the slice.
        active, weight: its parameter, and its weight.

    Raises:
        RuntimeError: as `check_pass`.
    """
    record = slice_.drift
    if type(weight) is not FrozenWeight or type(active) is not nn.Parameter or record.sharded:
        check_pass(slice_)
        return
    record.seen = True
    record.passes = passes = record.passes + 1
    if (
        record.look
        or not passes & (passes - 1)
        or weight.touched
        or record.marks != (active._version, active.data_ptr(), weight._version)
    ):
        confirm(slice_)


def check_step(slices: Iterable[Slice]) -> None:
    """Look before an optimizer's step at slices that no forward pass could look at.

    Raises:
        RuntimeError: as `check_pass`.
    """
    for slice_ in slices:
        record = slice_.drift
        weight, marks = slice_.owner._parameters.get(slice_.parameter), record.marks
        if record.seen and record.sharded is False and type(weight) is FrozenWeight and marks is not None:
            # nearly always: `weight_changed` in as few operations as can be
            record.seen = False
            if weight.touched or weight._version != marks[2]:
                confirm(slice_)
            continue
        if record.sharded is None:
            record.sharded = sharding.is_sharded(slice_.active)
        # what has changed a slice since a forward pass is written back with it; a change of the weight would be lost
        look = weight_changed if record.seen and not record.sharded else _changed
        record.seen = False
        if look(slice_, record):
            confirm(slice_)


def confirm(slice_: Slice) -> None:
    """Compare the values of a slice and its weight; the slice follows a weight that was changed alone.

    Raises:
        RuntimeError: they differ, and the slice was changed.
    """
    # selective checkpointing would take what is computed here for a part of the model, and look for it in backward
    with _disable_current_modes():
        _confirm(slice_)


def _confirm(slice_: Slice) -> None:
    record = slice_.drift
    record.look = False
    weight = weight_of(slice_)
    if not comparable(slice_, weight):
        return
    check_shape(slice_)
    parted = moved(slice_, record)
    if agree(slice_, record):
        if record.dtype not in (None, weight.dtype):
            _warn_of_cast(slice_.active.dtype, record.dtype)
        track(weight)
        # of a model that was cast the slice may hold more digits; the next step writes them back
        record.note(slice_, record.dtype)
        return
    known = record.marks is not None and (len(parted) == 2 or record.near)
    if known and slice_.rank_part(slice_, False).nearly_agrees():
        # weight decay by hand over all parameters of a half-precision model, say; the next step writes the slice back
        record.note(slice_, record.dtype)
        record.near = True
        return
    if parted == {"weight"}:
        logger.info("%s: its weight was changed, and the slice follows it.", slice_.state.name)
        slice_.follow_edit()
        return
    if slice_.state.recalled and record.marks is None:
        # as it does where the weights are loaded last
        warn_of_other_weights(slice_)
        slice_.take_new_weight()
        return
    raise RuntimeError(sentence(slice_, parted))


def check_shape(slice_: Slice) -> None:
    """Stop where a weight was resized after its slice was made.

    Raises:
        RuntimeError: it was.
    """
    weight = weight_of(slice_)
    if sharding.is_partitioned(weight) or fits(slice_, weight):
        return
    raise RuntimeError(
        f"the weight of {slice_.state.name} has the shape {tuple(weight.shape)} now, and its slice "
        f"{tuple(slice_.active.shape)} was made for another one: it was resized after the conversion. Resize before "
        "converting: call resize_token_embeddings(...) and then convert_to_grass (or make the Trainer). Or call "
        "restore_model(model), and convert it again."
    )


def weight_of(slice_: Slice) -> nn.Parameter:
    weight = slice_.owner._parameters.get(slice_.parameter)
    if weight is None:
        raise RuntimeError(
            f"the weight of {slice_.state.name} is no plain parameter any more: a parametrization, pruning or weight "
            "norm was put on it after the conversion. Call restore_model(model) first, put it on, and convert the "
            "model then; such a layer is left out of Grass."
        )
    return weight


def _marks(slice_: Slice, weight: nn.Parameter) -> tuple:
    active = slice_._parameters["active"]
    if type(active) is nn.Parameter and type(weight) is FrozenWeight:
        return active._version, active.data_ptr(), weight._version  # which knows when it gets another address
    return *_mark(active), *_mark(weight)


def _mark(tensor: Any) -> tuple[int, int]:
    tensor = getattr(tensor, "_local_tensor", tensor)  # DTensor's
    tensor = tensor.int_data if is_int8(tensor) else tensor
    if isinstance(tensor, FakeTensor) or tensor.is_inference():
        return 0, 0
    return tensor._version, tensor.data_ptr()


def _changed(slice_: Slice, record: Drift) -> bool:
    weight = slice_.owner._parameters.get(slice_.parameter)
    return weight is None or getattr(weight, "touched", False) or record.marks != _marks(slice_, weight)


def weight_changed(slice_: Slice, record: Drift) -> bool:
    weight, marks = slice_.owner._parameters.get(slice_.parameter), record.marks
    if type(weight) is FrozenWeight and marks is not None:
        return weight.touched or weight._version != marks[2]
    return _changed(slice_, record)


def moved(slice_: Slice, record: Drift) -> set[str]:
    """Which of the two has another mark than when they agreed; both where that is not known."""
    if record.marks is None:
        return {"slice", "weight"}
    weight = weight_of(slice_)
    now = _marks(slice_, weight)
    others = now[2:] != record.marks[2:] or getattr(weight, "touched", False)
    return ({"slice"} if now[:2] != record.marks[:2] else set()) | ({"weight"} if others else set())


def comparable(slice_: Slice, weight: nn.Parameter) -> bool:
    """Whether values can be compared here; an engine that keeps slices in its own way looks after them itself."""
    active = slice_.active
    if slice_.is_released or slice_.unfilled or slice_.rank_part is not local_part or sharding.is_partitioned(weight):
        return False
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in (active, weight))


def fits(slice_: Slice, weight: nn.Parameter) -> bool:
    expected = list(weight.shape)
    expected[slice_.dim] = slice_.state.rank
    return list(slice_.active.shape) == expected and weight.shape[slice_.dim] == slice_.state.size


@torch.no_grad()
def agree(slice_: Slice, record: Drift) -> bool:
    # digits that the weight did not have then are the slice's alone
    was_coarser = record.dtype is not None and record.dtype.itemsize < weight_of(slice_).dtype.itemsize
    return slice_.rank_part(slice_, False).agrees(record.dtype if was_coarser else None)


@functools.cache
def _warn_of_cast(dtype: torch.dtype, before: torch.dtype) -> None:
    if loses_digits(dtype, before):
        logger.warning(
            "the model was cast from %s to %s after its conversion, and its slices with it: updates below half a unit "
            "in their last place are lost. Cast the model first and convert it then, and slices stay float32.",
            before,
            dtype,
        )
