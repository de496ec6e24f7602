"""Metrics as modules of `evaluate`, for machines without a hub: ``evaluate.load("<path of a file here>")``.

They have the names, arguments and values of the modules on the hub and need neither scikit-learn nor rouge_score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("[a-z]*.py")))


def info(text: str, kind: str) -> evaluate.MetricInfo:
    """What `evaluate` wants to know of a metric: its description, and the type of predictions and references."""
    features = datasets.Features({name: datasets.Value(kind) for name in ("predictions", "references")})
    return evaluate.MetricInfo(description=text, citation="", inputs_description="", features=features)


def averaged(predictions: Any, references: Any, average: str | None, pos_label: int, score: Any) -> Any:
    """A score of counts per class, averaged as in scikit-learn.

    Args:
        predictions, references: numbers of classes, of equal length.
        average: binary (the class `pos_label`), macro, weighted, micro, or None for one value per class.
        score: of the arrays true positives, false positives, false negatives.

    Raises:
        ValueError: the average is unknown, or is binary and there are more than two classes.
    """
    predicted, true = np.asarray(predictions), np.asarray(references)
    classes = np.unique(np.concatenate([predicted, true]))
    if average == "binary":
        if len(classes) > 2:
            raise ValueError("average='binary' with more than two classes: give average='macro'.")
        classes = np.array([pos_label])
    counts = [
        ((predicted == k) & (true == k), (predicted == k) & (true != k), (predicted != k) & (true == k))
        for k in classes
    ]
    hits, wrong, missed = (np.array([c[part].sum() for c in counts], float) for part in range(3))
    if average == "micro":
        hits, wrong, missed = (np.array([part.sum()]) for part in (hits, wrong, missed))
    scores = score(hits, wrong, missed)
    if average is None:
        return scores
    if average not in ("binary", "macro", "micro", "weighted"):
        raise ValueError(f"average={average!r} is not known: choose one of binary, macro, micro, weighted, None.")
    return float(np.average(scores, weights=hits + missed if average == "weighted" else None))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient that is 0 where nothing was found and nothing is there."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
