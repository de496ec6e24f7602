"""Seeing, while a Trainer makes its first loss, which compressed weights are computed with behind the slices' backs.

[Note: a read behind the back] A slice gets its gradient from the product that its own module makes. A loss that takes
``lm_head.weight`` and multiplies by it itself (TRL's fused head, Liger's and other fused cross-entropies, a penalty on
the weights) gives that slice nothing, and one that is tied to an embedding only the embedding's part. No list of such
losses is kept: during the first training step every operation is looked at, and one that makes numbers out of a
compressed weight's memory outside its module's forward stops the run, before a weight is changed. It counts only where
a gradient is wanted: metrics under `torch.no_grad` may read what they like.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..convert.audit.watching import leaving_heads
from ..convert.conversion import grass_slices, is_converted
from ..convert.modules import GrassModule
from ..convert.record import conversion_of
from ..slices.ops.sharding import is_partitioned, is_sharded, shape_of
from ..slices.slice import Slice
from .marks import marked, original_of

if TYPE_CHECKING:
    from transformers import Trainer

# They make a tensor like another one, whose numbers they do not read.
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty"}
_SHAPE_ONLY |= {"new_zeros", "new_ones", "new_full", "new_empty_strided"}


_APPLY = cast(Any, torch.autograd.Function.apply).__func__.__code__


class WeightReads:
    """A context in which reads behind the slices' backs are noted.

    Args:
        model: converted, not wrapped.

    Attributes:
        found: the slices whose weights were read, in that order.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.found: list[Slice] = []
        self._slices = list(grass_slices(model))
        moving = any(is_sharded(slice_.active) or is_partitioned(slice_.active) for slice_ in self._slices)
        # Weights that an engine gathers come and go; only a tensor as large as one is a reason to look where they are.
        self._sizes = {math.prod(shape_of(slice_.weight)) for slice_ in self._slices} if moving else set()
        self._owners: dict[int, list[tuple[int, int, Slice]]] = {}
        self._running: list[int] = []
        self._grad_wanted: list[bool] = []
        self._context = ExitStack()

    def __enter__(self) -> WeightReads:
        # What torch.compile has made runs as it was written: no operation of it would be seen, and what it compiles
        # under a mode is of no use later.
        self._context.enter_context(torch.compiler.set_stance("force_eager"))
        self._follow(self.model, self._grad_wanted, torch.is_grad_enabled)
        for module in self.model.modules():
            if isinstance(module, GrassModule):
                for slice_ in module.own_slices().values():
                    self._follow(module, self._running, functools.partial(id, slice_))
        self._find_weights()
        self._context.enter_context(_Pointers(self))
        self._context.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()

    def _follow(self, module: nn.Module, stack: list, entry) -> None:
        """Keep what `entry` says on a stack while a module runs."""

        def begin(*_: Any) -> None:
            stack.append(entry())

        def end(*_: Any) -> None:
            stack.pop()

        self._context.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
        self._context.callback(module.register_forward_hook(end, always_call=True).remove)

    def _find_weights(self) -> None:
        """Note where weights lie at this moment; shards are skipped, engines read them at any time."""
        self._owners = {}
        for slice_ in self._slices:
            for storage, first, last in _places(slice_.weight):
                self._owners.setdefault(storage, []).append((first, last, slice_))

    def _slices_at(self, tensor: Tensor) -> Iterator[Slice]:
        for storage, first, last in _places(tensor):
            for own_first, own_last, slice_ in self._owners.get(storage, ()):
                if first < own_last and own_first < last:
                    yield slice_

    def look(self, inputs: Any, outputs: Any) -> None:
        """Note an operation that made `outputs` of `inputs`; one that gives a view has read nothing."""
        given = [tensor for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)]
        if self._sizes:
            if not any(tensor.numel() in self._sizes for tensor in given):
                return  # what lies where a weight has been says nothing
            self._find_weights()
        read = {slice_ for tensor in given for slice_ in self._slices_at(tensor) if id(slice_) not in self._running}
        if not read - set(self.found):
            return
        made = [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]
        if not made and outputs is not None:  # a number, an answer: no gradient comes back from it
            return
        read -= {slice_ for tensor in made for slice_ in self._slices_at(tensor)}
        if read and self._is_wanted():
            self.found += [slice_ for slice_ in self._slices if slice_ in read and slice_ not in self.found]

    def _is_wanted(self) -> bool:
        """Whether a gradient is wanted of what is computed just now."""
        if self._grad_wanted and not self._grad_wanted[-1]:
            return False
        return torch.is_grad_enabled() or _in_autograd_function()


