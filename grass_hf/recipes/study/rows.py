"""The rows of a study, on disk: whole lines of JSON only, so that an interrupted study goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.settings import GrassConfig

Row = dict[str, Any]

# Fields of Grass whose value decides about a run even where it is the default, which may change one day.
_NAMED = ("density", "rank", "update_interval", "selection", "side", "state_policy", "base")


def deciding(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that tell a method from others. Of Grass not those that have a default, of others not an empty
    pattern: a field that is new, and off, does not make another method of it."""
    if kind != "grass":
        return {name: value for name, value in settings.items() if value != {}}
    defaults = GrassConfig().to_dict()
    return {name: value for name, value in settings.items() if name in _NAMED or value != defaults.get(name, value)}


def read_rows(path: str | os.PathLike, mend: bool = False) -> list[Row]:
    """Rows of a file, none where there is no file.

    Args:
        path: of the file.
        mend: cut off a last line that is not whole; else it is passed over.

    Raises:
        ValueError: a line that is not the last is no row.
    """
    file = Path(path)
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if mend and whole != text:
        with file.open("r+b") as out:
            out.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            if row["bench"] == "quality":
                rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no row of a benchmark: remove it, or give another file."
            ) from error
    return rows
