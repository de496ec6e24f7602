"""Rows to train and to evaluate on, through `datasets`: hub ids, local files and folders, packaged texts.

`Rows` is a dataset that knows its files, so that an unusable row can be named by file and line. What is done to rows
goes through `Rows.convert`, which stops at the first bad row, or leaves bad rows out and counts them; only then are
rows held out, because their numbers are those in the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from .files import EVALUATION, builder, local_files, reason
from .packaged import TEXTS
from .rows import BadRow, place
from .schema import DataSection


@dataclass
class Rows:
    """A dataset, and where its rows come from.

    Attributes:
        dataset: `datasets.Dataset`, or `IterableDataset` when streaming.
        name: of what they are, for sentences.
        files: the local files, if the dataset has their rows in their order; else empty.
        bad: places and reasons of bad rows that were left out; filled while rows are read.
        dropped: rows that a conversion had no use for.
    """

    dataset: Any
    name: str
    files: list[Path] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    dropped: int = 0

    @property
    def streaming(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    @property
    def columns(self) -> list[str]:
        names = self.dataset.column_names
        return list(names) if names else list(next(iter(self.dataset), {}))

    def first(self) -> dict[str, Any]:
        """The first row.

        Raises:
            ValueError: there is none.
        """
        row = next(iter(self.dataset), None)
        if row is None:
            raise ValueError(f"{self.name} has no rows: give another dataset or split.")
        return row

    def where(self, number: int) -> str:
        return place(self.files, number) if self.files else f"{self.name}, row {number + 1}"

    def convert(
        self, function: Callable[[dict[str, Any]], dict[str, Any] | None], key: str, *, skip: bool, workers: int = 1
    ) -> Rows:
        """Apply a function to every row: another row, None to leave the row out, or `BadRow`.

        Args:
            function: of one row; its result replaces all columns.
            key: text that determines what the function does, so that a later run can take the result from the cache.
            skip: leave bad rows out instead of stopping at the first.
            workers: processes.

        Raises:
            ValueError: a row is bad, with its place; when streaming, as soon as it is read.
        """
        bad: list[str] = []

        def batch(rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
            made: dict[str, list] = {}
            names = list(rows)
            for position, number in enumerate(numbers):
                try:
                    row = function({name: rows[name][position] for name in names})
                except BadRow as error:
                    if not skip:
                        raise ValueError(
                            f"{self.where(number)}: {error.reason} (data.bad_rows=skip leaves such rows out)."
                        ) from error
                    bad.append(f"{self.where(number)}: {error.reason}")
                    row = None
                for column, value in (row or {}).items():
                    made.setdefault(column, []).append(value)
            return made or {name: [] for name in self._made(function)}

        # the bad rows that are left out must be counted, so they are looked for again each time, by one process
        made = self._map(
            batch, f"{skip} {key}", 1 if skip else workers, with_indices=True, load_from_cache_file=not skip
        )
        if not self.streaming:
            made.dropped -= len(bad)
            bad = [*self.bad, *bad]
        made.bad = bad
        return made

    def convert_batches(
        self, function: Callable[[dict[str, list]], dict[str, list]], key: str, workers: int = 1
    ) -> Rows:
        """Apply a function to a thousand rows at a time; its result replaces all columns, in any number of rows."""
        made = self._map(function, key, workers)
        made.dropped = self.dropped
        return made

    def _map(self, function: Callable, key: str, workers: int, **options: Any) -> Rows:
        # Under other names, or datasets would try to give a new column the type of the old one of its name.
        given = {name: f"given {name}" for name in self.columns}

        def renamed(rows: dict[str, list], *numbers: list[int]) -> dict[str, list]:
            return function({name: rows[given[name]] for name in given}, *numbers)

        if self.streaming:
            options.pop("load_from_cache_file", None)
        else:
            # of our own: a function's closure has much that does not change its result
            fingerprint = hashlib.sha256(f"{__version__} {self.dataset._fingerprint} {key}".encode()).hexdigest()[:32]
            options |= {"new_fingerprint": fingerprint, "desc": f"preparing {self.name}"}
            options |= {"num_proc": workers if workers > 1 else None}
        dataset = self.dataset.rename_columns(given)
        dataset = dataset.map(renamed, batched=True, remove_columns=list(given.values()), **options)
        dropped = 0 if self.streaming else self.dropped + len(self.dataset) - len(dataset)
        return Rows(dataset, self.name, [], self.bad, dropped)

    def _made(self, function) -> Iterator[str]:
        """Names of the columns that a function makes, for a batch in which it makes nothing."""
        for row in self.dataset:
            try:
                if (made := function(dict(row))) is not None:
                    return iter(made)
            except BadRow:
                continue
        raise ValueError(f"{self.name} has no row that can be used: look at data.layout and data.columns.")


def load_rows(data: DataSection) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on where they are a dataset or split of their own.

    Raises:
        ValueError: something cannot be found or read; the sentence names it.
    """
    train, evaluation = _load(data, data.dataset, data.split)
    if data.eval_dataset:
        evaluation, _ = _load(data, data.eval_dataset, data.eval_split or "train")
    elif data.eval_split and (evaluation is None or data.eval_split not in EVALUATION):
        evaluation, _ = _load(data, data.dataset, data.eval_split)
    train = _limited(train, data.max_train_rows)
    return train, None if evaluation is None else _limited(evaluation, data.max_eval_rows)


