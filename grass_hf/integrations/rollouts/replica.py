"""A replica that follows a trainer's synchronisations through a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...optim.delta_apply import apply_patches, check_patches
from ...optim.delta_patches import Patch
from .files import SyncFile, read_folder

Triple = tuple[str, Tensor | None, Tensor]


class Replica:
    """Applies synchronisations to a state dict, in order and each once.

    Args:
        folder: that `SyncWriter` writes to.

    Attributes:
        sequence: of the last synchronisation that was applied, 0 before the first.
        step: the trainer's at that moment, -1 before the first.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.sequence, self.step = Path(folder), 0, -1
        self._ids: list[str] | None = None

    def catch_up(self, state: dict[str, Tensor]) -> int:
        """Apply all that is new; a replica that knows nothing begins with the newest anchor.

        Args:
            state: tensors by name, changed in place: ``model.state_dict()``.

        Returns:
            How many synchronisations were applied.

        Raises:
            ValueError: a file is missing, damaged, of another model, or follows another file than the last one; none
                of its values is written then.
        """
        applied = 0
        for files in self._new():
            self._check_order(files)
            patches = [patch for file in files for patch in file.patches()]
            aliases = files[0].manifest["aliases"]
            check_patches(state, map(triple, patches), aliases, files[0].path)
            apply_patches(state, map(triple, patches), aliases)
            self._ids = [file.manifest["id"] for file in files]
            self.sequence, self.step = files[0].sequence, files[0].manifest["step"]
            applied += 1
        return applied

    def _new(self) -> list[list[SyncFile]]:
        everything = read_folder(self.folder)
        if self._ids is None:
            anchors = [number for number, files in enumerate(everything) if files[0].is_anchor]
            if everything and not anchors:
                raise ValueError(
                    f"{self.folder} holds no anchor, only changes from {everything[0][0].path.name} on: have the "
                    "trainer write one, SyncWriter.write(full=True)."
                )
            return everything[anchors[-1] :] if anchors else []
        return [files for files in everything if files[0].sequence > self.sequence]

    def _check_order(self, files: list[SyncFile]) -> None:
        if all(file.is_anchor for file in files):
            return
        bases = [file.manifest["base"] for file in files]
        if self._ids is None or bases != self._ids:
            raise ValueError(
                f"{files[0].path} does not follow sync-{self.sequence:06}, which this replica has: a file between them "
                "is missing, or of another run. Have the trainer write an anchor, SyncWriter.write(full=True)."
            )


def triple(patch: Patch) -> Triple:
    """A patch as name, flat indices (None for all of the tensor) and values."""
    if patch.dim is None:
        return patch.name, patch.flat(), patch.values
    flat = torch.arange(patch.shape.numel()).view(patch.shape)
    assert patch.index is not None
    index = patch.index.long()
    if index.dim() == 1:
        places = flat.index_select(patch.dim, index)
    else:
        places = flat.gather(patch.dim, index.unsqueeze(-1 if patch.dim == -2 else -2).expand(patch.values.shape))
    return patch.name, places.reshape(-1), patch.values.reshape(-1)


def write_checkpoint(base: str | os.PathLike, folder: str | os.PathLike, output: Path) -> int:
    """Write the checkpoint that the last synchronisation in a folder stands for.

    Args:
        base: a folder with the trainer's model (safetensors, in shards or not); its other files are copied.
        folder: that `SyncWriter` wrote to.
        output: folder to write, that is not there yet.

    Returns:
        The trainer's step.

    Raises:
        ValueError: as `Replica.catch_up`; or the base is of another model.
    """
    base = Path(base)
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"BASE={base} holds no *.safetensors: name the folder of the trainer's model.")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state.update(load_file(shard))
    replica = Replica(folder)
    if not replica.catch_up(state):
        raise ValueError(f"DELTA={folder} holds no synchronisation: give the folder that SyncWriter writes to.")
    output.mkdir()
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata()
        save_file({name: state[name] for name in names}, output / shard.name, metadata=metadata)
    for path in _others(base):
        shutil.copy2(path, output / path.name)
    return replica.step


def _others(base: Path) -> Iterator[Path]:
    return (path for path in sorted(base.iterdir()) if path.is_file() and path.suffix != ".safetensors")
