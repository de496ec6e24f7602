"""``grass-hf bench speed --host``: a step in which the host is the limit, as in small batches on a GPU.

The model is narrow and the batch is short, so that a step is Python and the launching of operations, on one thread.
The methods are stepped in turn, in changing order, and medians are compared; the operations that a step dispatches are
counted in a step by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import speed

# No step selects but those of "grass, observing", whose every step observes and selects.
_NEVER = 10**6
_SETTING = speed.Setting(
    rank=16, side="input", layers=12, hidden=64, vocabulary=256, batch=1, sequence=16, multiple=16, interval=_NEVER
)


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        method: a name of `measure.bench.methods.KINDS`.
        changes: to the setting.
        ratio: the most that its step should take of AdamW's; None where there is no target.
        operations: the most operations of torch that its step should dispatch.
    """

    method: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    ratio: float | None = None
    operations: int | None = None


CASES = {
    "adamw": Case("adamw"),
    "frozen": Case("frozen"),
    "grass": Case("grass", ratio=1.15, operations=2750),
    "grass, output side": Case("grass", {"side": "output"}),
    "grass, observing": Case("grass", {"interval": 1}, ratio=1.6),
    "grass, muon": Case("grass", {"base": "muon"}, ratio=1.25, operations=3000),
    "lora": Case("lora"),
}


@dataclass(frozen=True)
class Found:
    """What a case took.

    Attributes:
        seconds: of every counted step.
        operations: of torch, dispatched in one step; None of a compiled one.
    """

    seconds: list[float]
    operations: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def measure(rounds: int, dtype: torch.dtype, device: str, compiled: bool = False) -> Iterator[int | dict[str, Found]]:
    """Time all cases in turn; yields the number of each finished round, then what was found of each.

    Args:
        rounds: counted steps of every case, after five that are not.
        dtype: of the weights.
        device: "cpu" or "cuda".
        compiled: forward and backward of every case by torch.compile.
    """
    threads, warmup = torch.get_num_threads(), 5
    torch.set_num_threads(1)
    try:
        steps: dict[str, Callable[[], None]] = {}
        for name, case in CASES.items():
            setting = dataclasses.replace(_SETTING, compiled=compiled, **case.changes)
            steps[name] = speed.make_step(case.method, setting, dtype, device)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number, order in zip(range(warmup + rounds), itertools.cycle(speed.orders(tuple(steps))), strict=False):
            for name in order:
                elapsed = speed.timed(steps[name], device)
                if number >= warmup:
                    seconds[name].append(elapsed)
            yield number + 1 - warmup
        found = {}
        for name, step in steps.items():
            with _Count() as count:
                if not compiled:
                    step()
            found[name] = Found(seconds[name], None if compiled else count.operations)
        yield found
    finally:
        torch.set_num_threads(threads)
