"""Correlation of predicted and true classes, from -1 to 1 (Gorodkin 2004 for more than two); 0 is chance."""

import evaluate
import numpy as np

from grass_hf.recipes.metric_modules import info


class MatthewsCorrelation(evaluate.Metric):
    def _info(self):
        return info(__doc__, "int64")

    def _compute(self, predictions, references):
        classes = np.unique(np.concatenate([predictions, references]))
        predicted, true = (np.asarray(values)[:, None] == classes for values in (predictions, references))
        predicted, true = (found - found.mean(0) for found in (predicted.astype(float), true.astype(float)))
        spread = np.sqrt((predicted**2).sum() * (true**2).sum())
        return {"matthews_correlation": float((predicted * true).sum() / spread) if spread else 0.0}
