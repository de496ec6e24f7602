"""Weights that a training loop of one's own reads outside its model's forward, where a gradient comes back to them.

[Note: a gradient from outside] A penalty on ``module.weight``, or a fused loss that is given ``lm_head.weight``, is no
part of any forward that an audit could look at. Until the first optimizer step every operation on a frozen weight is
shown (`slices.frozen_weight`), and one that runs outside the products of the weight's own modules is given a stand-in
in its place: the same memory, with a node of autograd behind it. That node runs if, and only if, the weight would have
got a gradient there. It notes the weight, and at the end of the backward pass training stops, before a weight changes.
So whoever only looks (norms, copies, what is detached) is let alone, without a list of who may look.

Inside an autograd function gradients are off and no node can be put in: there the read itself stops training.

What is not seen: reads that begin after the first step, weights that are sharded (FSDP2) or stored in eight bits, and
what torch.compile has made.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ...slices.frozen_weight import FrozenWeight, show_operations
from ...slices.ops.double_backward import is_transformed
from ...slices.ops.tap import alias
from ...slices.slice import Slice
from ..patterns import uses
from ..record import conversion_of, grass_slices
from .callers import caller, has, in_compiled
from .exclusion import exclusion, summary
from .weight_reads import SHAPE_ONLY, is_looking

# Names in one sentence; more are told by their kinds.
_NAMES = 8
# Views through which a gradient comes back; of other attributes none does.
_VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
# They give no tensor, or one without a gradient, and some refuse a tensor that has a node behind it.
_NO_USE = {"detach", "numpy", "tolist", "item", "data_ptr", "storage", "untyped_storage", "share_memory_", "pin_memory"}
_NO_USE |= {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "is_set_to"}
_NO_USE |= {"__repr__", "__format__", "__str__", "__array__", "__deepcopy__", "__reduce_ex__", "__dlpack__", "__hash__"}
_NO_USE |= {"__setitem__", "__set__", "__delete__", "_has_compatible_shallow_copy_type", "has_names"}
# They may give the weight itself, which is shown again where it is used.
_CASTS = {"to", "type", "contiguous", "cpu", "cuda", "float", "double", "half", "bfloat16"}

# Models that wait for their first step.
_waiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def begin(model: nn.Module) -> None:
    """Look at what is done to a converted model's weights from now on."""
    _waiting.add(model)
    show_operations(_carry_out)


def end(model: nn.Module) -> None:
    """Look no more; the first step is taken, or the model is restored."""
    _waiting.discard(model)
    if not _waiting:
        show_operations(None)


def loss_reads(model: nn.Module, slices: list[Slice]) -> str:
    """What is said of weights that a loss reads outside the model's forward; all are named, with a remedy for these."""
    names = [slice_.state.name for slice_ in slices]
    others = [use.name for use in uses(model) if use.name not in names]
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    is_head = heads is not None and any(slice_.weight is heads.weight for slice_ in slices)
    said = (", ".join(names) if len(names) <= _NAMES else summary(names)) + (" (the output head's)" if is_head else "")
    remedy = f"train these in full, {exclusion(names, others, conversion_of(model).config)}"
    if len(names) == len(list(grass_slices(model))):
        remedy = "these are all that is compressed, so take what reads them out of the loss, or train without Grass"
    return (
        f"the loss reads the weights of {said} without calling the modules that hold them, as fused losses, kernels "
        "and penalties on weights do, so their slices would get a part of the gradient or none, and training stopped "
        "before any weight was changed. A penalty on every number by itself (L1, L2) can be taken over [p for p in "
        f"model.parameters() if p.requires_grad] instead, or left to the optimizer's weight_decay; else {remedy}."
    )


def _carry_out(func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
    kwargs = kwargs or {}
    with torch._C.DisableTorchFunctionSubclass():
        if not _waiting:
            show_operations(None)  # the last model is gone
            return func(*args, **kwargs)
        if is_looking() or torch._C._get_tracing_state() or torch.compiler.is_compiling() or is_transformed():
            return func(*args, **kwargs)
        if torch.is_grad_enabled():
            if getattr(func, "__name__", "") in _CASTS and isinstance(same := func(*args, **kwargs), FrozenWeight):
                return same
            if _is_use(func, args, kwargs):
                args, kwargs = tree_map_only(FrozenWeight, _stand_in, (args, kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if _is_read(func, args, result):
            tree_map_only(FrozenWeight, _refuse_in_function, (args, kwargs))
        return result


def _is_use(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a gradient may come back from what an operation gives, where gradients are recorded."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _VIEWS
    if kwargs.get("out") is not None or name in _NO_USE:
        return False
    is_dunder = name.startswith("__")
    in_place = hasattr(Tensor, "__" + name[3:]) and name[2] == "i" if is_dunder else name.endswith("_")
    written: Any = args[0] if args else None
    return not in_place or (type(written) in (Tensor, nn.Parameter) and written.requires_grad)


def _is_read(func: Any, args: tuple, result: Any) -> bool:
    """Whether an operation inside an autograd function gives something that is made of a weight's numbers."""
    name = getattr(func, "__name__", "")
    if name == "data_ptr":
        return True  # which a kernel is given that torch knows nothing of
    if name == "to" and not (args and isinstance(args[0], FrozenWeight)):
        return False
    if name in ("__get__", "detach", "type_as") or name in SHAPE_ONLY:
        return name == "__get__" and getattr(func.__self__, "__name__", "") in _VIEWS
    return any(isinstance(made, Tensor) and not isinstance(made, FrozenWeight) for made in tree_leaves(result))


def _stand_in(weight: FrozenWeight) -> Tensor:
    if _is_own(weight)[0] or (slice_ := _slice_of(weight)) is None:
        return weight
    anchor = torch.empty((), device=weight.device, requires_grad=True)
    return _StandIn.apply(weight.detach(), anchor, slice_)


def _refuse_in_function(weight: FrozenWeight) -> FrozenWeight:
    is_own, is_recorded = _is_own(weight)
    if is_recorded and not is_own and (slice_ := _slice_of(weight)) is not None:
        model = next(model for model in list(_waiting) if slice_ in grass_slices(model))
        raise RuntimeError(loss_reads(model, [slice_]))
    return weight


def _is_own(weight: FrozenWeight) -> tuple[bool, bool]:
    is_own, is_recorded = caller(lambda module: has(module, weight), certain=True)
    return is_own or in_compiled(), is_recorded


def _slice_of(weight: FrozenWeight) -> Slice | None:
    """The slice of a weight whose model waits for its first step."""
    slices = (slice_ for model in list(_waiting) for slice_ in grass_slices(model))
    return next((slice_ for slice_ in slices if slice_.owner._parameters.get(slice_.parameter) is weight), None)


class _StandIn(torch.autograd.Function):
    """A weight's memory, with a node that tells of a gradient that comes back; see [Note: a gradient from outside]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, slice_: Slice) -> Tensor:
        ctx.slice = slice_
        return alias(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        number = torch._C._current_graph_task_id()
        if number not in _met:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(functools.partial(_stop, number))
        _met.setdefault(number, []).append(ctx.slice)
        return None, None, None


# Slices to whose weights a backward pass that runs has brought a gradient, by its number.
_met: dict[int, list[Slice]] = {}


def _stop(number: int) -> None:
    met = set(_met.pop(number, ()))
    for model in list(_waiting):
        if found := [slice_ for slice_ in grass_slices(model) if slice_ in met]:
            raise RuntimeError(loss_reads(model, found))
