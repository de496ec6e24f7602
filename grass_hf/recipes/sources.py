"""Where rows come from: `datasets` finds and reads them; local files, folders and patterns, hub ids, packaged texts."""

from __future__ import annotations

import csv
import glob
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .packaged import TEXTS
from .places import complaint, first_line
from .rows import Rows
from .schema import DataSection

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


def load_rows(data: DataSection) -> list[tuple[Rows, Rows | None]]:
    """The rows of every dataset to train on, each with those to evaluate on that are given or found beside them.

    Raises:
        ValueError: something cannot be found or read; the sentence names it.
    """
    found: list[tuple[Rows, Rows | None]] = []
    for name in data.dataset:
        rows, own = _load(data, name, data.split)
        if data.eval_dataset:
            own = None if found else _load(data, data.eval_dataset, data.eval_split or "train")[0]
        elif data.eval_split:
            own = _load(data, name, data.eval_split)[0]
        found.append((rows.limited(data.max_train_rows), own and own.limited(data.max_eval_rows)))
    return found


def hold_out(rows: Rows, data: DataSection, seed: int) -> tuple[Rows, Rows | None]:
    """Hold rows out for evaluation, as `data.holdout` says: a random part, of a stream the first rows.

    Raises:
        ValueError: a share of a stream is asked for.
    """
    from datasets import Dataset

    if not data.holdout:
        return rows, None
    name = f"{rows.name} (held out)"
    if rows.streaming:
        if data.holdout < 1:
            raise ValueError(
                f"data.holdout={data.holdout} is a share, and the length of a stream is not known: give a number of "
                "rows, an eval_split, or 0."
            )
        count = int(data.holdout)
        rest = replace(rows, dataset=rows.dataset.skip(count), numbers=range(count, sys.maxsize))
        return rest, replace(rows, dataset=rows.dataset.take(count), name=name).limited(data.max_eval_rows)
    size = len(rows.dataset)
    count = int(data.holdout) if data.holdout >= 1 else max(1, round(data.holdout * size))
    if count >= size:  # refused where rows are encoded, so that a bad row among them is named first
        kept, held = [], list(range(size))
    else:
        parts = Dataset.from_dict({"number": list(range(size))}).train_test_split(test_size=count, seed=seed)
        kept, held = list(parts["train"]["number"]), list(parts["test"]["number"])
    pick = rows.dataset.select
    held_out = replace(rows, dataset=pick(held), numbers=held, name=name).limited(data.max_eval_rows)
    return replace(rows, dataset=pick(kept), numbers=kept), held_out


