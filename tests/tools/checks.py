"""What must be true after a run in a tool: slices were trained, and nothing else of their weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shared import DENSITY


def weights(folder: Path) -> dict:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no safetensors in {folder}: {sorted(p.name for p in folder.iterdir())}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def history(folder: Path) -> list[dict]:
    """What the Trainer logged, from the newest trainer_state.json at or below a folder."""
    files = sorted(folder.rglob("trainer_state.json"), key=lambda p: p.stat().st_mtime)
    assert files, f"no trainer_state.json in {folder}"
    return json.loads(files[-1].read_text())["log_history"]


def assert_driven(before: dict, after: dict, targets: str = r"layers\.\d+\..*_proj\.weight$") -> None:
    """Slices were trained, and nothing else of the targets.

    Every target moved, in the columns of its first selection and of one more at most, and the keys are those of the
    plain model. A run that trained targets in full moves all columns; one that trained none moves no column.

    Args:
        before: tensors of the model by name, without weight decay in between.
        after: the same after the run.
        targets: regular expression for the names of the target weights.
    """
    assert before.keys() == after.keys(), f"other keys: {sorted(before.keys() ^ after.keys())[:6]}"
    names = [name for name in before if re.search(targets, name)]
    assert len(names) >= 8, f"only {names} match {targets}"
    for name in names:
        moved = (before[name].float() != after[name].float()).any(dim=0).sum().item()
        columns = before[name].shape[1]
        assert 0 < moved <= 2 * DENSITY * columns, f"{name}: {moved} of {columns} columns moved"
    print(f"{len(names)} targets moved, each in {2 * DENSITY:.0%} of its columns or fewer; keys are plain", flush=True)


def assert_table(said: str) -> None:
    """The start table was printed."""
    assert "Grass trains a slice of" in said, f"no start table in:\n{said[-3000:]}"


def assert_logged(log: list[dict]) -> None:
    """Coverage stands beside the losses of two steps."""
    rows = [row for row in log if "loss" in row]
    assert len(rows) == 2 and all(row["grass/coverage"] > 0 for row in rows), log


def assert_trained(model: Path, saved: Path, said: str, log: Path) -> None:
    """All of the above, for a tool over the Hugging Face Trainer.

    Args:
        model: folder of the model before.
        saved: folder of the saved model.
        said: what the tool printed.
        log: folder with a trainer_state.json.
    """
    assert_table(said)
    assert_driven(weights(model), weights(saved))
    assert_logged(history(log))
