import sklearn.metrics

from grass_hf.recipes import metric_modules


class Precision(metric_modules.Averaged):
    """Share of what was predicted that is true."""

    score = staticmethod(sklearn.metrics.precision_score)
