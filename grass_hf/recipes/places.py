"""Where a row stands: the file and line of a row of local files, and what is wrong with a file that cannot be read.

`datasets` numbers rows through all files in their order; here the files are read once more, plainly, only when there
is something to report.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any


class BadRow(ValueError):
    """A row that cannot be used, and why. `sources.Rows` adds where it stands."""


def place(files: Iterable[str], number: int) -> str:
    """``"chats.jsonl, line 17"`` for the row of a number, counted from 0 through all files."""
    for file in files:
        lines = _lines(str(file), os.stat(file).st_mtime_ns)
        if number < len(lines):
            return f"{file}, {lines[number]}"
        number -= len(lines)
    return f"row {number + 1}"


@lru_cache(maxsize=16)
def _lines(file: str, changed: int) -> list[str]:
    """The place of every row, kept for the next bad one."""
    return [line for line, _ in _rows(Path(file))]


def complaint(files: Iterable[str]) -> str | None:
    """What is wrong with the first line of local files that is no row; None if nothing is found."""
    kinds: dict[str, type] = {}
    files = list(files)
    for file in files:
        try:
            for line, row in _rows(Path(file)):
                if isinstance(row, Exception):
                    return f"{file}, {line}: {row}"
                if not isinstance(row, dict):
                    return f"{file}, {line}: a row is an object with fields, and here stands {shown(row)}"
                for key, value in row.items():
                    before = kinds.setdefault(key, type(value)) if value is not None else type(None)
                    if value is not None and before is not type(value) and {before, type(value)} != {int, float}:
                        return f"{file}, {line}: {key} is {shown(value)}, and a {before.__name__} in the rows before"
        except (OSError, UnicodeDecodeError) as error:
            return f"{file}: {error}"
    empty = [str(file) for file in files if not os.path.getsize(file)]
    return f"{empty[0]} is empty" if empty else None


def first_line(error: BaseException) -> str:
    """What an exception says first, for a sentence; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def shown(value: Any) -> str:
    """A value in a sentence, at most 60 characters of it."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file's rows as plain Python; an exception in place of a row that cannot be read."""
    if file.suffix in (".jsonl", ".json", ".ndjson"):
        yield from _json_rows(file.read_text(encoding="utf-8"))
    elif file.suffix in (".csv", ".tsv"):
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            start = reader.line_num
            names: Any = reader.fieldnames
            for row in reader:
                start, line = reader.line_num, start + 1
                if None in row:
                    count = len(names) + len(row[None])
                    yield f"line {line}", ValueError(f"{count} fields under {len(names)} headings")
                else:
                    yield f"line {line}", row
    elif file.suffix == ".txt":
        with file.open(encoding="utf-8") as lines:
            yield from ((f"line {number}", {"text": line}) for number, line in enumerate(lines, 1))
    elif file.suffix == ".parquet":
        import pyarrow.parquet

        yield from (
            (f"row {number}", {}) for number in range(1, pyarrow.parquet.ParquetFile(file).metadata.num_rows + 1)
        )


def _json_rows(text: str) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines, or of one JSON list with the line where each begins."""
    if text.lstrip().startswith("["):
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
    for number, words in enumerate(text.split("\n"), 1):
        if words.strip():
            try:
                row = json.loads(words)
            except ValueError as error:
                row = ValueError(f"not valid JSON ({error})")
            yield f"line {number}", row
