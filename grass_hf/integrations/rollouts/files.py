"""Synchronisations as files: a trainer writes one safetensors file for each, replicas apply them in order.

    sync-000001.safetensors                    the anchor: all weights
    sync-000002.safetensors                    what changed since
    sync-000003-1-of-2.safetensors             the same from the first of two ranks, each with its shards' part

A file's metadata is its manifest: which synchronisation it follows, the trainer's step, and a checksum of what it holds
and of what it follows. So a replica refuses a file that is damaged or that follows another one, before any of its
weights changes. Of every tensor elements or columns are stored, whichever takes fewer bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...optim.delta_patches import Patch
from ...optim.weight_delta import ASKED, WeightDelta
from ...slices.ops.bits import as_bits
from ...slices.ops.sharding import world_size

_FORMAT = "grass-hf synchronisation 1"
_NAME = re.compile(r"sync-(\d{6,})(?:-(\d+)-of-(\d+))?\.safetensors")


@dataclass(frozen=True)
class SyncFile:
    """One file, as its name and its manifest say.

    Attributes:
        path: of the file.
        sequence: its place in the folder.
        manifest: see `write`.
    """

    path: Path
    sequence: int
    manifest: dict[str, Any]

    @property
    def is_anchor(self) -> bool:
        """Whether it holds all weights, and so follows no other."""
        return self.manifest["base"] is None

    def patches(self) -> list[Patch]:
        """What it holds.

        Raises:
            ValueError: it is not what its checksum says.
        """
        found, state = [], hashlib.sha256(_said(self.manifest))
        try:
            with safe_open(self.path, framework="pt") as file:
                held = set(file.keys())
                for number, entry in enumerate(self.manifest["patches"]):
                    index = file.get_tensor(f"{number}.index") if f"{number}.index" in held else None
                    values = file.get_tensor(f"{number}.values")
                    _add(state, index, values)
                    found.append(
                        Patch(entry["name"], torch.Size(entry["shape"]), values, index, entry["dim"], entry["start"])
                    )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): have the trainer write an anchor again.") from error
        if state.hexdigest() != self.manifest["id"]:
            raise ValueError(f"{self.path} is damaged (its checksum differs): have the trainer write an anchor again.")
        return found


class SyncWriter:
    """Writes what a `WeightDelta` gives, one file a synchronisation; every rank calls it.

    Args:
        delta: of the trainer.
        folder: made if need be. What another run has left there stays, and an anchor follows it.

    Attributes:
        nbytes: of the last file, 0 if this rank had none to write.
    """

    def __init__(self, delta: WeightDelta, folder: str | os.PathLike):
        self.delta, self.folder, self.nbytes = delta, Path(folder), 0

    def write(self, *, full: bool = False) -> Path | None:
        """Write the next synchronisation; the file has its name once it is complete.

        Args:
            full: write an anchor whatever came before; the first file of a run is one.

        Returns:
            The file, None on a rank that has nothing to say (all but the first under DDP).

        Raises:
            ValueError: the file cannot be written. The next one is an anchor then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        speaks = self.delta.speaks
        own = dist.get_rank() if world_size() > 1 else 0
        last = _last(self.folder, own)
        ranks = _gathered((own, speaks, None if last is None else (last.sequence, *_run(last)), self.delta.key))
        self.delta.key = ranks[0][3]  # each rank had made one of its own
        speakers = [rank for rank, said, *_ in ranks if said]
        known = {at for _, said, at, _ in ranks if said}
        here = known.pop() if len(known) == 1 else None
        follows = not full and here is not None and here[1:] == (self.delta.key, self.delta.number)
        sequence = 1 + max([at[0] for _, _, at, _ in ranks if at is not None], default=0)
        if not follows:
            self.delta.all_changed(ASKED)
        patches = list(self.delta.packets())
        if not speaks:
            self.nbytes = 0
            return None
        place = f"-{speakers.index(own) + 1}-of-{len(speakers)}" if len(speakers) > 1 else ""
        path = self.folder / f"sync-{sequence:06}{place}.safetensors"
        base = last.manifest["id"] if follows and last is not None else None
        try:
            _write(path, patches, self._manifest(patches, base, sequence, own))
        except OSError as error:
            self.delta.all_changed("a synchronisation could not be written")
            raise ValueError(f"{path} cannot be written ({error.strerror or error}): give another folder.") from error
        self.nbytes = path.stat().st_size
        return path

    def _manifest(self, patches: list[Patch], base: str | None, sequence: int, rank: int) -> dict[str, Any]:
        sync = self.delta.last
        assert sync is not None
        return {
            "key": self.delta.key,
            "number": self.delta.number,
            "sequence": sequence,
            "step": sync.step,
            "rank": rank,
            "base": base,
            "aliases": self.delta.aliases,
            "patches": [
                {"name": patch.name, "shape": list(patch.shape), "dim": patch.dim, "start": patch.start}
                for patch in patches
            ],
        }


