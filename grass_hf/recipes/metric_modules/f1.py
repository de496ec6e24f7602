import sklearn.metrics

from grass_hf.recipes import metric_modules


class F1(metric_modules.Averaged):
    """Harmonic mean of precision and recall."""

    score = staticmethod(sklearn.metrics.f1_score)
