"""Seeing, while a Trainer makes its first loss, which compressed weights are computed with behind the slices' backs.

[Note: a read behind the back] A slice gets its gradient from the product that its own module makes. A loss that takes
``lm_head.weight`` and multiplies by it itself (TRL's fused head, Liger's and other fused cross-entropies, a penalty on
the weights) gives that slice nothing, and one that is tied to an embedding only the embedding's part. No list of such
losses is kept: during the first training step every operation is looked at (`convert.audit.weight_reads`), and one that
makes numbers out of a compressed weight's memory outside its module's forward stops the run, before a weight is
changed. It counts only where a gradient is wanted: metrics under `torch.no_grad` may read what they like.

A loop of one's own has `convert.audit.outside` for this, which sees less: weights that are sharded, or stored in eight
bits, are not looked at there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..convert.audit.outside import loss_reads
from ..convert.audit.watching import leaving_heads
from ..convert.audit.weight_reads import WeightReads
from ..convert.conversion import grass_slices, is_converted
from ..slices.ops.sharding import is_partitioned
from .marks import marked, original_of

if TYPE_CHECKING:
    from transformers import Trainer


class _StepReads(WeightReads):
    """Of a training step, in which the model's forward may run under `no_grad` too, to give a reference."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._began: list[bool] = []

    def begin(self, *_: Any) -> None:
        self._began.append(torch.is_grad_enabled())

    def end(self, *_: Any) -> None:
        self._began.pop()

    def wants_gradients(self) -> bool:
        return not self._began or self._began[-1]


class _Pointers(TorchFunctionMode):
    """Shows the memory that is handed to kernels torch does not know (Triton's)."""

    def __init__(self, reads: WeightReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.data_ptr:
            self.reads.look(args, None)
        return func(*args, **(kwargs or {}))


@contextmanager
def looked_at(model: nn.Module) -> Iterator[WeightReads]:
    """A context in which reads behind the slices' backs are noted.

    Args:
        model: converted, not wrapped.
    """
    # What torch.compile has made runs as it was written: no operation of it would be seen, and what it compiles under a
    # mode is of no use later.
    reads = _StepReads(model)
    with torch.compiler.set_stance("force_eager"), reads, _Pointers(reads), ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(reads.begin, prepend=True).remove)
        hooks.callback(model.register_forward_hook(reads.end, always_call=True).remove)
        yield reads


def refuse_reads(model: nn.Module, reads: WeightReads) -> None:
    """Stop a run that reads weights behind the backs of their slices.

    Raises:
        ValueError: there are some that the model still has; all are named, with the setting that trains just these in
            full.
    """
    if found := [slice_ for slice_ in grass_slices(model) if slice_ in reads.found]:
        raise ValueError(loss_reads(model, found))


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
        with leaving_heads(), looked_at(model) as reads:
            loss = original(*args, **kwargs)
        end_watch(trainer)
        refuse_reads(model, reads)
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
