"""Collectives as torch dispatches them: every message of a process group, whoever sends it (DDP, FSDP2, Grass)."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")
# Parts of operators' names, in which torch's spellings (allreduce_, all_reduce, _allgather_base_) are alike.
_KINDS = {"allreduce": "all_reduce", "reducescatter": "reduce_scatter", "allgather": "all_gather"}
_KINDS |= {"broadcast": "broadcast"}


class CountCollectives(TorchDispatchMode):
    """Counts the collectives that are started while it is entered.

    Attributes:
        messages: (kind, bytes) of each, in order; the bytes are those of the whole: what is reduced, what is gathered.
            The kind is one of `measure.estimate.traffic.KINDS`, or torch's own name of an operator that is none of
            them.
    """

    def __init__(self):
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in _NAMESPACES and (size := max(map(_nbytes, args), default=0)):
            self.messages.append((_kind(func._opname), size))
        return func(*args, **(kwargs or {}))


def _nbytes(argument) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))


def _kind(operator: str) -> str:
    plain = operator.replace("_", "")
    return next((kind for part, kind in _KINDS.items() if plain.startswith(part)), operator)
