"""What a `WeightDelta` must know after a resume: which synchronisation a replica has, and what it has not been sent.

It travels as a part of what Grass remembers in the optimizer's state (`grass_hf.optim.resume`). Not elements, but
columns are kept: after a resume all elements of those count as changed, and parameters that are trained in full are
sent whole once.
"""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..convert.record import grass_slices
from ..slices.changes import Entry, changes_of
from ..slices.ops.bits import pack, positions
from ..slices.ops.sharding import is_partitioned, shape_of, shard_range
from ..slices.part import local_part

if TYPE_CHECKING:
    from ..convert.record import Conversion
    from ..slices.slice import Slice
    from .weight_delta import WeightDelta

KEY = "delta"


def saved(conversion: Conversion) -> dict[str, Any] | None:
    """What to keep with an optimizer's state, plain types only; None if nobody follows the model."""
    delta = conversion.delta
    if delta is None:
        return conversion.delta_saved
    state: dict[str, Any] = {"key": delta.key, "number": delta.number, "step": delta.step, "columns": {}}
    state["whole"] = delta.unknown()
    for slice_ in grass_slices(conversion.model):
        entries = [entry for entry in changes_of(slice_).entries if not entry.settling]
        if entries and changes_of(slice_).whole is None:
            size = (*slice_.index.shape[:-1], slice_.state.size)
            held = torch.zeros(size, dtype=torch.uint8)
            for entry in entries:
                held.scatter_(-1, entry.columns.cpu(), 1)
            state["columns"][slice_.state.name] = _encoded(held)
    return state


def take_up(state: dict[str, Any] | None, conversion: Conversion) -> None:
    """Follow an optimizer's state that was loaded; the controller knows its step already."""
    delta = conversion.delta
    if delta is None:
        conversion.delta_saved = state
        return
    known = (delta.key, delta.number)
    if state is None or state["step"] != delta.step:
        delta.all_changed("an optimizer's state was loaded that says nothing of this WeightDelta")
    elif delta.number == 0 or known == (state["key"], state["number"]):
        _adopt(delta, state)
    else:
        delta.all_changed(
            f"an optimizer's state of synchronisation {state['number']} was loaded after synchronisation {delta.number}"
        )


def take_up_saved(delta: WeightDelta) -> None:
    """Let a `WeightDelta` go on where the one stopped that was saved with the optimizer's state."""
    state, delta.conversion.delta_saved = delta.conversion.delta_saved, None
    if state is not None and state["step"] == delta.step:
        _adopt(delta, state)
    elif state is not None:
        delta.all_changed("steps were taken since an optimizer's state was loaded, and nobody followed them")


def _adopt(delta: WeightDelta, state: dict[str, Any]) -> None:
    delta.key, delta.number = state["key"], state["number"]
    delta.forget_others(state["whole"])
    for slice_ in grass_slices(delta.model):
        changes = changes_of(slice_)
        if slice_.state.name in state["whole"]:
            changes.whole = changes.whole or "not sent before an optimizer's state was saved"
        elif (text := state["columns"].get(slice_.state.name)) is not None:
            columns = _decoded(text, (*slice_.index.shape[:-1], slice_.state.size)).to(slice_.index.device)
            changes.entries.append(_entry(slice_, columns))


def _entry(slice_: Slice, columns: Tensor) -> Entry:
    """All elements of some columns (..., k), as this rank numbers them."""
    if is_partitioned(slice_.weight):
        shape = list(shape_of(slice_.weight))
        shape[slice_.dim] = columns.shape[-1]
        return Entry(columns, columns, (-1, -1), torch.Size(shape))
    held, own = local_part(slice_), columns
    if held.rows is not None and columns.dim() > 1:
        own = columns[held.rows]
    elif held.rows is not None:
        own = columns - shard_range(slice_.weight)[0]
        own = own[(own >= 0) & (own < held.weight.shape[0])]
    shape = list(held.weight.shape)
    shape[slice_.dim] = own.shape[-1]
    return Entry(columns, own, (-1, -1), torch.Size(shape))


def _encoded(mask: Tensor) -> str:
    return base64.b64encode(zlib.compress(pack(mask.bool()).numpy().tobytes())).decode()


def _decoded(text: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers (..., k) of the columns in a mask of some shape; a matrix that has fewer repeats one of them."""
    raw = zlib.decompress(base64.b64decode(text))
    bits = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    mask[positions(bits)] = True
    mask = mask.view(shape)
    if mask.dim() == 1:
        return mask.nonzero().squeeze(1)
    most = int(mask.sum(-1).max())
    columns = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return torch.where(mask.gather(-1, columns), columns, columns[:, :1])
