"""The folders that a run writes to and resumes from, looked at before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def check_places(output_dir: str, resume: Any, overwrite: bool) -> None:
    """Check that the output folder can be written, is not another run's, and that a checkpoint to resume from is one.

    Args:
        output_dir: of the run.
        resume: what `training.resume_from_checkpoint` says.
        overwrite: whether the folder may hold something.

    Raises:
        ValueError: it is not so.
    """
    output = Path(output_dir)
    parent = output
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"training.output_dir={output}: {parent} is a file: give another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"training.output_dir={output}: there is no permission to write in {parent}: give another folder."
        )
    checkpoint = find_checkpoint(output_dir, resume)
    if checkpoint is None and not overwrite and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"training.output_dir={output} is not empty: give another folder, go on with its run "
            "(--resume_from_checkpoint true), or replace its files (--overwrite)."
        )


def find_checkpoint(output_dir: str, resume: Any) -> str | None:
    """The checkpoint to resume from: the one that is named, the last one for `true`, or None.

    Raises:
        ValueError: there is none, or it has no trainer state.
    """
    if resume in (None, False) or str(resume).lower() in ("false", "none", "null"):
        return None
    if str(resume).lower() == "true":
        # as transformers.trainer_utils.get_last_checkpoint, whose import takes seconds
        found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
        numbered = [(int(path.name[11:]), path) for path in found if path.name[11:].isdecimal()]
        if not numbered:
            raise ValueError(
                f"training.resume_from_checkpoint=true, but {output_dir} has no checkpoint: leave it out to start anew."
            )
        return str(max(numbered)[1])
    if not os.path.isfile(os.path.join(resume, "trainer_state.json")):
        what = "has no trainer_state.json" if os.path.isdir(resume) else "is no folder"
        raise ValueError(
            f"training.resume_from_checkpoint={resume} {what}: give a folder checkpoint-N that the Trainer wrote."
        )
    return str(resume)
