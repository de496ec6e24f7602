"""The change between two checkpoints as changed rows or columns, exact in both directions.

A change is kept as the exclusive or of the two tensors' bits where any bit differs: ``base ^ delta = tuned`` and
``tuned ^ delta = base``, bit for bit, with one copy of the data for both ways. Of every tensor whichever takes least is
kept: its changed rows, its changed columns, or all of it. What only one side has (another dtype, shape or name, a
changed config file) is kept as it is on each side.

Both sides' SHA-256 of every tensor and the headers of their safetensors files go along, so a delta refuses any other
base, and what it writes is the original folder's files byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import Checkpoint, appearing, as_matrices, check_order, pair, touched
from .stored import Entry, bits, digest, read_header, write, write_entries

_FORMAT = "grass-hf delta 1"
# Beside the weights: configuration, tokenizer, chat template, code. Not a trainer's state.
_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"}
_NOT = {"trainer_state.json"}
SIDES = ("base", "tuned")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """What a delta holds.

    Attributes:
        nbytes: of the delta's file.
        full: of the tuned checkpoint's weight files.
        axes: number of tensors by what was kept of them: "same" (nothing), "rows", "columns", "all", "new".
    """

    nbytes: int
    full: int
    axes: dict[str, int]


def save(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Progress = lambda name: None,
) -> Saved:
    """Write the delta between two checkpoints.

    Args:
        base, tuned: folders.
        output: the delta's file (a safetensors file).
        overwrite: replace a file of that name.
        progress: called with every tensor's name.

    Raises:
        ValueError: a folder is no checkpoint, they are of different models, or `output` exists.
    """
    sides = {"base": Checkpoint(base, "BASE"), "tuned": Checkpoint(tuned, "TUNED")}
    check_order(**sides)
    with appearing(output, overwrite=overwrite, inputs=[Path(base), Path(tuned)]) as path:
        manifest: dict[str, Any] = {"pairs": []} | {side: {} for side in SIDES}
        entries: dict[str, Entry] = {}
        axes = dict.fromkeys(("same", "rows", "columns", "all", "new"), 0)
        for number, (name, base_name) in enumerate(pair(*sides.values()).same.items()):
            progress(name)
            axis = _compare(sides, {"base": base_name, "tuned": name}, str(number), entries)
            if axis is not None:
                manifest["pairs"].append({"base": base_name, "tuned": name, "number": number, "axis": axis})
                axes[axis] += 1
        for side, checkpoint in sides.items():
            paired = {item[side] for item in manifest["pairs"]}
            for name in set(checkpoint.names) - paired:
                tensor = checkpoint.tensor(name)
                make = partial(_bits_of, checkpoint, name)
                entries[f"{side}:{name}"] = Entry(bits(tensor).dtype, tuple(tensor.shape), make)
                axes["new"] += side == "tuned"
            manifest[side]["headers"] = {file.name: read_header(file) for file in checkpoint.files}
            manifest[side]["tensors"] = {
                name: digest(checkpoint.tensor(name), checkpoint.dtype(name)) for name in checkpoint.names
            }
        _keep_files(sides, manifest, entries)
        write_entries(path, entries, {"format": _FORMAT, "manifest": json.dumps(manifest)})
        nbytes = path.stat().st_size
    return Saved(nbytes, sides["tuned"].nbytes, axes)


def apply(
    source: str | os.PathLike,
    delta: str | os.PathLike,
    output: str | os.PathLike,
    *,
    back: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda name: None,
) -> None:
    """Write the tuned checkpoint from the base and a delta, or the base from the tuned one.

    Args:
        source: folder of the base (with `back`, of the tuned checkpoint).
        delta: file that `save` wrote.
        output: folder to write.
        back: from tuned to base.
        overwrite: replace a folder of that name.
        progress: called with every tensor's name.

    Raises:
        ValueError: the delta was not made with this checkpoint, it is no delta, or `output` exists.
    """
    here, there = reversed(SIDES) if back else SIDES
    checkpoint = Checkpoint(source, here.upper())
    file, manifest = _opened(Path(delta))
    partners = {item[there]: item for item in manifest["pairs"]}

    def tensor(name: str) -> Tensor:
        progress(name)
        item = partners.get(name)
        if item is None:
            made = file.get_tensor(f"{there}:{name}")
        else:
            made = _patched(_checked(checkpoint, item[here], manifest, here, there), item, file)
        # the header says what dtype the bits are
        if digest(made, dtypes[name]) != manifest[there]["tensors"][name]:
            raise ValueError(f"DELTA={delta} is damaged at {name}: copy it again.")
        return made

    with appearing(output, overwrite=overwrite, inputs=[checkpoint.folder, Path(delta)]) as folder:
        for name in set(manifest[here]["tensors"]) - {item[here] for item in manifest["pairs"]}:
            _checked(checkpoint, name, manifest, here, there)
        folder.mkdir()
        for name, header in manifest[there]["headers"].items():
            dtypes = {key: entry["dtype"] for key, entry in json.loads(header).items() if key != "__metadata__"}
            write(folder / name, header, tensor)
        for name, kept in manifest[there]["files"].items():
            (folder / name).write_bytes(_file(name, kept, checkpoint, there, file))


def _compare(sides: dict[str, Checkpoint], names: dict[str, str], key: str, entries: dict[str, Entry]) -> str | None:
    """What is kept of a tensor that both sides have; adds it to `entries`. None if they are of different kinds."""
    if len({(sides[side].dtype(name), sides[side].shape(name)) for side, name in names.items()}) > 1:
        return None
    old, new = (as_matrices(_bits_of(sides[side], names[side])) for side in SIDES)
    rows, columns = touched(old, new)
    if not rows.any():
        return "same"
    _, m, n = old.shape
    index = {axis: lines.flatten().nonzero().squeeze(1).int() for axis, lines in (("rows", rows), ("columns", columns))}
    size = {"rows": n, "columns": m}
    nbytes = {axis: len(kept) * (size[axis] * old.element_size() + 4) for axis, kept in index.items()}
    axis = min(nbytes, key=lambda axis: nbytes[axis])
    if nbytes[axis] >= old.nbytes:
        axis, shape = "all", tuple(old.shape)
    else:
        kept = index[axis]
        shape = (len(kept), size[axis])
        entries[f"{key}.index"] = Entry(torch.int32, tuple(kept.shape), lambda: kept)

    def make() -> Tensor:
        old, new = (as_matrices(_bits_of(sides[side], names[side])) for side in SIDES)
        if axis == "all":
            return old ^ new
        return _lines(old, axis)[kept.long()] ^ _lines(new, axis)[kept.long()]

    entries[f"{key}.bits"] = Entry(old.dtype, shape, make)
    return axis


def _patched(source: Tensor, item: dict[str, Any], file) -> Tensor:
    """The bits of the other side's tensor."""
    axis, key = item["axis"], item["number"]
    if axis == "same":
        return source
    made = as_matrices(source.clone())
    change = file.get_tensor(f"{key}.bits")
    if axis == "all":
        return (made ^ change).reshape(source.shape)
    index = file.get_tensor(f"{key}.index").long()
    lines = made if axis == "rows" else made.transpose(1, 2)
    where = index // lines.shape[1], index % lines.shape[1]
    lines[where] = lines[where] ^ change
    return made.reshape(source.shape)


