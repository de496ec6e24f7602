"""Share of predictions that equal their reference."""

import evaluate
import numpy as np

from grass_hf.recipes.metric_modules import info


class Accuracy(evaluate.Metric):
    def _info(self):
        return info(__doc__, "int64")

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
