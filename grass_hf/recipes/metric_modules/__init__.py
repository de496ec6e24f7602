"""Metrics as modules of `evaluate`, for machines without a hub: ``evaluate.load("<path of a file here>")``.

They have the names, arguments and values of the modules on the hub; those of classes are scikit-learn's, as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import evaluate

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("[a-z]*.py")))


def info(text: str, kind: str) -> evaluate.MetricInfo:
    """What `evaluate` wants to know of a metric: its description, and the type of predictions and references."""
    features = datasets.Features({name: datasets.Value(kind) for name in ("predictions", "references")})
    return evaluate.MetricInfo(description=text, citation="", inputs_description="", features=features)


class OfClasses(evaluate.Metric):
    """A score of scikit-learn's for the numbers of classes; the name of its module here is that of the metric."""

    def _info(self) -> evaluate.MetricInfo:
        return info(str(self.__doc__), "int64")


class Averaged(OfClasses):
    """A score per class, averaged: binary (of the class `pos_label`), macro, weighted, micro, or None for each."""

    score: Any

    def _compute(self, predictions, references, average="binary", pos_label=1):
        score = self.score(references, predictions, average=average, pos_label=pos_label, zero_division=0)
        return {self.name: score if average is None else float(score)}
