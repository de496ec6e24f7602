"""Which weights are read behind the back of their slices? A mode that sees every operation of a first forward or step.

A slice is given the gradients of products that its own modules make. A weight that is read in another way (a router
that multiplies by ``self.classifier.weight``, a head that concatenates two weights, a fused kernel or loss, a penalty)
would get a part of its gradient, or none, without a sign of it. So for a while a dispatch mode sees every operation on
memory of a target weight, and Python's own stack tells who runs it (`callers`):

    one of the weight's modules, inside the product that is tapped    its own use
    anybody else                                                      a use behind the back

What cannot carry a gradient in the plain model either is no use: views and shapes, numbers, what is done under
`no_grad` (unless it is the inside of an autograd function that is recorded) and to detached values.

`WeightReads` looks at whatever runs within it, `Audit` at one forward, which it can undo.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...slices.ops.sharding import is_partitioned, is_sharded
from ...slices.slice import Slice
from ..modules import GrassModule
from .callers import caller
from .rerun import Rerun

# They make a tensor like another one, whose numbers they do not read.
SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty"}
SHAPE_ONLY |= {"new_zeros", "new_ones", "new_full", "new_empty_strided"}

_looking = 0


def is_looking() -> bool:
    """Whether operations are looked at by such a mode now."""
    return _looking > 0


class WeightReads(TorchDispatchMode):
    """Sees what touches the memory of target weights.

    Args:
        model: that has slices, or a part of it; not wrapped.

    Attributes:
        found: the slices whose weights are read behind their backs, in that order.
        reached: names of the slices whose weights were touched at all.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: dict[Slice, None] = {}
        self.reached: set[str] = set()
        self._users: dict[Slice, set[int]] = {}
        for module in model.modules():
            if isinstance(module, GrassModule):
                for slice_ in module.own_slices().values():
                    self._users.setdefault(slice_, set()).add(id(module))
        self._moving = any(is_sharded(slice_.active) or is_partitioned(slice_.weight) for slice_ in self._users)
        self._sizes = {slice_.weight.numel() for slice_ in self._users} if self._moving else set()
        self._places = self._find_places()

    def __enter__(self) -> WeightReads:
        global _looking
        super().__enter__()
        _looking += 1
        return self

    def __exit__(self, *error: Any) -> None:
        global _looking
        _looking -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None:
            with contextlib.suppress(Exception):
                self.before(schema, args, kwargs)
        outputs = func(*args, **kwargs)
        with contextlib.suppress(Exception):  # tensors of somebody's own class, without memory, say
            if schema is None or not (_is_view(schema) or schema.name.rpartition("::")[2] in SHAPE_ONLY):
                self.look((args, kwargs), outputs)
        return outputs

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # a compiled kernel of attention runs compiled; modules that are compiled are not audited

    def before(self, schema: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called before every operation that has a schema."""

    def look(self, inputs: Any, outputs: Any) -> None:
        """Note an operation that made `outputs` of `inputs`, None where it makes no tensors."""
        made = [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]
        if not made and outputs is not None:  # a number, an answer: no gradient comes back from it
            return
        written = {_storage(plain) for tensor in made for plain in _plain(tensor)}
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                for plain in _plain(tensor):
                    self._touch(tensor, plain, written)

    def _uses(self, slice_: Slice) -> Callable[[Any], bool]:
        users = self._users[slice_]
        return lambda module: id(module) in users

    def _find_places(self) -> dict[int, list[Slice]]:
        places: dict[int, list[Slice]] = {}
        for slice_ in self._users:
            for plain in _plain(slice_.weight):
                places.setdefault(_storage(plain), []).append(slice_)
        return places

    def _touch(self, tensor: Tensor, plain: Tensor, written: set[int]) -> None:
        if self._moving and plain.numel() in self._sizes:
            self._places = self._find_places()  # gathered weights come and go
        storage = _storage(plain)
        for slice_ in self._places.get(storage, ()):
            if slice_ in self.found or not any(_overlap(plain, own) for own in _plain(slice_.weight)):
                continue
            self.reached.add(slice_.state.name)
            if storage in written:  # what is written into a weight has not been read
                continue
            is_own, is_recorded = caller(self._uses(slice_))
            if is_own:
                continue
            if torch.is_grad_enabled():
                # a detached value carries no gradient in the plain model either
                own = tensor is slice_.weight or tensor._base is slice_.weight
                carries = own or tensor is not plain or self._moving
            else:
                carries = is_recorded
            if carries:
                self.found[slice_] = None


class Audit(WeightReads):
    """Sees what one forward does with target weights, and what brings back all that was before it.

    Attributes:
        entry: the module whose forward is looked at, the outermost one.
        rerun: brings back what was before the forward.
    """

    def __init__(self, entry: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__(entry)
        self.entry = entry
        self.rerun = Rerun(entry, args, kwargs)

    def before(self, schema: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.rerun.before(schema, args, kwargs)


def _is_view(schema: Any) -> bool:
    """Whether what is returned is a view of what is given: what is done with it is seen."""
    aliases = [result.alias_info for result in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _plain(tensor: Any) -> list[Tensor]:
    """The tensors that hold the memory of one."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    inner = (getattr(tensor, name) for name in names)  # a DTensor's device mesh is one of them
    return [plain for each in inner if isinstance(each, Tensor) for plain in _plain(each)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _overlap(one: Tensor, other: Tensor) -> bool:
    if _storage(one) != _storage(other):
        return False
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(tensor: Any) -> tuple[int, int]:
    """First and last (exclusive) byte of a tensor in its memory."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()
