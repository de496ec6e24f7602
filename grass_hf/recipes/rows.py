"""Where a row stands: the file and line of a row of local files, and what is wrong with a file that cannot be read.

`datasets` numbers rows through all files in their order; here the files are read once more, plainly, only when there
is something to report.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BadRow(ValueError):
    """A row that cannot be used; `reason` says why. `sources.Rows` adds where it stands."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def place(files: list[Path], number: int) -> str:
    """``"chats.jsonl, line 17"`` for the row of a number, counted from 0 through all files."""
    for file in files:
        for line, _ in _rows(file):
            if number == 0:
                return f"{file}, {line}"
            number -= 1
    return f"row {number}"


def complaint(files: list[Path]) -> str | None:
    """What is wrong with the first line of local files that is no row like the others; None if nothing is found."""
    kinds: dict[str, type] = {}
    for file in files:
        try:
            for line, row in _rows(file):
                if isinstance(row, Exception):
                    return f"{file}, {line}: {row}"
                if not isinstance(row, dict):
                    return f"{file}, {line}: a row is an object with fields, and here stands {_short(row)}"
                for key, value in row.items():
                    if value is not None and kinds.setdefault(key, _kind(value)) is not _kind(value):
                        return (
                            f"{file}, {line}: {key} is {_short(value)}, {_NAMES.get(_kind(value), 'another type')}, "
                            f"and {_NAMES.get(kinds[key], 'another type')} in the rows before"
                        )
        except (OSError, UnicodeDecodeError) as error:
            return f"{file}: {error}"
    return None


_NAMES = {str: "a string", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file's rows as plain Python; an exception in place of a row that cannot be read."""
    if file.suffix in (".jsonl", ".json"):
        yield from _json_rows(file)
    elif file.suffix in (".csv", ".tsv"):
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            start = reader.line_num
            for row in reader:
                start, line = reader.line_num, start + 1
                if None in row or None in row.values():
                    count = len([v for k, v in row.items() if k is not None and v is not None]) + len(row.get(None, ()))
                    yield f"line {line}", ValueError(f"{count} fields under {len(reader.fieldnames)} headings")
                else:
                    yield f"line {line}", row
    elif file.suffix == ".parquet":
        import pyarrow.parquet

        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    else:
        with file.open(encoding="utf-8") as lines:
            yield from ((f"line {number}", {"text": line}) for number, line in enumerate(lines, 1))


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from _listed_rows(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = ValueError(f"not valid JSON ({error})")
            yield f"line {number}", row


def _listed_rows(text: str) -> Iterator[tuple[str, Any]]:
    """Rows of one JSON list, with the line where each begins."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text) or text[at] == "]":
            return
        line = text.count("\n", 0, at) + 1
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:
            yield f"line {line}", ValueError(f"not valid JSON ({error})")
            return
        yield f"line {line}", row
