"""Fields of a dataclass: the types they accept, values that are written as text, and sentences about wrong ones."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "a list",
    dict: "a mapping of patterns to values",
}


def kinds_of(cls: type) -> dict[str, tuple[type, ...]]:
    """Plain classes that each field accepts, read off the annotations."""
    kinds = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = tuple(typing.get_origin(option) or option for option in options)
    return kinds


def unknown_key(key: str, known: Iterable[str], what: str) -> str:
    """The sentence for a key that nothing reads, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
    return f"{key!r} is not {what}: {hint}"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` for a value that is not one of the choices, with the nearest one."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}."
        raise ValueError(f"{name}={value!r} is not known: {hint}")


def check_type(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raise a `ValueError` for a value of none of these types (an int will do for a float)."""
    if isinstance(value, bool) and bool not in kinds:
        ok = False
    elif isinstance(value, int) and float in kinds:
        ok = True
    elif isinstance(value, (tuple, dict)):
        ok = type(value) in kinds and all(isinstance(item, str) for item in value)
    else:
        ok = isinstance(value, kinds)
    if not ok:
        wanted = " or ".join(_KIND_NAMES[k] for k in kinds if k is not type(None))
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}: {name} takes {wanted}.")


def check_expression(name: str, pattern: str) -> None:
    """Raise a `ValueError` for a pattern that is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # OverflowError: "a{99999999999}"
        raise ValueError(f"{name}={pattern!r} is not a valid regular expression ({error}).") from error


def parse(name: str, text: str, kinds: tuple[type, ...], where: str) -> Any:
    """The value of a field that is written as text.

    A list is written ``a;b``, a mapping ``pattern:value;pattern:value``.

    Args:
        kinds: what the field accepts, as `kinds_of` says.
        where: named in errors.
    """
    if text.lower() in ("none", "null") and type(None) in kinds:
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where}: {name}={text!r} is not true or false.")
        return text.lower() == "true"
    if dict in kinds:
        return dict(_pair(name, part, where) for part in filter(None, text.split(";")))
    if tuple in kinds and ";" in text:
        return tuple(filter(None, text.split(";")))
    if tuple in kinds and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", text):
        right = ";".join(part.strip() for part in text.split(","))
        raise ValueError(f"{where}: {name}={text!r}: names of a list are separated by semicolons: {name}={right}.")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"{where}: {name}={text!r} is not {_KIND_NAMES[kind]}.") from None
    return text


def _pair(name: str, text: str, where: str) -> tuple[str, int | float]:
    # a regular expression may hold colons itself
    pattern, _, value = text.rpartition(":")
    for kind in (int, float):
        try:
            if pattern:
                return pattern, kind(value)
        except ValueError:
            pass
    raise ValueError(f"{where}: {name}: {text!r} is not of the form pattern:number; separate pairs by semicolons.")
