"""How a study's figures are written: perplexity in pretraining, a task's own scores beside the loss in finetuning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .rows import Row

# name of a score -> heading of its column, digits; a loss of other text is shown as perplexity
_SCORES = {"accuracy": ("accuracy", 3), "exact_match": ("exact match", 3), "general_loss": ("other text", 2)}


def task_of(row: Row) -> str:
    """Of the recipe of a row's study."""
    return row["document"].get("task", "pretraining")


def measure_of(row: Row) -> str:
    """What is compared: the loss of a classifier, else perplexity."""
    return "loss" if task_of(row) == "classification" else "perplexity"


def figure(row: Row, loss: float) -> str:
    """A mean loss as tables show it."""
    if loss == math.inf:
        return "diverged"
    if task_of(row) == "classification":
        return f"{loss:.3f}"
    return f"{math.exp(min(loss, 700.0)):.{1 if task_of(row) == 'pretraining' else 2}f}"


def headings(row: Row) -> list[str]:
    """Of a task's scores."""
    return [_SCORES[name][0] for name in row.get("scores_before") or {}]


def cells(rows: Sequence[Row], field: str = "scores") -> list[str]:
    """A task's scores, in the order of `headings`: the mean over rows, and "-" where a run diverged."""
    made = []
    for name in rows[0].get("scores_before") or {}:
        values = [row[field][name] for row in rows if row.get(field)]
        if len(values) < len(rows):
            made.append("-")
            continue
        mean = statistics.fmean(values)
        made.append(f"{math.exp(min(mean, 700.0)) if name == 'general_loss' else mean:.{_SCORES[name][1]}f}")
    return made


def before(row: Row) -> str:
    """What an untrained (in finetuning, a not yet finetuned) model has."""
    scores = [f"{head} {cell}" for head, cell in zip(headings(row), cells([row], "scores_before"), strict=True)]
    return ", ".join([f"{measure_of(row)} {figure(row, row['loss_before'])}", *scores])
