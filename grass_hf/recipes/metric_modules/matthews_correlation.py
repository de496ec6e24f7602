import sklearn.metrics

from grass_hf.recipes import metric_modules


class MatthewsCorrelation(metric_modules.OfClasses):
    """Correlation of predicted and true classes, from -1 to 1 (Gorodkin 2004 for more than two); 0 is chance."""

    def _compute(self, predictions, references):
        return {"matthews_correlation": float(sklearn.metrics.matthews_corrcoef(references, predictions))}
