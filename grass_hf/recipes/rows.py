"""Rows, each with the place it came from.

[Note: rows and their places] `Rows` keeps the numbers that its rows have in the files. What is made of rows goes
through `Rows.made`: whatever a row raises stops the run with file and line, or with `data.bad_rows=skip` the row is
left out and counted. The result is cached by the fingerprint of `datasets`, which hashes the function with all it
holds: the tokenizer, its template, the settings.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .places import BadRow, first_line, place

EVERY = range(sys.maxsize)


@dataclass
class Rows:
    """A dataset, and where its rows come from.

    Attributes:
        dataset: `datasets.Dataset`, or `IterableDataset` when streaming.
        name: of what they are, for sentences.
        files: the local files, if the dataset has their rows in their order; else empty.
        numbers: of its rows in those files.
        bad: places and reasons of bad rows that were left out.
        empty: how many rows with nothing to learn were left out.
        cut: how many rows were longer than `data.sequence_length`.
        tail: tokens of documents that filled no whole block and were left out.
    """

    dataset: Any
    name: str
    files: list[str] = field(default_factory=list)
    numbers: Sequence[int] = EVERY
    bad: list[str] = field(default_factory=list)
    empty: int = 0
    cut: int = 0
    tail: int = 0

    @property
    def streaming(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names or self.first())

    def first(self) -> dict[str, Any]:
        """The first row.

        Raises:
            ValueError: there is none.
        """
        row = next(iter(self.dataset), None)
        if row is None:
            raise ValueError(f"{self.name} has no rows: give another dataset or split.")
        return row

    def limited(self, count: int | None) -> Rows:
        """The first rows."""
        if count is None:
            return self
        take = self.dataset.take if self.streaming else lambda n: self.dataset.select(range(min(n, len(self.dataset))))
        return replace(self, dataset=take(count))

    def made(self, function: Any, *, skip: bool, workers: int = 1, most: int | None = None) -> Rows:
        """Apply a function to every row; see [Note: rows and their places].

        Args:
            function: of one row: the new row, or None for one with nothing to learn. `function.features` has the new
                columns. A key ``length`` that is no column says how many tokens there were before the row was cut.
            skip: leave bad rows out instead of stopping at the first.
            workers: processes.
            most: a longer row counts as cut.

        Raises:
            ValueError: a row is bad, with its place (of a stream, as soon as it is read), or none is left.
        """
        from datasets import Features, Value

        given = self.dataset.features or {}
        batch = _Batch(function, list(function.features), dict(given), self.name, self.files, self.numbers, skip)
        batch.streaming = self.streaming
        kinds = {**function.features, "note": Value("string"), "length": Value("int64")}
        features = None if None in kinds.values() else Features(kinds)
        options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": self.columns}
        if self.streaming:
            dataset = self.dataset.map(batch, features=features, **options)
            return replace(self, dataset=dataset.remove_columns(["note", "length"]), files=[], numbers=EVERY)
        options |= {"num_proc": workers if workers > 1 else None, "desc": f"preparing {self.name}"}
        dataset = self.dataset.map(batch, features=features, **options)
        notes, lengths = list(dataset["note"]), list(dataset["length"])
        kept = [number for number, note in enumerate(notes) if note is None]
        bad = [note for note in notes if note]
        if not kept:
            reason = f"the first: {bad[0]}" if bad else "nothing is left to learn within data.sequence_length"
            raise ValueError(f"{self.name} has no row that can be used ({reason}): give other rows.")
        dataset = dataset.remove_columns(["note", "length"])
        if len(kept) < len(notes):
            dataset = dataset.select(kept)
        cut = sum((lengths[number] or 0) > most for number in kept) if most else 0
        return Rows(dataset, self.name, [], EVERY, bad, len(notes) - len(kept) - len(bad), cut)


@dataclass
class _Batch:
    """What `map` calls. It is a class and not a closure so that its hash holds just what decides the result."""

    function: Callable[[dict[str, Any]], dict[str, Any] | None]
    columns: list[str]
    features: dict[str, Any]
    name: str
    files: list[str]
    numbers: Sequence[int]
    skip: bool
    streaming: bool = False
    versions: tuple[str, ...] = field(default_factory=lambda: versions())

    def __call__(self, rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
        made: dict[str, list] = {name: [] for name in (*self.columns, "note", "length")}
        for at, number in enumerate(numbers):
            result, note = self._one({name: rows[name][at] for name in rows}, number)
            if result is None and self.streaming:
                if note:
                    warnings.warn(f"left out: {note} (data.bad_rows=skip).", stacklevel=2)
                continue
            for name, values in made.items():
                values.append(note if name == "note" else (result or {}).get(name))
        return made

    def _one(self, row: dict[str, Any], number: int) -> tuple[dict[str, Any] | None, str | None]:
        try:
            result = self.function({name: _without_nulls(row[name], self.features.get(name)) for name in row})
        except Exception as error:  # a template raises what it likes
            known = isinstance(error, BadRow)
            reason = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
            number = self.numbers[number]
            where = place(self.files, number) if self.files else f"{self.name}, row {number + 1}"
            if not self.skip:
                raise ValueError(f"{where}: {reason} (data.bad_rows=skip leaves such rows out).") from error
            return None, f"{where}: {reason}"
        return result, "" if result is None else None


def versions() -> tuple[str, ...]:
    """Of what makes tokens, since code that is imported is not hashed; our own changes between versions too."""
    found = (f"{package} {version(package)}" for package in ("trl", "transformers", "tokenizers", "jinja2"))
    own = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("chats", "encode", "layouts", "turns"))
    return (*found, *(hashlib.sha256(code).hexdigest() for code in own))


def _without_nulls(value: Any, feature: Any) -> Any:
    """A value without the fields that Arrow has filled with None because other rows have them."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _without_nulls(part, feature.get(key)) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part, getattr(feature, "feature", None)) for part in value]
    return value


def join(parts: list[Rows], weights: list[float], seed: int) -> Rows | None:
    """Rows of several datasets as one: one behind the other, or drawn with weights until each was seen whole."""
    if len(parts) < 2:
        return parts[0] if parts else None
    from datasets import concatenate_datasets, interleave_datasets

    found = [part.dataset for part in parts]
    if weights:
        shares = [weight / sum(weights) for weight in weights]
        dataset = interleave_datasets(found, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        dataset = concatenate_datasets(found)
    bad = [note for part in parts for note in part.bad]
    counts = (sum(part.empty for part in parts), sum(part.cut for part in parts))
    return Rows(dataset, " and ".join(part.name for part in parts), [], EVERY, bad, *counts)
