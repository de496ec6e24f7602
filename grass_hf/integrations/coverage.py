"""How much of the compressed weights a run reaches, from its settings and the number of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..config.settings import GrassConfig


@dataclass(frozen=True)
class Coverage:
    """How much of the compressed weights a run of so many steps reaches.

    Attributes:
        steps: that are planned.
        turn: steps that a weight's rows take together, K / density, of the smallest density.
        most: the share that is trained at most, if no row is selected twice before all were.
        expected: the share to expect; None where the rule's choice cannot be foretold.
    """

    steps: int
    turn: int
    most: float
    expected: float | None


def coverage_of(slices: list[tuple[int, int, int]], config: GrassConfig, steps: int) -> Coverage | None:
    """What share of the weights is trained within `steps`.

    Args:
        slices: (rank, size of the side that is selected from, elements of the weight) of each.
        config: of the run.
        steps: optimizer steps.
    """
    if not slices:
        return None
    # random rows are trained in the first step, and after it the first ones are selected
    choosing = min(steps, config.select_until or steps)
    turns = math.ceil(choosing / config.update_interval)
    weights = sum(elements for _, _, elements in slices)

    def mean(share: Callable[[float], float]) -> float:
        return sum(share(rank / size) * elements for rank, size, elements in slices) / weights

    most = mean(lambda density: min(1.0, (turns + 1) * density))
    if config.selection == "cycle":
        expected = mean(lambda density: 1 - (1 - density) * (1 - min(1.0, turns * density)))
    elif config.selection == "top_r":
        expected = None
    else:  # as if all rows were equally likely
        expected = mean(lambda density: 1 - (1 - density) ** (turns + 1))
    turn = max(math.ceil(config.update_interval * size / rank) for rank, size, _ in slices)
    return Coverage(steps, turn, most, expected)
