"""Local files of a dataset: which belong to a name, which are for evaluation, and who reads them."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from .rows import complaint

# By suffix: the builder of `datasets`, and its options.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
# A file or folder of such a name, or of validation-00000-of-00001, is for evaluation.
EVALUATION = ("validation", "valid", "dev", "eval", "test")


def local_files(path: Path, name: str) -> tuple[list[Path], list[Path]] | None:
    """The files to train on and those to evaluate on; None if the name is that of a dataset on the hub.

    Raises:
        ValueError: the name is a path, and there is nothing of a known kind.
    """
    if path.is_file():
        builder([path])
        return [path], []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS and file.is_file())
        if not files:
            raise ValueError(f"data: {name} is a folder without files of a known kind: {', '.join(BUILDERS)} are read.")
    elif any(sign in name for sign in "*?["):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        if not files:
            raise ValueError(f"data: {name} matches no file: look at the pattern and the working directory.")
    elif path.suffix in BUILDERS or name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"data: {name} is not a file or folder: give the path of one, a packaged text, or a hub id.")
    else:
        return None
    builder(files)
    evaluation = [f for f in files if any(part.split("-")[0] in EVALUATION for part in (f.stem, f.parent.name))]
    train = [file for file in files if file not in evaluation]
    return (train, evaluation) if train else (evaluation, [])


def builder(files: list[Path]) -> tuple[str, dict[str, Any]]:
    """The builder of `datasets` for some files, which must be of one kind, and its options."""
    kinds = {BUILDERS.get(file.suffix, (file.suffix or file.name, {}))[0] for file in files}
    if len(kinds) > 1 or files[0].suffix not in BUILDERS:
        raise ValueError(
            f"data: files of one known kind are read ({', '.join(BUILDERS)}), and {files[0].parent} has "
            f"{', '.join(sorted(kinds))}: name the files of one kind, with a pattern like data/*.jsonl."
        )
    return BUILDERS[files[0].suffix]


def reason(error: Exception, files: list[Path], name: str, split: str) -> str:
    """Why files could not be read: with the line, where there is one to blame."""
    found = complaint(files)
    if found:
        return f"data: {found}."
    while error.__cause__ is not None:
        error = error.__cause__
    return f"data: {name} (split {split}) cannot be read: {str(error).strip().splitlines()[0]}"
