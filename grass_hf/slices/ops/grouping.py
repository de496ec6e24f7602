"""Lists in parts of limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def groups_by_size(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Items in order, in groups of which each adds up to at most `most`, or holds one item that is larger.

    Args:
        items: read as the groups are.
        size: of an item, in bytes or elements.
        most: of a group.
    """
    group: list[Item] = []
    total = 0
    for item in items:
        own = size(item)
        if group and total + own > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += own
    if group:
        yield group
