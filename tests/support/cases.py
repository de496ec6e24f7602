"""Cases that ranks run under torchrun: tests/distributed/scripts/*_cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers import leave
from torch.utils._python_dispatch import TorchDispatchMode


def run_cases(cases: dict[str, Any], start: Callable[[str], object] = dist.init_process_group) -> None:
    """Run the cases that the command line names, after the number of ranks; rank 0 says "ok NAME" after each.

    Args:
        cases: functions by name; the script's ``globals()``.
        start: of the process group, given "gloo".
    """
    ranks, names = int(sys.argv[1]), sys.argv[2:]
    start("gloo")
    assert dist.get_world_size() == ranks, f"{dist.get_world_size()} ranks, not {ranks}"
    for name in names:
        cases[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print("ok", name, flush=True)
    leave()


class Traffic(TorchDispatchMode):
    """(operator, bytes) of every collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.seen.append((func._opname, max((t.nbytes for t in tensors), default=0)))
        return func(*args, **(kwargs or {}))
