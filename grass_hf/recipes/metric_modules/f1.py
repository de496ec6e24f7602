"""Harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN)."""

import evaluate

from grass_hf.recipes.metric_modules import averaged, info, ratio


class F1(evaluate.Metric):
    def _info(self):
        return info(__doc__, "int64")

    def _compute(self, predictions, references, average="binary", pos_label=1):
        score = averaged(
            predictions, references, average, pos_label, lambda tp, fp, fn: ratio(2 * tp, 2 * tp + fp + fn)
        )
        return {"f1": score}
