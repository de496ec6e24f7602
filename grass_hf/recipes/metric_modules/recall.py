import sklearn.metrics

from grass_hf.recipes import metric_modules


class Recall(metric_modules.Averaged):
    """Share of what is true that was predicted."""

    score = staticmethod(sklearn.metrics.recall_score)
