"""A slice's doors: state dicts, and moves to the meta device and back.

[Note: plain state dicts] A slice is in no state dict of its model, so the keys are those of the plain model wherever
somebody asks: whole models, submodules, wrappers, savers that know nothing of slices. Nobody needs it there. The
weight holds all of its values, rounded to the weight's dtype; the digits beyond, and which rows they are, travel with
the optimizer's state (`grass_hf.optim.resume`). Two kinds of callers walk parameters instead of a state dict and ask a
state dict for each of them: torch.distributed.checkpoint's loader through a wrapper, for which
`integrations.distributed_checkpoint` answers, and DeepSpeed's collector of ZeRO-3, whose answer
`integrations.zero` cuts down. FSDP2's loader in accelerate walks two state dicts of the model, before and after it was
sharded on the meta device, and fills what they name; a slice that was left on the meta device there makes itself from
its weight, each rank its own part, as soon as the weight is loaded. So it cannot be forgotten, tied or not.

A converted model's state dict of before had keys ``<parameter>_slice.active``. They are accepted and not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .ops import sharding

if TYPE_CHECKING:
    from .slice import Slice

KEY = "active"


class Doors(nn.Module):
    """The part of `grass_hf.slices.slice.Slice` that engines and savers meet; its attributes are described there.

    Attributes:
        _kept: values of the buffers while these are on the meta device, where they have none.
        unfilled: whether the slice was on the meta device and has memory without values now; `settle_unfilled`.
    """

    unfilled = False
    _kept: dict[str, Tensor]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing; see [Note: plain state dicts]."""
        getattr(destination, "_metadata", {}).pop(prefix[:-1], None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # the owner of the weight was loaded just before, and took the slice along (`GrassModule`)
        own = {key for key in state_dict if key.startswith(prefix)}
        if strict:
            unexpected_keys.extend(sorted(own - {prefix + KEY}))
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Make a slice that is on the meta device from its weight, if that is not; of a shard, this rank's part."""
        slice_ = cast("Slice", self)
        old, weight = slice_.active, slice_.weight
        if not old.is_meta or weight.is_meta or sharding.is_partitioned(weight):
            return
        device = sharding.local(weight).device
        for name, values in self._kept.items():
            self._buffers[name] = values.to(device, copy=True)  # two of them may start as one
        rows = slice_.rank_part(slice_, False).loaded(old.dtype)
        if sharding.is_sharded(old):
            rows = sharding.sharded_like(old, rows)
        slice_.active, slice_.emptied = nn.Parameter(rows, requires_grad=old.requires_grad), False
        slice_.drift.note(slice_)

    def settle_unfilled(self) -> None:
        """Take values from the weight for a slice that got memory and none; before the first step."""
        if self.unfilled:
            self.unfilled = False
            cast("Slice", self).reload()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        slice_ = cast("Slice", self)
        buffers, was_meta = dict(self._buffers), slice_.active.is_meta
        super()._apply(fn, recurse)
        for name, old in buffers.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            # the numbers of rows are no tensor that may be left empty: `to_empty` would do so, and the meta device
            source = self._kept.get(name) if old.is_meta else old
            if source is not None and new.is_meta:
                self._kept[name] = source.cpu()
            elif source is not None:
                new.copy_(source)
        self.unfilled |= was_meta and not slice_.active.is_meta
        slice_._move_norms()
        slice_.empty()
        if slice_.low is not None:  # on the meta device the weight has lost its own bits
            slice_.low = None if slice_.index.is_meta else slice_.low.to(slice_.index.device)
        return self
