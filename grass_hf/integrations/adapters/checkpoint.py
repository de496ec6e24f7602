"""A checkpoint folder read tensor by tensor, two of them side by side, and outputs that appear whole or not at all.

Nothing here builds a model: a tensor is mapped from its safetensors file when it is asked for, and the caller drops it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a training run leaves beside the weights.
_OF_A_RUN = ("training_args.bin", "trainer_state.json", "training.jsonl")
# Elements that are compared at a time: temporaries stay near 100 MB whatever the size of a tensor.
_BLOCK = 2**22


class Checkpoint:
    """The weights that `save_pretrained` wrote, in one safetensors file or in shards.

    Args:
        folder: the checkpoint's folder.
        role: what errors call it, "BASE" say.

    Raises:
        ValueError: the folder holds no complete safetensors checkpoint.
    """

    def __init__(self, folder: str | os.PathLike, role: str):
        self.folder, self.role = Path(folder), role
        self.files = self._files()
        self._homes: dict[str, Any] = {}
        for path in self.files:
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{role}: {path} is not a complete safetensors file ({error}): copy it again."
                ) from None
            self._homes |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> list[str]:
        return list(self._homes)

    @property
    def nbytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def tensor(self, name: str) -> Tensor:
        return self._homes[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._homes[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """In the words of safetensors: "BF16"."""
        return self._homes[name].get_slice(name).get_dtype()

    def _files(self) -> list[Path]:
        folder, role = self.folder, self.role
        if not folder.is_dir():
            raise ValueError(
                f"{role}={folder} is not a folder: give a checkpoint that save_pretrained wrote (a model of the hub "
                "is fetched with `hf download REPO --local-dir FOLDER`)."
            )
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        if (folder / INDEX).is_file():
            try:
                named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError):
                raise ValueError(f"{role}: {folder / INDEX} is not an index of safetensors: copy it again.") from None
            files = [folder / Path(name).name for name in sorted(set(named))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise ValueError(f"{role}={folder} lacks {', '.join(missing)}, which its index names: copy it again.")
            return files
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{role}={folder} is a PEFT adapter, not a model: give a whole checkpoint.")
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{role}={folder} holds pickled weights (.bin): load the model and save it once with save_pretrained, "
                "which writes safetensors."
            )
        raise ValueError(f"{role}={folder} has neither {WEIGHTS} nor {INDEX}: give a checkpoint of save_pretrained.")


def check_order(base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse folders that look swapped: the base is what a run has written, and the tuned one is not.

    Raises:
        ValueError: it is so.
    """
    left = [name for name in _OF_A_RUN if (base.folder / name).is_file()]
    if left and not any((tuned.folder / name).is_file() for name in _OF_A_RUN):
        raise ValueError(
            f"BASE={base.folder} holds files of a training run ({', '.join(left)}), TUNED={tuned.folder} none: "
            "they look swapped: give the base first, or, if they are right, take those files out of BASE."
        )


@dataclass(frozen=True)
class Pairs:
    """Tensors of two checkpoints that are the same weight: tuned name -> base name, and those of one side only."""

    same: dict[str, str]
    only_base: list[str]
    only_tuned: list[str]


def pair(base: Checkpoint, tuned: Checkpoint) -> Pairs:
    """Match names, also where one side lacks the prefix of the base model ("h.0.ln.weight", "transformer.h.0...").

    Raises:
        ValueError: the two have no weight in common.
    """
    names = set(base.names)
    prefixes = {name.split(".")[0] + "." for name in [*base.names, *tuned.names]}

    def matched(rename) -> dict[str, str]:
        return {name: rename(name) for name in tuned.names if rename(name) in names}

    tries = [matched(lambda name: name)]
    for prefix in sorted(prefixes):
        tries.append(matched(lambda name, p=prefix: name.removeprefix(p)))
        tries.append(matched(lambda name, p=prefix: p + name))
    same = max(tries, key=len)  # the first of equals: names as they are
    if not same:
        raise ValueError(
            f"BASE={base.folder} and TUNED={tuned.folder} have no weight of the same name: they are not of one "
            "model, give two checkpoints of one."
        )
    used = set(same.values())
    return Pairs(
        same,
        [name for name in base.names if name not in used],
        [name for name in tuned.names if name not in same],
    )


def as_matrices(tensor: Tensor) -> Tensor:
    """(E, m, n): the matrices of a tensor, 1 or one per expert; a vector is m numbers, each a row of its own."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1, 1)
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def touched(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of (E, m, n) in which two tensors differ anywhere: bool (E, m) and (E, n)."""
    experts, m, n = base.shape
    rows = torch.zeros(experts, m, dtype=torch.bool)
    columns = torch.zeros(experts, n, dtype=torch.bool)
    for expert, block in blocks(base):
        differs = base[expert, block] != tuned[expert, block]
        rows[expert, block] = differs.any(1)
        columns[expert] |= differs.any(0)
    return rows, columns


def blocks(tensor: Tensor) -> Iterator[tuple[int, slice]]:
    """Pieces of a tensor (E, m, n) of bounded size: an expert and a range of its rows."""
    experts, m, n = tensor.shape
    step = max(1, _BLOCK // max(n, 1))
    for expert in range(experts):
        for start in range(0, m, step):
            yield expert, slice(start, start + step)


@contextlib.contextmanager
def appearing(output: str | os.PathLike, *, overwrite: bool, inputs: list[Path]) -> Iterator[Path]:
    """A path to write a file or folder to; it gets the name `output` when the block ends, and is removed if it fails.

    Args:
        output: the name it is to have.
        overwrite: replace what has that name.
        inputs: what is read meanwhile, and so must not be replaced.

    Raises:
        ValueError: `output` exists and `overwrite` is false, it cannot be replaced safely, or not be written at all.
    """
    output = Path(os.path.abspath(output))
    _check_replaceable(output, overwrite, inputs)
    # beside it, so that the last step is a rename
    partial, replaced = (output.with_name(f".{output.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        _remove(replaced)
    except OSError as error:
        raise ValueError(
            f"output={output} cannot be written ({error.strerror or error}): give another place."
        ) from error
    finally:
        _remove(partial)
        if replaced.exists() and not output.exists():  # the last rename failed
            replaced.rename(output)


def _check_replaceable(output: Path, overwrite: bool, inputs: list[Path]) -> None:
    resolved = output.resolve()
    for path in inputs:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            raise ValueError(f"output={output} is or holds {path}, which is read: give another name.")
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"output={output} exists: give another name, or --overwrite to replace it.")
    if output.is_dir() and any(path.is_dir() for path in output.iterdir()):
        raise ValueError(f"output={output} has folders in it, so it is not replaced: give another name.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
