import sklearn.metrics

from grass_hf.recipes import metric_modules


class Accuracy(metric_modules.OfClasses):
    """Share of predictions that equal their reference."""

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}
