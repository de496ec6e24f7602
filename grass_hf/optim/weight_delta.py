"""`WeightDelta`: what training changed in a model's plain checkpoint since somebody last asked.

Rollout engines apart from the trainer (reinforcement learning) want the weights after every step or two, and few
elements of half-precision weights move in one. Where every weight may have moved, a copy of all weights and a
comparison finds them. With Grass only the columns that were in a slice can have moved, which `slices.changes` notes as
they are written, and the few parameters that are trained in full, of which a copy is kept.

Patches hold new values, not differences: applied twice, or to weights that are newer, they do no harm.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..convert.record import conversion_of, grass_slices
from ..slices.changes import DECAYED, Changes, changes_of
from ..slices.ops.sharding import shape_of
from ..slices.own_values import OwnValues, own_values
from ..slices.slice import Slice
from . import delta_patches, delta_state
from .delta_patches import Patch, Sync
from .delta_tensors import NEW, Others, check_driver, converted_root, plain_tensors

logger = logging.getLogger(__name__)

ASKED = "asked for"
_GONE = "no slice is left on it, which would know what changed"


class WeightDelta:
    """Gives what has changed in the weights since it was last asked, in the coordinates of the plain `state_dict()`.

    A replica that held the weights of the last call and applies what a call gives has the trainer's plain state dict,
    bit for bit: over reselections, decay, rounding at random, int8 weights (as their plain export has them), and after
    a state dict was loaded, when the weights concerned are given whole, with a warning. A tensor that has several
    names comes once, `aliases` has the others.

    `patches`, `columns` and `full` are generators. What they give counts as sent when one was read to its end; until
    then the next call gives it again. Take no step in between.

    With several processes every one must call, and each gives what it holds: under DDP and ZeRO-1 and 2 the first
    rank everything and the others nothing, under FSDP2 and ZeRO-3 each rank its shard's elements. Nothing is gathered.

    Args:
        model: converted, or a wrapper around it (DDP, `torch.compile`); an engine that shards has done so.
        optimizer: that `grass_optimizer` made for it, or a wrapper around it.
        elements: compare, as slices are written back, which elements change: r/m of every weight, and one bit of memory
            per element of a slice. False costs neither, and `patches` gives all elements of the columns.

    Attributes:
        key: of the run; it goes on after a resume.
        number: synchronisations so far.
        last: the last `Sync`, None before the first.
        aliases: other name -> the name under which a tensor is given.

    Raises:
        ValueError: the model is not converted, the optimizer does not drive it, another `WeightDelta` follows it, or a
            module keeps more in a state dict than tensors.
    """

    def __init__(self, model: nn.Module, optimizer: object, *, elements: bool = True):
        self.model = converted_root(model)
        self.elements = elements
        self.conversion = conversion_of(self.model)
        check_driver(self.conversion, optimizer)
        if self.conversion.delta is not None:
            raise ValueError(
                f"another WeightDelta follows this {type(self.model).__name__} already: use that one, or call its "
                "close() first."
            )
        self.conversion.delta = self
        self.key, self.number = uuid.uuid4().hex, 0
        self.last: Sync | None = None
        self._others = Others()
        self._why_all: str | None = None
        for slice_ in self._slices():
            self._follow(slice_)
        self._remember(self._tensors(), self._slices())
        delta_state.take_up_saved(self)

    def __reduce_ex__(self, protocol: object) -> tuple:
        return type(None), ()  # a copy of a model has sent nothing

    @property
    def controller(self):
        """Of the optimizer that drives the slices now; engines put others in its place."""
        link = self.conversion.driver() if self.conversion.driver is not None else None
        return None if link is None else link.optimizer.grass

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        controller = self.controller
        return -1 if controller is None else controller.step

    @property
    def copied_bytes(self) -> int:
        """Of the copies that are kept of parameters without slices and of buffers."""
        return self._others.nbytes

    def shape(self, name: str) -> torch.Size:
        """Of a tensor of the plain state dict, all ranks' parts of it."""
        return shape_of(self._tensors()[name])

    @property
    def speaks(self) -> bool:
        """Whether this rank gives anything: all do that have shards, else the first."""
        return any(not own_values(tensor, first=self._is_first()).replica for tensor in self._tensors().values())

    def close(self) -> None:
        """Follow the model no longer."""
        for slice_ in self._slices():
            slice_.changes = None
        self._others.close(self._tensors())
        if self.conversion.delta is self:
            self.conversion.delta = None

    # -- what changed ------------------------------------------------------------------------------------------

    def patches(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """The changed elements: name, indices and values.

        Yields:
            The name in the plain state dict; int32 (k,) indices into the tensor read flat, ascending (int64 where they
            do not fit), or None for all of the tensor; values (k,) in the checkpoint's dtype, or of the tensor's shape.

        Raises:
            RuntimeError: the optimizer took a step before this was read to its end, or the model was converted anew.
        """
        for patch in self.packets(columns=False):
            yield patch.name, patch.flat(), patch.values

    def columns(self) -> Iterator[tuple[str, int | None, Tensor | None, Tensor]]:
        """The same as whole columns (rows for ``dim`` -2), for which nothing is compared.

        Yields:
            The name, the dimension, the numbers (..., k) of the columns, and these; or the name, None, None, and all
            of the tensor.

        Raises:
            ValueError: a weight is sharded, and a rank has parts of columns: use `patches`.
            RuntimeError: as `patches`.
        """
        for patch in self.packets(columns=True):
            yield patch.name, patch.dim, patch.index, patch.values

    def full(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """All of the state dict, as `patches` would give it: the anchor from which a replica starts."""
        self._why_all = ASKED
        return self.patches()

    def packets(self, columns: bool | None = None) -> Iterator[Patch]:
        """As `patches`, in the form in which they travel.

        Args:
            columns: whether to give columns; None whichever takes fewer bytes, tensor by tensor.
        """
        self._check_current()
        step, tensors = self.step, self._tensors()
        self._note_gone()
        sync = Sync(self.number + 1, step)
        followed = self._slices()
        slices = {id(slice_.weight): slice_ for slice_ in followed}
        for name, tensor in tensors.items():
            slice_ = slices.get(id(tensor))
            own = own_values(tensor, first=self._is_first())
            reason = self._reason(name, tensor, slice_)
            if slice_ is not None and reason is not None:
                sync.whole[name] = reason
            if own.replica or not own.count:
                continue
            for patch in self._of(name, tensor, slice_, own, reason, columns):
                sync.elements += patch.values.numel()
                sync.bound += patch.bound
                yield patch
                if self.step != step:
                    raise RuntimeError(
                        f"the optimizer took step {self.step} while the changes of step {step} were being read: read "
                        "patches() to its end before the next step, say list(delta.patches())."
                    )
        sync.is_full = len(sync.whole) == len(slices)
        self._finish(sync, tensors, followed)

    def _of(
        self, name: str, tensor: Tensor, slice_: Slice | None, own: OwnValues, reason: str | None, columns: bool | None
    ) -> Iterator[Patch]:
        if reason is not None:
            yield delta_patches.whole(name, own)
        elif slice_ is not None:
            yield from delta_patches.of_slice(name, slice_, own, columns)
        elif (copy := self._others.copy(name)) is not None:
            yield from delta_patches.of_copy(name, own, copy, columns)

    def _reason(self, name: str, tensor: Tensor, slice_: Slice | None) -> str | None:
        """Why a tensor is sent whole, None if what changed in it is known."""
        if self._why_all is not None:
            return self._why_all
        if slice_ is None:
            return self._others.reason(name, tensor)
        if slice_.changes is None:  # it came later
            self._follow(slice_)
            changes_of(slice_).whole = NEW
        changes_of(slice_).look()
        return changes_of(slice_).whole

    # -- between calls -----------------------------------------------------------------------------------------

    def all_changed(self, reason: str) -> None:
        """Send everything whole next time: what a replica holds is not known."""
        self._why_all = reason

    def unknown(self) -> list[str]:
        """Names of slices and frozen tensors that are to be sent whole."""
        for slice_ in self._slices():
            changes_of(slice_).look()
        every = self._why_all is not None
        names = [p.state.name for p in self._slices() if every or changes_of(p).whole is not None]
        return names + self._others.changed_frozen(self._tensors())

    def forget_others(self, frozen: Iterable[str]) -> None:
        """Send what is trained in full whole next time, and some frozen tensors."""
        self._others.forget(frozen)

    def _finish(self, sync: Sync, tensors: dict[str, Tensor], followed: list[Slice]) -> None:
        self._why_all = None
        for slice_ in followed:
            changes_of(slice_).forget()
        self._remember(tensors, followed)
        self.number, self.last = sync.number, sync
        outside = [name for name, reason in sync.whole.items() if reason not in (DECAYED, ASKED)]
        if outside:
            every = "all weights are" if sync.is_full else f"{len(outside)} weights ({outside[0]}, ...) are"
            logger.warning("synchronisation %d: %s sent whole: %s.", sync.number, every, sync.whole[outside[0]])

    def _remember(self, tensors: dict[str, Tensor], followed: list[Slice]) -> None:
        sliced = {id(slice_.weight) for slice_ in followed}
        self._others.remember(tensors, sliced, first=self._is_first())

    def _slices(self) -> list[Slice]:
        """None once `restore_model` was called."""
        return list(grass_slices(self.model)) if self.conversion.is_current else []

    def _tensors(self) -> dict[str, Tensor]:
        found, self.aliases = plain_tensors(self.model)
        return found

    def _follow(self, slice_: Slice) -> None:
        slice_.changes = Changes(slice_, lambda: self.step, self._compares)

    def _compares(self, slice_: Slice) -> bool:
        """Whether elements of a slice's weight are compared on this rank, which speaks of them then."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.elements
        return self.elements and not own_values(slice_.weight, first=self._is_first()).replica

    def _is_first(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return True
        controller = self.controller
        return dist.get_rank(None if controller is None else controller.replicas) == 0

    def _check_current(self) -> None:
        now = getattr(self.model, "grass", None)
        if now is not None and now is not self.conversion:
            raise RuntimeError(
                f"this {type(self.model).__name__} was converted anew, and this WeightDelta followed the slices that "
                "it had before: make one for the new optimizer, WeightDelta(model, optimizer)."
            )

    def _note_gone(self) -> None:
        if not self.conversion.is_current:
            self._why_all = self._why_all or _GONE
