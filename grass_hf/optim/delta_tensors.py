"""The tensors of a model's plain state dict, and what is known of those that have no slice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.conversion import converted_part
from ..convert.record import Conversion
from ..slices.changes import OUTSIDE, mark
from ..slices.frozen_weight import track, untrack
from ..slices.ops.bits import as_bits
from ..slices.own_values import own_values
from ..slices.slice import Slice

NEW = "nothing is known of it yet"
# What wrappers of a part of a model put into names, and a plain checkpoint does not have.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the plain state dict by their first names, and first names by the other names of tied tensors."""
    found: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Slice):
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or leaf in module._non_persistent_buffers_set:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            first = names.setdefault(id(tensor), name)
            if first == name:
                found[name] = tensor
            else:
                aliases[name] = first
    return found, aliases


class Others:
    """Copies of tensors without slices that may change, and marks of those that are frozen."""

    def __init__(self):
        self._copies: dict[str, Tensor] = {}
        self._marks: dict[str, tuple] = {}

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def copy(self, name: str) -> Tensor | None:
        """What this rank has sent of a tensor, (count,); None if that is not known."""
        return self._copies.get(name)

    def remember(self, tensors: dict[str, Tensor], sliced: set[int], *, first: bool) -> None:
        """Take what there is now for sent.

        Args:
            tensors: by name.
            sliced: ids of those that have slices.
            first: as for `own_values`.
        """
        copies, self._copies, self._marks = self._copies, {}, {}
        for name, tensor in tensors.items():
            if id(tensor) in sliced:
                continue
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                track(tensor)
                self._marks[name] = mark(tensor)
            elif not (own := own_values(tensor, first=first)).replica:
                self._copies[name] = _updated(copies.get(name), own.all())

    def reason(self, name: str, tensor: Tensor) -> str | None:
        """Why all of a tensor is to be sent; None if what changed in it can be told."""
        if (copy := self._copies.get(name)) is not None:
            own = own_values(tensor, first=True)
            return None if (copy.numel(), copy.dtype) == (own.count, own.dtype) else OUTSIDE
        known = self._marks.get(name)
        return NEW if known is None else OUTSIDE if known != mark(tensor) else None

    def changed_frozen(self, tensors: dict[str, Tensor]) -> list[str]:
        """Names of frozen tensors that were written to."""
        return [name for name, known in self._marks.items() if mark(tensors.get(name)) != known]

    def forget(self, frozen: Iterable[str] = ()) -> None:
        """Know nothing of what is trained in full, and of some frozen tensors."""
        self._copies.clear()
        for name in frozen:
            self._marks.pop(name, None)

    def close(self, tensors: dict[str, Any]) -> None:
        """Leave the tensors as they were found."""
        for name in self._marks.keys() & tensors.keys():
            untrack(tensors[name])
        self._marks = {}


def _updated(copy: Tensor | None, values: Tensor) -> Tensor:
    if copy is None or (copy.shape, copy.dtype, copy.device) != (values.shape, values.dtype, values.device):
        return values.clone()
    if not torch.equal(as_bits(copy), as_bits(values)):
        copy.copy_(values)
    return copy


def converted_root(model: nn.Module) -> nn.Module:
    """The converted model, out of its wrappers.

    Raises:
        ValueError: it is not converted, or one of its modules keeps more in a state dict than tensors.
    """
    found = converted_part(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} is not converted: call convert_to_grass(model, config) and make its optimizer "
            "first, WeightDelta follows both."
        )
    for name, module in found.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) keeps more in a state dict than tensors "
                "(get_extra_state), which no patch can hold: send state_dict() whole instead."
            )
    return found


def check_driver(conversion: Conversion, optimizer: object) -> None:
    """Check that it is this optimizer that drives the slices.

    Raises:
        ValueError: it is not.
    """
    inner = optimizer
    while inner is not None and not hasattr(inner, "grass"):
        inner = getattr(inner, "optimizer", None)
    if inner is not None:
        _ = inner.grass.slices  # a copied optimizer looks for its model now
    if conversion.driver is None or inner is None or inner.grass.link.conversion is not conversion:
        raise ValueError(
            f"this {type(optimizer).__name__} does not drive the slices of this {type(conversion.model).__name__}: "
            "give the optimizer that grass_optimizer(model, ...) made for it."
        )
