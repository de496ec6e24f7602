"""Is a Trainer's checkpoint whole? Asked before anything of it is loaded.

A checkpoint is a folder, written file by file: weights, optimizer, scheduler, every rank's random state, and, once all
ranks have written (`begin_save`, `end_save`), trainer_state.json. A job that is killed meanwhile leaves a folder that
looks like a checkpoint. What is missing is seen by its name, what was cut off by what each format says of its own
length: safetensors in the header, torch's files in a directory at their end, torch.distributed.checkpoint in its
metadata. So nothing is read whole, however large it is.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..slices.ops.sharding import check_agreement

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
# Files that are read on resuming; others in the folder are the user's.
_TORCH_FILES = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "pytorch_model*.bin",
    "adapter_model.bin",
)
_JSON_FILES = (STATE, "config.json", "*.index.json")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
_STEP = re.compile(r"checkpoint-(\d+)")
_SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")
_WEIGHTS = re.compile(
    r"model\.safetensors(\.index\.json)?|pytorch_model\.bin(\.index\.json)?|pytorch_model_fsdp(\.bin|_0)|adapter_model\..*"
)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest ``checkpoint-N`` of a Trainer's output folder that was written to its end.

    For ``trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))``, which starts anew where nothing
    has been saved yet: what a job that is restarted by itself (`torchrun --max-restarts`) wants.

    Args:
        output_dir: of the TrainingArguments; it need not exist.

    Returns:
        Path of the folder, None if there is none.
    """
    return next((str(folder) for folder in _newest_first(Path(output_dir)) if defect(folder) is None), None)


def resume_point(resume: str | bool, output_dir: str) -> str | bool:
    """The checkpoint that a run resumes from, checked, the same on all ranks.

    Args:
        resume: the Trainer's ``resume_from_checkpoint``: a folder, or True for the last checkpoint in `output_dir`,
            which is the last complete one; those that are passed over are named in a warning.
        output_dir: of the run.

    Raises:
        ValueError: the checkpoint is not whole, or none is; the sentence says which file is wrong and how, and which
            checkpoint to resume from instead.
        RuntimeError: the ranks do not see the same checkpoint.
    """
    if resume is True:
        folders = list(_newest_first(Path(output_dir))) if os.path.isdir(output_dir) else []
        if not folders:
            return resume  # the Trainer has a sentence for this
        defects: list[str] = []
        for folder in folders:
            found = defect(folder)
            if found is None:
                break
            defects.append(found)
        else:
            raise ValueError(
                f"{defects[0]}, and no other checkpoint in {output_dir} is complete: start anew, without "
                "resume_from_checkpoint."
            )
        resume = str(folder)
        if defects:
            logger.warning(f"{'; '.join(defects)}: resuming from {resume}, the last complete checkpoint.")
    elif (found := defect(resume := str(resume))) is not None:
        other = last_complete_checkpoint(Path(resume).absolute().parent)
        remedy = (
            f"resume from {other}, the last complete one" if other else "no other is complete beside it, start anew"
        )
        raise ValueError(f"{found}, so this checkpoint cannot be resumed from: {remedy}.")
    check_agreement("resuming", f"resume_from_checkpoint={resume}")
    return resume


def begin_save(trainer, trial) -> None:
    """Before the first file of a checkpoint: what an earlier run left under the same name is complete no longer."""
    folder = os.path.join(trainer._get_output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}")
    if trainer.args.should_save:
        Path(folder, STATE).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def end_save(trainer) -> None:
    """Before trainer_state.json is written: every rank has written its own files."""
    trainer.accelerator.wait_for_everyone()


def warn_without_optimizer(checkpoint: str) -> None:
    """Say what is lost where only the weights were saved."""
    if not any(os.path.exists(os.path.join(checkpoint, name)) for name in (*_OPTIMIZERS, "latest")):
        logger.warning(
            f"{checkpoint} holds no optimizer.pt: its weights are taken up, but the selection of rows and the "
            "optimizer state start anew (it was saved with save_only_model=True, perhaps)."
        )