def _write(path: Path, patches: list[Patch], manifest: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    state = hashlib.sha256(_said(manifest))
    for number, patch in enumerate(patches):
        index = None if patch.index is None else patch.index.cpu().contiguous()
        values = patch.values.detach().cpu().contiguous()
        _add(state, index, values)
        if index is not None:
            tensors[f"{number}.index"] = index
        tensors[f"{number}.values"] = values
    manifest = {**manifest, "id": state.hexdigest()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"format": _FORMAT, "manifest": json.dumps(manifest)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_folder(folder: str | os.PathLike) -> list[list[SyncFile]]:
    """The synchronisations in a folder, in order, each as the files of its ranks; one that is not complete yet and
    stands at the end is left out.

    Raises:
        ValueError: a file cannot be read, or a rank's is missing.
    """
    found: dict[int, dict[int, Path]] = {}
    counts: dict[int, int] = {}
    for path in sorted(Path(folder).glob("sync-*.safetensors")):
        if match := _NAME.fullmatch(path.name):
            sequence = int(match[1])
            found.setdefault(sequence, {})[int(match[2] or 1)] = path
            counts[sequence] = int(match[3] or 1)
    complete = []
    for sequence, files in sorted(found.items()):
        if len(files) < counts[sequence]:
            if sequence == max(found):
                break
            missing = next(n for n in range(1, counts[sequence] + 1) if n not in files)
            raise ValueError(
                f"sync-{sequence:06}-{missing}-of-{counts[sequence]}.safetensors is missing in {folder}: have the "
                "trainer write an anchor again."
            )
        complete.append([read_manifest(files[number]) for number in sorted(files)])
    return complete


def read_manifest(path: str | os.PathLike) -> SyncFile:
    """A file's manifest.

    Raises:
        ValueError: it is no complete synchronisation.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        manifest = json.loads(metadata["manifest"]) if metadata.get("format") == _FORMAT else None
    except (OSError, SafetensorError, KeyError, ValueError):
        manifest = None
    if manifest is None:
        raise ValueError(f"{path} is no complete synchronisation of grass-hf: copy it again.")
    return SyncFile(Path(path), manifest["sequence"], manifest)


def _last(folder: Path, rank: int) -> SyncFile | None:
    """The last file that a rank has written."""
    for path in sorted(folder.glob("sync-*.safetensors"), reverse=True):
        try:
            found = read_manifest(path)
        except ValueError:
            continue  # an anchor follows
        if found.manifest["rank"] == rank:
            return found
    return None


def _run(file: SyncFile) -> tuple[str, int]:
    return file.manifest["key"], file.manifest["number"]


def _gathered(own: tuple) -> list[tuple]:
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def _said(manifest: dict[str, Any]) -> bytes:
    return json.dumps({key: value for key, value in manifest.items() if key != "id"}, sort_keys=True).encode()


def _add(state: Any, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            bits: Any = as_bits(tensor.reshape(-1)).numpy()
            state.update(memoryview(bits).cast("B"))