def _load(data: DataSection, name: str, split: str) -> tuple[Rows, Rows | None]:
    """The rows of a split, and those for evaluation that a folder or a packaged text has beside it."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name).expanduser()
    if name in TEXTS:
        # in the cache of `datasets`, named by their hash: what is made of rows in memory would be made in every run
        sets = [Dataset.from_generator(partial(iter, part)) if part else None for part in TEXTS[name]()]
        parts = [part.to_iterable_dataset() if part and data.streaming else part for part in sets]
        return Rows(parts[0], name), None if parts[1] is None else Rows(parts[1], f"{name} (evaluation)")
    if path.is_dir() and any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(_no_split(split, dataset, name))
            dataset = dataset[split]
        return Rows(dataset, name), None
    source, options, files = _found(data, name, path)
    splits = list(files) if path.exists() or glob.has_magic(name) else []
    named = [part.split("[")[0].strip() for part in split.split("+")]
    if splits and not set(named) <= set(splits):
        raise ValueError(_no_split(split, splits, name))
    beside = next((part for part in ("validation", "test") if part in splits and part not in named), None)
    read: list[Rows] = []
    for part in (split, beside) if beside else (split,):
        try:
            dataset = load_dataset(source, split=part, streaming=data.streaming, **options)
            if data.streaming:
                next(iter(dataset), None)  # so that an unreadable file is found now
        except Exception as error:  # datasets raises what its readers raise
            raise ValueError(_reason(error, files.get(part.split("[")[0], []), name, part, data)) from error
        numbered = "[" not in part and options.get("sample_by", "line") == "line"
        shown = name if splits and part == split else f"{name} ({'evaluation' if splits else part})"
        read.append(Rows(dataset, shown, files.get(part, []) if numbered and splits else []))
    return read[0], read[1] if beside else None


def _no_split(split: str, splits: Any, name: str) -> str:
    return f"data: {name} has no split {split!r}: it has {', '.join(map(str, splits))}."


def _found(data: DataSection, name: str, path: Path) -> tuple[str, dict[str, Any], dict[str, list[str]]]:
    """What `load_dataset` is called with for a name, its options, and the files of each split."""
    from datasets import Features, Value, load_dataset_builder

    source, options = _where(name, path)
    if data.dataset_config:
        options["name"] = data.dataset_config
    try:
        config = load_dataset_builder(source, **options).config
    except Exception as error:  # the hub's client, the network and the builders raise all kinds
        raise ValueError(_reason(error, [], name, data.split, data)) from error
    files = {str(split): list(map(str, found)) for split, found in (config.data_files or {}).items()}
    local = [Path(file) for found in files.values() for file in found if Path(file).is_file()]
    if path.is_dir():
        every = (file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.suffix in KINDS)
        seen = [file for file in every if not any(part.startswith((".", "__")) for part in file.parts)]
        read = {file.suffix for file in local}
        other = sorted({file.suffix for file in seen} - read - {".json", ".txt"})
        other = other or ([".tsv"] if {".csv", ".tsv"} <= read else [])  # one separator is used for all
        if other:
            raise ValueError(
                f"data: {name} has files of several kinds, and those with {', '.join(other)} would not be read: name "
                f"the files of one kind, with a pattern like {name}/*{other[0]}."
            )
    if hasattr(config, "sample_by"):
        options["sample_by"] = data.sample_by
    if hasattr(config, "keep_default_na"):  # a CSV: words stay words, and cells stay as they are written
        options |= {"keep_default_na": False, "na_filter": False}
        if local:
            with local[0].open(encoding="utf-8-sig", errors="replace", newline="") as lines:
                head = next(csv.reader(lines, delimiter=config.sep), [])
            options["features"] = Features({column: Value("string") for column in head})
    return source, options, files


def check_local(data: DataSection) -> None:
    """Check that datasets whose names are paths exist, without reading them.

    Raises:
        ValueError: one does not.
    """
    for name in (*data.dataset, *([data.eval_dataset] if data.eval_dataset else ())):
        if name not in TEXTS:
            _where(name, Path(name).expanduser())


def _where(name: str, path: Path) -> tuple[str, dict[str, Any]]:
    if path.is_file():
        return str(path.parent.absolute()), {"data_files": {"train": [glob.escape(path.name)]}}
    if path.is_dir():
        return str(path.absolute()), {}
    if glob.has_magic(name):
        parts = path.absolute().parts
        first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        return str(Path(*parts[:first])), {"data_files": {"train": ["/".join(parts[first:])]}}
    if path.suffix in KINDS or name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"data: {name} is not a file or folder: give the path of one, a packaged text, or a hub id.")
    return name, {}


def _reason(error: Exception, files: list[str], name: str, split: str, data: DataSection) -> str:
    """Why rows could not be read: with the line, where there is one to blame."""
    found = complaint(file for file in files if Path(file).is_file())
    if found:
        return f"data: {found}."
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first = first_line(cause)
    if glob.has_magic(name) or Path(name).expanduser().exists():
        return f"data: {name} (split {split}) cannot be read: {first}."
    return (
        f"data: {name!r} (configuration {data.dataset_config or 'default'}, split {split}) is no local file and cannot "
        f"be loaded from the hub ({first}): packaged texts are {', '.join(TEXTS)}."
    )
