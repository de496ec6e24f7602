"""Which weights does a model read behind the back of their slices? Asked of the first training forward.

A slice is given the gradients of products that its own modules make. A weight that the model reads in another way (a
router that multiplies by ``self.classifier.weight``, a head that concatenates two weights, a fused kernel) would get a
part of its gradient, or none, without a sign of it. So during the first training forward a dispatch mode sees every
operation on memory of a target weight, and Python's own stack tells who runs it:

    one of the weight's modules, inside the product that is tapped    its own use
    anybody else                                                      a use behind the back

What cannot carry a gradient in the plain model either is no use: views and shapes, what is done under `no_grad` (unless
it is the inside of an autograd function) and to detached values.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...slices.ops.sharding import is_partitioned, is_sharded
from ...slices.slice import Slice
from ..modules import GrassModule
from .rerun import Rerun

_APPLY = cast(Any, Function.apply).__func__.__code__


class Audit(TorchDispatchMode):
    """Sees what touches the memory of target weights.

    Attributes:
        entry: the module whose forward is looked at, the outermost one.
        found: the slices whose weights are read behind their backs.
        reached: names of the slices whose weights were touched at all.
        rerun: brings back what was before the forward.
    """

    supports_higher_order_operators = True

    def __init__(self, entry: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.entry = entry
        self.found: dict[Slice, None] = {}
        self.reached: set[str] = set()
        self._users: dict[Slice, set[int]] = {}
        for module in entry.modules():
            if isinstance(module, GrassModule):
                for slice_ in module.own_slices().values():
                    self._users.setdefault(slice_, set()).add(id(module))
        self._tapped = _tapped()
        self._moving = any(is_sharded(slice_.active) or is_partitioned(slice_.weight) for slice_ in self._users)
        self._sizes = {slice_.weight.numel() for slice_ in self._users} if self._moving else set()
        self._places = self._find_places()
        self.rerun = Rerun(entry, args, kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with contextlib.suppress(Exception):  # tensors of somebody's own class, without memory, say
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # a compiled kernel of attention runs compiled; modules that are compiled are not audited

    def _find_places(self) -> dict[int, list[Slice]]:
        places: dict[int, list[Slice]] = {}
        for slice_ in self._users:
            for plain in _plain(slice_.weight):
                places.setdefault(_storage(plain), []).append(slice_)
        return places

    def _look(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        schema = getattr(func, "_schema", None)
        if schema is not None:
            self.rerun.before(schema, args, kwargs)
            if schema.returns and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
                return  # a view: what is done with it is seen
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                for plain in _plain(tensor):
                    self._touch(tensor, plain)

    def _touch(self, tensor: Tensor, plain: Tensor) -> None:
        if self._moving and plain.numel() in self._sizes:
            self._places = self._find_places()  # gathered weights come and go
        for slice_ in self._places.get(_storage(plain), ()):
            if slice_ in self.found or not any(_overlap(plain, own) for own in _plain(slice_.weight)):
                continue
            self.reached.add(slice_.state.name)
            is_own, in_function = self._caller(self._users[slice_])
            if is_own:
                continue
            if torch.is_grad_enabled():
                # a detached value carries no gradient in the plain model either
                own = tensor is slice_.weight or tensor._base is slice_.weight
                carries = own or tensor is not plain or self._moving
            else:
                carries = in_function
            if carries:
                self.found[slice_] = None

    def _caller(self, users: set[int]) -> tuple[bool, bool]:
        """Whether one of these modules makes its tapped product, and whether an autograd function runs."""
        in_function = False
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            code = frame.f_code
            if code is _APPLY:
                in_function = True
            elif code in self._tapped and id(frame.f_locals.get("self")) in users:
                return True, in_function
            frame = frame.f_back
        return False, in_function


def _tapped() -> set[Any]:
    """The code of the forwards around which a product is tapped."""
    kinds = GrassModule.__subclasses__()
    found, package = set(), __name__.partition(".")[0]
    while kinds:
        kind = kinds.pop()
        if kind.__module__.startswith(package) and "forward" in vars(kind):
            found.add(inspect.unwrap(kind.forward).__code__)
        kinds += kind.__subclasses__()
    return found


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
