"""When a model is audited (`grass_hf.convert.audit.weight_reads`), and what becomes of the weights that were found.

Hooks on every module around a target start an audit with the outermost forward that is called, whichever module a
training loop calls. They go once every target was reached, at the latest with the first optimizer step.

[Note: the forward that found something] Weights that are found are trained in full from this very step on: their slices
are taken off, what the forward has drawn and written is put back, and it runs once more. A model in which nothing is
found runs once, and the hooks are gone after that.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ...slices.ops.double_backward import is_transformed
from ...slices.ops.sharding import is_partitioned, is_sharded, world_size
from ...slices.slice import Slice
from ..modules import GrassModule
from ..patterns import uses
from ..record import conversion_of
from . import outside
from .exclusion import exclusion, summary
from .freeing import free, say
from .rerun import NotPlainError
from .weight_reads import Audit

# Forwards that are looked at where no optimizer of ours ever steps and some weights are never reached.
_FORWARDS = 16
_CALL = nn.Module._call_impl.__code__
# what torch.compile gives a function
_COMPILED = "_torchdynamo_orig_callable"

_thread = threading.local()
# Not kept on the models, whose copies are other models: the root of every module with hooks, and what is known of it.
_roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


class _Seen:
    """What the audited forwards of a model have shown so far."""

    def __init__(self):
        self.structure: int | None = None
        self.names: set[str] = set()
        self.forwards = 0
        self.over = False


def watch(model: nn.Module) -> None:
    """Look at the coming training forwards of a converted model, until every target was reached or a step was taken.

    Every module around a target has the hooks, so that it does not matter which of them a training loop calls.
    """
    unwatch(model)
    _seen[model] = _Seen()
    for module in model.modules():
        if isinstance(module, (GrassModule, Slice)):
            continue
        if any(isinstance(inner, GrassModule) for inner in module.modules()):
            _roots[module] = weakref.ref(model)
            module.register_forward_pre_hook(_begin, with_kwargs=True)
            module.register_forward_hook(_end, with_kwargs=True, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Take the hooks away, also those that came with a copied model."""
    for module in model.modules():
        for hooks, others in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for number in [number for number, hook in hooks.items() if hook in (_begin, _end)]:
                for each in (hooks, *others):
                    each.pop(number, None)


def watch_again_if_changed(model: nn.Module) -> None:
    """Look once more at a model that has got other modules, or another forward, since it was looked at."""
    seen = _seen.get(model)
    if seen is None or seen.structure != _structure(model):
        watch(model)


def begin(model: nn.Module) -> None:
    """`watch`, and look at what a training loop itself does to weights (`outside`), until the first step is taken."""
    watch(model)
    outside.begin(model)


def end(model: nn.Module) -> None:
    """The model is restored: look at nothing more."""
    unwatch(model)
    outside.end(model)


def stepped(model: nn.Module) -> None:
    """The first step is taken: look at nothing more."""
    watched(model)
    outside.end(model)


def watched(model: nn.Module) -> None:
    """The model was looked at: look no more.

    Hooks that have never looked stay where they are: the model is compiled, and its graphs would be compiled again.
    """
    seen = _seen.setdefault(model, _Seen())
    seen.structure, seen.over = _structure(model), True
    if seen.forwards:
        unwatch(model)


def _structure(model: nn.Module) -> int:
    return hash(tuple((id(module), type(module), "forward" in vars(module)) for module in model.modules()))


@contextlib.contextmanager
def leaving_heads() -> Iterator[None]:
    """Free no embeddings and heads here: the caller refuses a run that reads them behind their slices' backs.

    They are the largest matrices. Whoever has them compressed may lack the memory to train them in full.
    """
    _thread.heads_are_refused = True
    try:
        yield
    finally:
        _thread.heads_are_refused = False


# -- hooks: functions of the module, so that models with them can be copied and pickled --------------------------------