def _lines(matrices: Tensor, axis: str) -> Tensor:
    """The rows or columns of (E, m, n), one below the other."""
    return (matrices if axis == "rows" else matrices.transpose(1, 2)).flatten(0, 1)


def _bits_of(checkpoint: Checkpoint, name: str) -> Tensor:
    return bits(checkpoint.tensor(name))


def _checked(checkpoint: Checkpoint, name: str, manifest: dict[str, Any], here: str, there: str) -> Tensor:
    """The bits of a tensor, after making sure that it is the one that the delta was made with."""
    place = f"{checkpoint.role}={checkpoint.folder}"
    if name not in checkpoint.names:
        raise ValueError(
            f"{place} has no {name}: it is not the checkpoint that the delta was made with, give that one."
        )
    found = digest(checkpoint.tensor(name), checkpoint.dtype(name))
    if found != manifest[here]["tensors"][name]:
        if found == manifest[there]["tensors"].get(name):
            raise ValueError(f"{place} is the {there} checkpoint already ({name}): there is nothing to do.")
        raise ValueError(
            f"{place}: {name} has other values than the {here} checkpoint that the delta was made with: give that one."
        )
    return _bits_of(checkpoint, name)


def _keep_files(sides: dict[str, Checkpoint], manifest: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Names and digests of the small files of both sides, and contents of those that are not the same."""
    found: dict[str, dict[str, bytes]] = {side: {} for side in SIDES}
    for side, checkpoint in sides.items():
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and file.suffix in _SUFFIXES and file.name not in _NOT:
                found[side][file.name] = file.read_bytes()
    for side, other in zip(SIDES, reversed(SIDES), strict=True):
        manifest[side]["files"] = {}
        for name, content in found[side].items():
            stored = found[other].get(name) != content
            manifest[side]["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "stored": stored}
            if stored:
                values = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
                entries[f"{side}/{name}"] = Entry(torch.uint8, (len(content),), partial(values.to, torch.uint8))


def _file(name: str, kept: dict[str, Any], checkpoint: Checkpoint, side: str, file) -> bytes:
    if kept["stored"]:
        return file.get_tensor(f"{side}/{name}").numpy().tobytes()
    path = checkpoint.folder / name
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != kept["sha256"]:
        raise ValueError(
            f"{checkpoint.role}: {path} is not the file that the delta was made with: give that checkpoint."
        )
    return content


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """A delta's tensors and its manifest."""
    if not path.is_file():
        raise ValueError(f"DELTA={path} is not a file: give what `grass-hf delta save` wrote.")
    try:
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        manifest = json.loads(metadata["manifest"]) if metadata.get("format") == _FORMAT else None
    except (OSError, SafetensorError, KeyError, ValueError):
        manifest = None
    if manifest is None:
        raise ValueError(f"DELTA={path} is no complete delta of `grass-hf delta save`: copy it again, or save it anew.")
    for side in SIDES:
        for name in [*manifest[side]["headers"], *manifest[side]["files"]]:
            if Path(name).name != name:  # it may come from anywhere
                raise ValueError(f"DELTA={path} would write {name!r} outside its folder: do not use it.")
    return file, manifest