def defect(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint folder, as the start of a sentence that names the file; None if it is whole."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"{folder} is no folder"
    return next(_defects(folder), None)


def _defects(folder: Path) -> Iterator[str]:
    names = {path.name for path in folder.iterdir()}
    yield from _missing(folder, names)
    for path in _matching(folder, _JSON_FILES):
        yield from _check_json(path)
    for path in _matching(folder, ("*.safetensors",)):
        yield from _check_safetensors(path)
    for path in _matching(folder, _TORCH_FILES):
        yield from _check_torch(path)
    for name in sorted(filter(_SHARDED.fullmatch, names)):
        if (folder / name).is_dir():
            yield from _check_sharded(folder / name)


def _missing(folder: Path, names: set[str]) -> Iterator[str]:
    if STATE not in names:
        yield f"{folder / STATE} is missing, which is written last: the job was stopped while it saved"
    if any(name.startswith("global_step") for name in names):
        yield from _check_zero(folder)
        return
    if not any(map(_WEIGHTS.fullmatch, names)) and not list(folder.glob("*/adapter_model.*")):
        parts = any(name.startswith("model-") for name in names)
        yield f"{folder / ('model.safetensors.index.json' if parts else 'model.safetensors')} is missing"
    optimizer = "optimizer.pt"
    for weights, its_optimizer in (
        ("pytorch_model_fsdp.bin", "optimizer.bin"),
        ("pytorch_model_fsdp_0", "optimizer_0"),
    ):
        if weights in names:
            optimizer = its_optimizer
        elif its_optimizer in names:
            yield f"{folder / weights} is missing, though {its_optimizer} is there"
    beside = sorted(name for name in names if name == "scheduler.pt" or name.startswith("rng_state"))
    if beside and optimizer not in names:
        yield f"{folder / optimizer} is missing, though {beside[-1]} is there"
    if optimizer in names and "scheduler.pt" not in names:
        yield f"{folder / 'scheduler.pt'} is missing, and the optimizer's state is of no use without it"


def _check_json(path: Path) -> Iterator[str]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        yield f"{path} is truncated ({path.stat().st_size} bytes that are no JSON)"
        return
    if path.name.endswith(".index.json"):
        for name in sorted(set(content["weight_map"].values())):
            if not (path.parent / name).is_file():
                yield f"{path.parent / name} is missing, which {path.name} lists"


def _check_safetensors(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        yield f"{path} is truncated or damaged ({error})"


def _check_torch(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        start = file.read(4)
    try:
        if start[:2] == b"PK":
            zipfile.ZipFile(path).close()
        else:  # the format before torch 1.6, or nothing at all
            torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError):
        yield f"{path} is truncated or damaged ({path.stat().st_size} bytes that torch cannot read)"


def _check_sharded(folder: Path) -> Iterator[str]:
    if not (folder / ".metadata").is_file():
        yield f"{folder / '.metadata'} is missing, which is written last: the job was stopped while it saved"
        return
    from torch.distributed.checkpoint import FileSystemReader  # not in every build of torch

    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
    except (EOFError, OSError, ValueError, AttributeError, pickle.UnpicklingError):
        yield f"{folder / '.metadata'} is truncated or damaged"
        return
    lengths: dict[str, int] = {}
    for place in stored.values():
        lengths[place.relative_path] = max(lengths.get(place.relative_path, 0), place.offset + place.length)
    for name, length in sorted(lengths.items()):
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing, which .metadata lists"
        elif path.stat().st_size < length:
            yield f"{path} is truncated ({path.stat().st_size} of {length} bytes)"


def _check_zero(folder: Path) -> Iterator[str]:
    """DeepSpeed's files, as far as they can be known without its engine (`zero_checkpoint` checks them again)."""
    if not (folder / "latest").is_file():
        yield f"{folder / 'latest'} is missing, which is written last: the job was stopped while it saved"
        return
    states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    if not states.is_dir():
        yield f"{states} is missing, which latest names"
        return
    for path in _matching(states, ("*_states.pt",)):
        yield from _check_torch(path)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _newest_first(output_dir: Path) -> list[Path]:
    numbered = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True) if path.is_dir()]
