"""The setting that takes some weights out of Grass and no other: `exclude_modules`, as a sentence says it.

A list of full names frees each of these, since a name ends in itself; it would free more where a longer name ends so
too. Then, and where the list would be long, it is a regular expression, which must match the whole name: names that
differ in the numbers of layers become one. What is excluded already stays excluded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...config.settings import GrassConfig

# A longer list is written as a regular expression.
_LIST = 8
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def exclusion(names: Iterable[str], others: Iterable[str], config: GrassConfig) -> str:
    """How to write `exclude_modules` so that these names are freed: in Python, and as text in ``optim_args``.

    Args:
        names: full names of the modules (of the parameters, for experts) to be freed.
        others: full names that must stay compressed.
        config: of the run, whose own `exclude_modules` goes on.
    """
    value = patterns(list(dict.fromkeys(names)), set(others), config.exclude_modules)
    text = ";".join(value) if isinstance(value, list) else value
    return f"exclude_modules={_shown(value)} (in optim_args: exclude_modules={text})"


def patterns(names: list[str], others: set[str], already: tuple[str, ...] | str | None) -> list[str] | str:
    """The shortest value of `exclude_modules` that frees `names` and what was free already, and nothing of `others`."""
    unclear = any(other.endswith("." + name) for name in names for other in others)
    if not isinstance(already, str) and not unclear and len(names) + len(already or ()) <= _LIST:
        return [*(already or ()), *names]
    found = [_one(kind, members, others) for kind, members in _kinds(names).items()]
    if isinstance(already, str):
        found.insert(0, already)
    elif already:
        found.insert(0, rf"(.*\.)?({'|'.join(map(re.escape, already))})")
    return found[0] if len(found) == 1 else "|".join(f"({each})" for each in found)


def summary(names: Iterable[str]) -> str:
    """Names for people: those that differ in the numbers of layers are one, with how many they are."""
    kinds = _kinds(list(names)).items()
    return ", ".join(members[0] if len(members) == 1 else f"{kind} ({len(members)})" for kind, members in kinds)


def _kinds(names: list[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    return kinds


def _one(kind: str, names: list[str], others: set[str]) -> str:
    """A regular expression for names of one kind: any number, or those that occur, or the names as they are."""
    if len(names) == 1:
        return _escaped(names[0])
    any_number = r"\d+".join(_escaped(piece) for piece in kind.split("*"))
    if not any(re.fullmatch(any_number, other) for other in others):
        return any_number
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    numbers = [list(dict.fromkeys(column)) for column in columns]
    pieces = [_escaped(piece) for piece in kind.split("*")]
    listed = [column[0] if len(column) == 1 else f"({'|'.join(column)})" for column in numbers]
    these = pieces[0] + "".join(number + piece for number, piece in zip(listed, pieces[1:], strict=True))
    if not any(re.fullmatch(these, other) for other in others):
        return these
    return "|".join(map(_escaped, names))


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")  # all else in the name of a module is a letter, a digit or _


def _shown(value: list[str] | str) -> str:
    return f"r'{value}'" if isinstance(value, str) else repr(value)
