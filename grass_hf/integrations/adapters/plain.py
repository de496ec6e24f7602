"""Slices out of a checkpoint's files, for files that were written past the model.

DeepSpeed's ``zero_to_fp32.py`` writes every parameter that an optimizer had, slices among them, and early versions of
grass-hf had them in state dicts. The weights beside them are the trained ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# How the names end.
SUFFIX = "_slice.active"


def remove_slices(checkpoint: str | Path) -> int:
    """Rewrite a checkpoint's files without slices; one file is in memory at a time, and replaced once it is written.

    Args:
        checkpoint: a folder with ``*.safetensors`` or ``*.bin`` files, in shards or not, or one such file.

    Returns:
        The number of slices that were removed; files without any are left alone.

    Raises:
        ValueError: there are no such files, or the weight of a slice is in none of them.
    """
    place = Path(checkpoint)
    files = [place] if place.is_file() else [*sorted(place.glob("*.safetensors")), *sorted(place.glob("*.bin"))]
    files = [file for file in files if file.suffix in (".safetensors", ".bin")]
    names = {file: _names(file) for file in files}
    everything = {name for own in names.values() for name in own}
    if not everything:
        raise ValueError(f"{place} holds no tensors in *.safetensors or *.bin files: name a checkpoint's folder.")
    slices = {name for name in everything if name.endswith(SUFFIX)}
    if missing := sorted(slices - {f"{name}{SUFFIX}" for name in everything}):
        raise ValueError(
            f"{place} holds {missing[0]} without {missing[0].removesuffix(SUFFIX)}, the weight that it is a part of: "
            "name the folder with all files of the checkpoint."
        )
    for file, own in names.items():
        if slices.intersection(own):
            _rewrite(file, set(own) - slices)
    for index in place.glob("*.index.json") if place.is_dir() else ():
        _rewrite_index(index, slices)
    return len(slices)


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return [name for name, value in content.items() if isinstance(value, torch.Tensor)]


def _rewrite(file: Path, kept: set[str]) -> None:
    if not kept:
        file.unlink()
        return
    new = file.with_name(f".{file.name}.part")
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            # in the file's order
            tensors = {name: opened.get_tensor(name) for name in opened.keys() if name in kept}  # noqa: SIM118
            save_file(tensors, new, metadata=opened.metadata())
    else:
        content = torch.load(file, map_location="cpu", weights_only=True)
        torch.save({name: value for name, value in content.items() if not name.endswith(SUFFIX)}, new)
    os.replace(new, file)


def _rewrite_index(path: Path, slices: set[str]) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in slices}
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = sum(_sizes(path.parent / file) for file in set(index["weight_map"].values()))
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sizes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in _tensors(file))


def _tensors(file: Path) -> Iterator[torch.Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                yield opened.get_tensor(name)
    else:
        yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).values()
