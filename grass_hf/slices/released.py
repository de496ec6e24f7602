"""Slices without memory of their own between steps.

[Note: released slices] With ``resident=False`` a slice exists only while it is stepped. A slice of the weight's dtype
is ``weight[index]``. Of a float32 slice over a weight of fewer bits, the bits that the weight does not hold
stay, as `Slice.low`: `grass_hf.slices.low_bits`. Between steps the parameter has its shape and no memory: one NaN,
expanded. Its gradient, its optimizer state and its identity are what they were; `Slice.held` brings the values back
while they are needed, as ``active`` itself or, where it has another dtype than the slice is stepped in, as ``wide``.
It stays as it is until the first step, because DDP broadcasts parameters when it wraps the model.

The gradient has the dtype of the parameter. So with ``gradient_dtype`` in sixteen bits the parameter is of sixteen, and
optimizers never see it: they step over `stand_ins`, float32 parameters with its state and its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .low_bits import joined, low_bits, lower_halves
from .ops import int8, sharding
from .ops.rows import take_rows


class Released:
    """The part of `grass_hf.slices.slice.Slice` that is released and held; its attributes are described there."""

    weight: nn.Parameter
    active: nn.Parameter
    index: Tensor
    dim: int
    resident: bool
    stepped: torch.dtype
    low: Tensor | None
    wide: Tensor | None
    emptied = False

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
            self.low, self.wide = low_bits(self.wide, self.weight.detach(), self.index), None
        self.emptied = True
        self.empty()

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
        whole = saved is not None and saved.dtype == torch.float32 and not saved.flatten()[:1].isnan().any()
        if low is None and whole and self.keeps_low:
            # of plain weights without a look at them: they may be loaded later
            is_int8, saved = int8.is_int8(self.weight), saved.to(device)
            self.low = low_bits(saved, self.weight, self.index) if is_int8 else lower_halves(saved)
        self.release()

    def values(self) -> Tensor:
        """What the slice holds now, on this rank: ``wide`` while there is one, else ``active``."""
        return sharding.local(self.active) if self.wide is None else self.wide
