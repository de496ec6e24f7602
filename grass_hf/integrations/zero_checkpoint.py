"""DeepSpeed's checkpoint files, looked at before any is read.

A checkpoint is a folder ``global_stepN`` with a file of model states and one of optimizer states per rank (of model
states too under ZeRO-3), and beside it the file ``latest`` with the folder's name, which is written last. The files are
zip archives, whose table of contents stands at their end: of a truncated one it is missing.
"""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch
import torch.distributed as dist


def check_files(engine, folder: str, tag: str | None) -> None:
    """Check that a checkpoint is complete, on all ranks together.

    Args:
        engine: DeepSpeed's.
        folder: that holds ``latest``.
        tag: name of the folder in it; None for the one that ``latest`` names.

    Raises:
        ValueError: naming a file that is missing or truncated, on every rank.
    """
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, _fault(engine, str(folder), tag))
    fault = next(filter(None, found), None)
    if fault:
        raise ValueError(
            f"{fault}: the checkpoint was not written to its end. Resume from an earlier one, or start anew from its "
            "weights."
        )


def read_client_state(engine, folder: str, tag: str | None) -> dict[str, Any]:
    """What was saved beside DeepSpeed's own model states, before DeepSpeed loads any; tensors are left on the disk."""
    name = engine._get_ckpt_name(folder, _tag(folder, tag))
    # as DeepSpeed itself reads it: the file holds objects of its own
    return torch.load(name, map_location="cpu", mmap=True, weights_only=False)


def _tag(folder: str, tag: str | None) -> str:
    if tag is not None:
        return str(tag)
    with open(os.path.join(folder, "latest"), encoding="utf-8") as file:
        return file.read().strip()


def _fault(engine, folder: str, tag: str | None) -> str | None:
    if tag is None and not os.path.isfile(latest := os.path.join(folder, "latest")):
        return f"{latest} is missing"
    tag = _tag(folder, tag)
    names = [engine._get_ckpt_name(folder, tag), engine._get_zero_ckpt_name(folder, tag)]
    for name in names:
        if not os.path.isfile(name):
            return f"{name} is missing"
        try:
            zipfile.ZipFile(name).close()
        except (zipfile.BadZipFile, OSError):
            return f"{name} is truncated"
    return None