class _Operations(TorchDispatchMode):
    """Shows every operation of torch."""

    supports_higher_order_operators = True

    def __init__(self, reads: WeightReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "_schema", None), "name", "")
        if outputs is not None and name.rpartition("::")[2] not in _SHAPE_ONLY:
            self.reads.look((args, kwargs), outputs)
        return outputs


class _Pointers(TorchFunctionMode):
    """Shows the memory that is handed to kernels torch does not know (Triton's)."""

    def __init__(self, reads: WeightReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.data_ptr:
            self.reads.look(args, None)
        return func(*args, **(kwargs or {}))


def _places(tensor: Any) -> list[tuple[int, int, int]]:
    """The memory of a tensor: storages, each with the first byte and the one after the last."""
    if is_sharded(tensor):
        return []
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        # int8 weights and other tensors that are made of tensors
        return [place for name in tensor.__tensor_flatten__()[0] for place in _places(getattr(tensor, name))]
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse ones, and other tensors without memory of that kind
        return []
    if not tensor.numel():
        return []
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    first = tensor.storage_offset() * tensor.element_size()
    return [(storage, first, first + span * tensor.element_size())]


def _in_autograd_function() -> bool:
    """Whether the forward of an `autograd.Function` runs, in which gradients are off though one is wanted."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None


def refuse_reads(model: nn.Module, found: list[Slice]) -> None:
    """Stop a run that reads weights behind the backs of their slices.

    Raises:
        ValueError: there are some that the model still has; all are named, with the setting that trains just these in
            full.
    """
    own = set(grass_slices(model))
    found = [slice_ for slice_ in found if slice_ in own]
    if not found:
        return
    names = [slice_.state.name for slice_ in found]
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    is_head = heads is not None and any(slice_.weight is heads.weight for slice_ in found)
    head = " (the output head's)" if is_head else ""
    raise ValueError(
        f"the loss reads the weights of {', '.join(names)}{head} without calling the modules that hold them, as fused "
        "losses and kernels do, so their slices would get a part of the gradient or none: train these in full, "
        f"{exclusion(model, names)}."
    )


def exclusion(model: nn.Module, names: list[str]) -> str:
    """The setting that leaves modules out beside those that are left out already, for code and for ``optim_args``."""
    before = conversion_of(model).config.exclude_modules
    if isinstance(before, str):
        pattern = "|".join([f"({before})", *(name.replace(".", r"\.") for name in names)])
        return f"exclude_modules={pattern!r}"
    together = [*(before or ()), *names]
    return f"exclude_modules={together!r} (in optim_args: exclude_modules={';'.join(together)})"


def watch_first_step(trainer: Trainer) -> None:
    """Have a Trainer's next training step looked at, whatever class it is of; see [Note: a read behind the back].

    The instance's ``training_step`` stands in for its class's until one step has been taken.
    """
    original = trainer.training_step

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        model = trainer.model
        # Under ZeRO-3 a run was aborted with such a mode in force, nearly every time; the reason was not found.
        if model is None or not is_converted(model) or any(is_partitioned(p) for p in model.parameters()):
            return original(*args, **kwargs)
        with leaving_heads(), WeightReads(model) as reads:
            loss = original(*args, **kwargs)
        end_watch(trainer)
        refuse_reads(model, reads.found)
        return loss

    trainer.training_step = marked(training_step, original)  # type: ignore[method-assign]  # of this one Trainer


def end_watch(trainer: Trainer) -> None:
    """Give a Trainer its own ``training_step`` back, if it is still watched."""
    own = vars(trainer).get("training_step")
    original = original_of(own)
    if original is None:
        return
    if getattr(original, "__func__", None) is getattr(type(trainer), "training_step", None):
        del trainer.training_step
    else:
        trainer.training_step = original  # type: ignore[method-assign]  # somebody had put one there
