"""What is replaced in torch and transformers while a training step is simulated."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have another attribute in a module or a class meanwhile."""
    is_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:  # a class inherits it
            delattr(owner, name)


@contextmanager
def as_in_training() -> Iterator[None]:
    """Let transformers do under fake tensors what it does in training.

    It takes them for the capture of a graph, and then builds attention masks, and repeats keys and values for them,
    that training on unpadded sequences skips. And torch knows the shapes of experts' grouped products in bfloat16 only,
    those of transformers' own in every dtype.
    """
    with ExitStack() as patches:
        utilities = sys.modules.get("transformers.utils.import_utils")
        if hasattr(utilities, "is_fake_tensor"):
            patches.enter_context(replaced(utilities, "is_fake_tensor", lambda _: False))
        experts = sys.modules.get("transformers.integrations.moe")
        if can_use := getattr(experts, "_can_use_grouped_mm", None):

            def known(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> bool:
                return weight.dtype == torch.bfloat16 and can_use(x, weight, *rest)

            patches.enter_context(replaced(experts, "_can_use_grouped_mm", known))
        yield


@contextmanager
def resizes_told(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Tell of every storage whose size is changed: FSDP2 frees a gathered layer by setting the size of its storages to
    zero, which no operation tells of."""
    resize = torch.UntypedStorage.resize_

    @functools.wraps(resize)
    def resize_(storage: torch.UntypedStorage, *args: Any) -> Any:
        out = resize(storage, *args)
        tell(storage)
        return out

    with replaced(torch.UntypedStorage, "resize_", resize_):
        yield


def ddp_of_one_rank(model: nn.Module) -> nn.parallel.DistributedDataParallel:
    """DDP's wrapper on one rank of many that are not there, over parameters without values."""
    # ranks cannot compare parameters that have no values
    wrapped = nn.parallel.DistributedDataParallel(model, init_sync=False)
    wrapped.register_comm_hook(None, _reduce)
    wrapped.reducer = _FirstBuckets(wrapped.reducer)  # type: ignore[assignment]  # it passes all else on
    return wrapped


class _FirstBuckets:
    """DDP's reducer, but for what it does once, in its second forward: other buckets of the same bytes.

    In which order gradients came the ranks tell each other, in real numbers.
    """

    def __init__(self, reducer: dist.Reducer):
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str):
        return getattr(self._reducer, name)


def _reduce(_, bucket):
    """What DDP does with a full bucket, in place; the fake process group's own future has no result.

    Not annotated, because DDP reads annotations and takes no strings for them.
    """
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