def hold_out(rows: Rows, data: DataSection, seed: int) -> tuple[Rows, Rows | None]:
    """Hold rows out for evaluation, as `data.holdout` says: a random part, of a stream the first rows.

    Raises:
        ValueError: nothing would be left, or a share of a stream is asked for.
    """
    if not data.holdout:
        return rows, None
    if rows.streaming:
        if data.holdout < 1:
            raise ValueError(
                f"data.holdout={data.holdout} is a share, and the length of a stream is not known: give a number of "
                "rows, an eval_split, or 0."
            )
        count = int(data.holdout)
        parts = {"train": rows.dataset.skip(count), "test": rows.dataset.take(count)}
    else:
        size = len(rows.dataset)
        count = int(data.holdout) if data.holdout >= 1 else max(1, round(data.holdout * size))
        if count >= size:
            raise ValueError(
                f"data.holdout={data.holdout} leaves nothing of the {size} rows of {rows.name} to train on."
            )
        parts = rows.dataset.train_test_split(test_size=count, seed=seed)
    evaluation = Rows(parts["test"], f"{rows.name} (held out)")
    return replace(rows, dataset=parts["train"], files=[]), _limited(evaluation, data.max_eval_rows)


def _load(data: DataSection, name: str, split: str) -> tuple[Rows, Rows | None]:
    if name in TEXTS:
        parts = TEXTS[name]()
        made = [Rows(_from_list(part, data.streaming), name) if part else None for part in parts]
        return made[0], made[1]
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return Rows(_from_disk(path, split), name), None
    found = local_files(path, name)
    if found:
        return _from_files(data, name, *found, split)
    return Rows(_from_hub(data, name, split), f"{name} ({split})"), None


def _from_files(data: DataSection, name: str, train: list[Path], evaluation: list[Path], split: str):
    from datasets import load_dataset

    kind, options = builder(train)
    if kind == "text":
        options = {"sample_by": data.sample_by}
    files = {"train": train, "evaluation": evaluation}
    parts: list[Rows | None] = [None, None]
    for number, (part, own) in enumerate(files.items()):
        if not own:
            continue
        wanted = "train" if number else split  # slices: train[:100]
        try:
            dataset = load_dataset(
                kind, data_files=[str(file) for file in own], split=wanted, streaming=data.streaming, **options
            )
            if data.streaming:
                next(iter(dataset), None)  # so that an unreadable file is found now
        except Exception as error:  # datasets raises what its readers raise
            raise ValueError(reason(error, own, name, wanted)) from error
        numbered = [] if "[" in wanted or (kind == "text" and data.sample_by != "line") else own
        parts[number] = Rows(dataset, name if part == "train" else f"{name} (evaluation)", numbered)
    return parts[0], parts[1]


def _from_disk(path: Path, split: str):
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"data: {path} has no split {split!r}: it has {', '.join(dataset)}.")
    return dataset[split]


def _from_hub(data: DataSection, name: str, split: str):
    from datasets import load_dataset

    try:
        return load_dataset(name, data.dataset_config, split=split, streaming=data.streaming)
    except Exception as error:  # the hub's client, the network and the builders raise all kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data: {name!r} (configuration {data.dataset_config or 'default'}, split {split}) is no local file and "
            f"cannot be loaded from the hub ({first}): packaged texts are {', '.join(TEXTS)}."
        ) from error


def _from_list(rows: list[dict[str, Any]], streaming: bool):
    from datasets import Dataset

    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


def _limited(rows: Rows, count: int | None) -> Rows:
    if count is None:
        return rows
    if rows.streaming:
        return replace(rows, dataset=rows.dataset.take(count))
    return replace(rows, dataset=rows.dataset.select(range(min(count, len(rows.dataset)))))
