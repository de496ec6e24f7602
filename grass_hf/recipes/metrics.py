"""What is measured at an evaluation, in plain functions: no script has to be fetched, as `evaluate` would.

Predictions are reduced where they are made (`preprocess_logits_for_metrics`), so that no logits are collected: to
(right, counted) per sequence for language models, to the likeliest class for classifiers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

IGNORED = -100


def count_tokens(logits: Any, labels: Tensor) -> Tensor:
    """How many tokens each sequence predicts rightly, and how many it predicts: (batch, 2).

    Args:
        logits: (batch, tokens, vocabulary), or a tuple that begins with them.
        labels: (batch, tokens), -100 where nothing is predicted.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    predicted, labels = logits[:, :-1].argmax(-1), labels[:, 1:]
    counted = labels != IGNORED
    return torch.stack([((predicted == labels) & counted).sum(1), counted.sum(1)], dim=1)


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of tokens whose likeliest prediction is right, from the counts of `count_tokens`."""
    right, counted = np.asarray(prediction.predictions).sum(0)
    return {"token_accuracy": float(right / counted) if counted else 0.0}


def likeliest_class(logits: Any, labels: Tensor) -> Tensor:
    """(batch,) numbers of classes from logits (batch, classes)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1: of the class 1 where there are two, else the mean over the classes."""
    predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    classes = np.unique(np.concatenate([predicted, labels]))
    wanted = [1] if set(classes) <= {0, 1} else classes
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": float(np.mean([f1(predicted == number, labels == number) for number in wanted])),
    }


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of boolean arrays; 0 where nothing is there and nothing was found."""
    right = np.count_nonzero(predicted & true)
    total = np.count_nonzero(predicted) + np.count_nonzero(true)
    return 2.0 * right / total if total else 0.0


def perplexity(loss: float) -> float:
    """exp(mean loss in nats), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class AddPerplexity(TrainerCallback):
    """Adds ``eval_perplexity`` to every evaluation, where metric_for_best_model can name it."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics and "eval_loss" in metrics:
            metrics["eval_perplexity"] = perplexity(metrics["eval_loss"])
            if state.log_history and "eval_loss" in state.log_history[-1]:
                state.log_history[-1]["eval_perplexity"] = metrics["eval_perplexity"]
