"""Share of what was predicted that is true: TP / (TP + FP)."""

import evaluate

from grass_hf.recipes.metric_modules import averaged, info, ratio


class Precision(evaluate.Metric):
    def _info(self):
        return info(__doc__, "int64")

    def _compute(self, predictions, references, average="binary", pos_label=1):
        score = averaged(predictions, references, average, pos_label, lambda tp, fp, fn: ratio(tp, tp + fp))
        return {"precision": score}
