"""Slices without memory of their own between steps.

[Note: released slices] With ``resident=False`` a slice exists only while it is stepped. A slice of the weight's dtype
is ``weight[index]``. Of a float32 slice over a weight of fewer bits, the bits that the weight does not hold
stay, as `Slice.low`: `grass_hf.slices.low_bits`. Between steps the parameter has its shape and no memory: one NaN,
expanded. Its gradient, its optimizer state and its identity are what they were; `Slice.held` brings the values back
while they are needed, as ``active`` itself or, where it has another dtype than the slice is stepped in, as ``wide``.
It stays as it is until the first step, because DDP broadcasts parameters when it wraps the model.

[Note: a weight that is overwritten] Between steps somebody may write into the weight. Bits that belonged to other
numbers are void then. So a slice that is released remembers its weight's mark, as all slices do (`slices.drift`), and a
digest of its rows. Where the next step finds another mark and another digest, the bits are dropped: the slice is what
the weight says. Values that were written again as they were (weights that are averaged for an evaluation and put back,
DDP's broadcast, a move) leave the digest as it was, and the bits stay.

The gradient has the dtype of the parameter. So with ``gradient_dtype`` in sixteen bits the parameter is of sixteen, and
optimizers never see it: they step over `stand_ins`, float32 parameters with its state and its gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .drift import Drift, weight_changed
from .low_bits import castable, digest, joined, low_bits, low_bits_of_cast
from .ops import int8, sharding
from .ops.rows import take_rows
from .part import Part, SliceState

if TYPE_CHECKING:
    from .slice import Slice

logger = logging.getLogger(__name__)


class Released(nn.Module):
    """The part of `grass_hf.slices.slice.Slice` that is released and held; its attributes are described there."""

    active: nn.Parameter
    index: Tensor
    dim: int
    resident: bool
    stepped: torch.dtype
    low: Tensor | None
    wide: Tensor | None
    digest: Tensor | None
    state: SliceState
    drift: Drift
    emptied = False

    @property
    def weight(self) -> nn.Parameter:
        """The full weight, (..., m, n) or as it is stored."""
        raise NotImplementedError

    @property
    def keeps_low(self) -> bool:
        """Whether bits are kept beside the weight while the slice is released."""
        if self.resident:
            return False
        weight = self.weight
        return int8.is_int8(weight) or self.stepped == torch.float32 != weight.dtype

    @property
    def is_released(self) -> bool:
        """Whether the slice has no memory of its own now."""
        return self.emptied and self.wide is None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The slice's values in memory, loaded from the weight if need be and released again."""
        if self.is_released:
            self.hold()
            try:
                yield
            finally:
                self.release()
        else:
            yield

    @torch.no_grad()
    def hold(self) -> None:
        """Load a released slice from the weight, and what is kept beside it."""
        if self.keeps_low:
            self._follow_weight()
            self.wide = joined(self.weight.detach(), self.index, self.dim, self.low)
        else:
            self.active.data = take_rows(self.weight.detach(), self.index, self.dim)
            self.emptied = False

    @torch.no_grad()
    def widen(self) -> None:
        """Have the values in the dtype in which they are stepped."""
        if self.is_released:
            self.hold()
        elif self.keeps_low and self.wide is None:
            self.wide = self.active.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def release(self) -> None:
        """Free the memory of a slice that is not resident; its values must be in the weight, but for the low bits."""
        if self.resident:
            return
        if self.wide is not None:
            weight = self.weight.detach()
            self.low, self.wide = low_bits(self.wide, weight, self.index), None
            self.digest = None if self.low is None else digest(weight, self.index, self.dim)
        self.emptied = True
        self.empty()
        self.drift.note(cast("Slice", self))

    @torch.no_grad()
    def abandon(self) -> None:
        """Forget what a step that was interrupted made of the slice; what was before it is in the weight."""
        self.wide = None
        if not self.keeps_low:
            self.release()

    def _follow_weight(self) -> None:
        """See [Note: a weight that is overwritten]."""
        slice_ = cast("Slice", self)
        if self.low is None or self.digest is None or not weight_changed(slice_, self.drift):
            return
        now = digest(self.weight.detach(), self.index, self.dim)
        if not torch.equal(now, self.digest.to(now.device)):
            logger.info("%s: its weight was changed, and the slice follows it.", self.state.name)
            self.low = None

    def empty(self) -> None:
        """Free what a copy or a move gave to a parameter that is to have no memory."""
        if self.emptied:
            self.active.data = self.active.new_full((), torch.nan).expand(self.active.shape)

    @torch.no_grad()
    def take_saved(self, saved: Tensor | None, low: Tensor | None) -> None:
        """Release the slice with what a checkpoint says of it; the rest of it is in the weight.

        Args:
            saved: the slice, NaN if it was released too; None where only its weight has it.
            low: what was kept beside the weight, None for nothing.
        """
        device = self.index.device
        self.wide = None
        self.low = None if low is None or not self.keeps_low else low.to(device, copy=True)
        if low is None and saved is not None and self.keeps_low and saved.dtype == torch.float32:
            self.low = self._low_of(saved.to(device))
        self.digest = None  # the weight may be loaded later
        self.release()

    def _low_of(self, saved: Tensor) -> Tensor | None:
        """The low bits of a slice that was resident; None if it was not."""
        if saved.flatten()[:1].isnan().any():
            return None
        if int8.is_int8(self.weight):
            return low_bits(saved, self.weight, self.index)
        return low_bits_of_cast(saved)  # without a look at the weight

    def values(self) -> Tensor:
        """What the slice holds now, on this rank: ``wide`` while there is one, else ``active``."""
        return sharding.local(self.active) if self.wide is None else self.wide


def unreleased(slice_: Slice, own: Part, low: Tensor | None) -> Tensor:
    """What a slice that stays in memory holds where it goes on from one that was released.

    Args:
        slice_: the slice.
        own: this rank's part of it.
        low: all low bits of the one that was released, None for zeros.
    """
    if low is not None:
        low = sharding.whole(low).to(own.index.device)
        low = low if int8.is_int8(own.weight) else castable(low)
        low = low[slice(*sharding.shard_range(slice_.active))] if sharding.is_sharded(slice_.active) else low
    return joined(own.weight, own.index, slice_.dim, low)