def _begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._get_tracing_state():
        return
    if is_transformed():
        return
    model = _root(module)
    if model is None or torch._C._current_graph_task_id() != -1:  # backward runs forwards again, of checkpoints
        return
    seen = _seen.get(model)
    if seen is not None and seen.over:
        return
    if seen is None:  # a copy, with hooks of the original
        outside.begin(model)
    running = getattr(_thread, "audit", None)
    if running is not None:
        if _is_called(running.entry):
            return
        _leave(running)  # an interrupt has ended its forward, without any hook
    if _is_compiled(module):
        return
    audit = Audit(module, args, kwargs)
    audit.__enter__()
    _thread.audit = audit


def _end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    audit = getattr(_thread, "audit", None)
    if audit is None or audit.entry is not module:
        return None
    _leave(audit)
    model = _root(module)
    if output is None or model is None:  # the forward has raised
        return None
    seen = _seen.setdefault(model, _Seen())
    seen.forwards += 1
    seen.names |= audit.reached
    if audit.found:
        output = _mend(model, audit, args, kwargs, output)
    names = {slice_.state.name for slice_ in _slices(model)}
    if names <= seen.names or seen.forwards >= _FORWARDS:
        watched(model)
    return output if audit.found else None


def _mend(model: nn.Module, audit: Audit, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """See [Note: the forward that found something]."""
    refused = getattr(_thread, "heads_are_refused", False)
    slices = [slice_ for slice_ in _slices(model) if slice_ in audit.found and not (refused and slice_.vocabulary)]
    if not slices:
        return output
    link = conversion_of(model).driving
    driver = None if link is None else link.optimizer.grass
    try:
        _check_alone(model, slices)
        if driver is not None:
            driver.check_let_go(slices)
        args, kwargs = audit.rerun.inputs(args, kwargs)
    except (NotPlainError, ValueError) as error:
        raise read_behind(model, slices, str(error)) from None
    audit.rerun.undo(output)
    del output
    if driver is None:
        free(model, slices)
    else:
        driver.let_go(slices)
    say(slices)
    return audit.entry.forward(*args, **kwargs)


def _check_alone(model: nn.Module, slices: list[Slice]) -> None:
    if world_size() > 1 or nn.parallel.DistributedDataParallel._active_ddp_module is not None:
        raise ValueError("the model is wrapped for several processes by now")
    if any(is_sharded(slice_.active) or is_partitioned(slice_.active) for slice_ in slices):
        raise ValueError("the model is sharded by now")
    if any(slice_.active.grad is not None and bool(slice_.active.grad.any()) for slice_ in slices):
        raise ValueError("they hold gradients of an earlier forward by now")
    if len(slices) == len(_slices(model)):
        raise ValueError("nothing else would be compressed")


def read_behind(model: nn.Module, slices: list[Slice], why: str) -> RuntimeError:
    """The error for weights that the model reads behind their slices' backs and that cannot be freed now."""
    names = [slice_.state.name for slice_ in slices]
    others = [use.name for use in uses(model) if use.name not in names]
    return RuntimeError(
        f"the model reads {len(names)} weight(s) without calling the module that has them, so their slices would be "
        f"trained by a part of their gradient, or not at all: {summary(names)}. They cannot be trained in full from "
        f"here on ({why}), and training stopped before any weight was changed. Train just these in full with "
        f"{exclusion(names, others, conversion_of(model).config)}."
    )


def _slices(model: nn.Module) -> list[Slice]:
    return [module for module in model.modules() if isinstance(module, Slice)]


def _root(module: nn.Module) -> nn.Module | None:
    known = _roots.get(module)
    model = module if known is None else known()
    return model if getattr(model, "grass", None) is not None else None


def _is_called(module: nn.Module) -> bool:
    """Whether its forward runs, around the call that is about to begin."""
    calls = 0
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CALL:
            calls += 1
            if calls > 1 and frame.f_locals.get("self") is module:
                return True
        frame = frame.f_back
    return False


def _is_compiled(module: nn.Module) -> bool:
    """Whether a part of it is compiled, whose operations come from a graph and not from its modules."""
    for inner in module.modules():
        forward = vars(inner).get("forward")
        if inner._compiled_call_impl is not None or hasattr(inner, "_orig_mod") or hasattr(forward, _COMPILED):
            return True
    return False


def _leave(audit: Audit) -> None:
    _thread.audit = None
    modes = _get_current_dispatch_mode_stack()
    if modes and modes[-1] is audit:
        audit.__exit__(None, None, None)
