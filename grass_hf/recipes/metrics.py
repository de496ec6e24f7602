"""What an evaluation measures: modules of `evaluate` by name, perplexity, and whether more or less of it is better.

Predictions are reduced where they are made (`preprocess_logits_for_metrics`), so that no logits are collected. TRL's
trainers make no logits at all: their perplexity is summed from the log-probabilities of their forward passes, and
metrics of texts compare the replies that the model generates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from ..config.fields import unknown_key
from .samples import generate
from .schema import Recipe

IGNORED = -100
# What is measured without being asked for, by task; TRL's other trainers have quantities of their own.
MEASURED = {
    "pretraining": ("loss", "perplexity", "token_accuracy"),
    "sft": ("loss", "perplexity", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss"),
    "classification": ("loss",),
}
_LOWER = "loss perplexity entropy wer cer ter mse rmse mae mape smape mase brier_score rewards/rejected logps/rejected"
_HIGHER = (
    "accuracy token_accuracy mean_token_accuracy f1 precision recall matthews_correlation exact_match rouge1 rouge2 "
    "rougeL rougeLsum bleu google_bleu sacrebleu meteor chrf bertscore pearson pearsonr spearmanr r_squared roc_auc "
    "squad rewards/accuracies rewards/margins rewards/chosen logps/chosen margin reward mean_reward max_reward"
)
_DIRECTIONS = dict.fromkeys(_LOWER.split(), False) | dict.fromkeys(_HIGHER.split(), True)


def more_is_better(name: str) -> bool | None:
    """Whether a higher value of a metric is the better one; None for a metric that is not known here."""
    name = name.removeprefix("eval_")
    return False if name.endswith("_loss") else _DIRECTIONS.get(name)


def direction(name: str, said: bool | None) -> bool:
    """What the Trainer's ``greater_is_better`` must be for a metric; `said` is what the recipe says of it.

    Raises:
        ValueError: the recipe says the opposite of what is known, or nothing of a metric that is not known.
    """
    known = more_is_better(name)
    if known is None and said is None:
        raise ValueError(
            f"training.metric_for_best_model={name}: whether more of it is better is not known here: say "
            "training.greater_is_better, true or false."
        )
    if said is not None and known not in (None, said):
        raise ValueError(
            f"training.greater_is_better={str(said).lower()} would keep the worst checkpoint by "
            f"metric_for_best_model={name}: leave it out."
        )
    return bool(said if known is None else known)


class Metrics:
    """The modules of ``evaluation.metrics``, tried once on two predictions.

    Args:
        recipe: names them; a classification without any has accuracy and F1.

    Attributes:
        names: of everything that the evaluation will measure; None where TRL decides.

    Raises:
        ValueError: one cannot be loaded, does not run, or does not fit the task.
    """

    def __init__(self, recipe: Recipe):
        task, known = recipe.task, MEASURED.get(recipe.task)
        asked = list(recipe.evaluation.metrics or (("accuracy", "f1") if task == "classification" else ()))
        if asked and known is None:
            raise ValueError(f"evaluation.metrics={asked}: TRL's trainer measures for task={task}: leave it out.")
        self.classes, kind = len(recipe.data.labels), "int64" if task == "classification" else "string"
        self.modules, names = {}, set(known or ())
        for name in asked:
            if name in names:
                continue  # perplexity, say, is measured anyway
            module = _load(name)
            if not _takes(module, kind) or task == "pretraining":
                has = {"pretraining": "tokens", "sft": "generated texts"}.get(task, "classes")
                raise ValueError(
                    f"evaluation.metrics: {name} does not compare what task={task} has, which is {has}: leave it out, "
                    f"{', '.join(known or ())} are measured anyway."
                )
            self.modules[name] = module
            values = ["a", "b"] if kind == "string" else [0, 1]
            try:
                names |= numbers(self._compute(name, values, values)).keys()
            except Exception as error:  # of the module's own code
                raise ValueError(
                    f"evaluation.metrics: {name} does not run ({type(error).__name__}: {error}): mend its module, or "
                    "leave it out."
                ) from error
        self.names = None if known is None else names

    def compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        """Every number that the modules make of predictions."""
        found: dict[str, float] = {}
        for name in self.modules:
            found |= numbers(self._compute(name, predictions, references))
        return found

    def _compute(self, name: str, predictions: list[Any], references: list[Any]) -> Mapping[str, Any]:
        module, options = self.modules[name], {}
        if "average" in inspect.signature(module._compute).parameters:
            more = self.classes > 2 or len(set(predictions) | set(references) | {0, 1}) > 2
            options["average"] = "macro" if more else "binary"
        return module.compute(predictions=predictions, references=references, **options) or {}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers: some modules return tables beside them."""
    return {name: float(v) for name, v in values.items() if isinstance(v, (int, float, np.number))}


def _load(name: str) -> Any:
    try:
        import evaluate

        from .metric_modules import FOLDER, NAMES
    except ImportError as error:
        raise ValueError("evaluation.metrics needs `evaluate`: pip install 'grass-hf[train]'.") from error
    try:
        return evaluate.load(str(FOLDER / f"{name}.py") if name in NAMES else name, keep_in_memory=True)
    except Exception as error:
        near = unknown_key(name, NAMES, "a metric here").removesuffix(".")
        raise ValueError(
            f"evaluation.metrics: {near}; nor can it be loaded as a module of `evaluate`, from the hub or from a path "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})."
        ) from error


def _takes(module: Any, kind: str) -> bool:
    features = module.features if isinstance(module.features, list) else [module.features]
    integers = ("int", "uint", "bool")
    for each in features:
        dtype = str(getattr(each.get("predictions"), "dtype", ""))
        if dtype == "string" if kind == "string" else dtype.startswith(integers):
            return True
    return False


def count_tokens(logits: Any, labels: Tensor) -> Tensor:
    """Per sequence, float64 (batch, 3): tokens predicted rightly, tokens predicted, and the sum of their losses.

    Args:
        logits: (batch, tokens, vocabulary), or a tuple that begins with them.
        labels: (batch, tokens), -100 where nothing is predicted.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    rows = []
    for scores, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one at a time: float32 of all is much
        counted = wanted != IGNORED
        loss = nn.functional.cross_entropy(scores.float(), wanted, ignore_index=IGNORED, reduction="sum")
        right = (scores.argmax(-1) == wanted) & counted
        rows.append(torch.stack([right.sum().double(), counted.sum().double(), loss.double()]))
    return torch.stack(rows)


def of_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """Share of tokens whose likeliest prediction is right, and perplexity, from what `count_tokens` has counted."""
    right, counted, loss = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    return {"token_accuracy": right / counted, "perplexity": perplexity(loss / counted)} if counted else {}


def perplexity(loss: float) -> float:
    """exp(mean loss in nats), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def measure(trainer: Any, recipe: Recipe, metrics: Metrics) -> None:
    """Let a new trainer measure what the recipe asks for.

    Raises:
        ValueError: replies would have to be generated by a model that is in pieces, or from packed rows.
    """
    if recipe.task == "pretraining":
        trainer.preprocess_logits_for_metrics, trainer.compute_metrics = count_tokens, of_tokens
    elif recipe.task == "classification":
        trainer.preprocess_logits_for_metrics = lambda logits, labels: _first(logits).argmax(-1)
        trainer.compute_metrics = lambda found: metrics.compute(found.predictions.tolist(), found.label_ids.tolist())
    elif recipe.task == "sft":
        if metrics.modules and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                f"evaluation.metrics={list(metrics.modules)} compare generated replies, and a model under FSDP or "
                "DeepSpeed does not generate here: leave them out, or use DDP."
            )
        packed = trainer.args.packing if trainer.args.eval_packing is None else trainer.args.eval_packing
        if metrics.modules and packed:
            raise ValueError(
                f"evaluation.metrics={list(metrics.modules)} compare the reply of each row, and training.packing puts "
                "several into one: add training.eval_packing: false."
            )
        # before the callbacks that look for the metric
        trainer.callback_handler.callbacks.insert(0, MeasureReplies(trainer, metrics, recipe.evaluation.generated_rows))


def _first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


class MeasureReplies(TrainerCallback):
    """Adds ``eval_perplexity`` and the metrics of texts to the evaluations of TRL's `SFTTrainer`.

    Args:
        trainer: whose model returns ``log_probs`` and ``label_mask`` of every token, zero where there is no label.
        metrics: of texts.
        most: rows of which the last reply is generated.
    """

    def __init__(self, trainer: Any, metrics: Metrics, most: int):
        self.trainer, self.metrics, self.most = trainer, metrics, most
        self.sums: list[Tensor] = []
        trainer.model.register_forward_hook(self._add)

    def _add(self, model: nn.Module, args: Any, output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is not None and not model.training:
            sums = -log_probs.detach().double().sum(), output.label_mask.sum().double()
            self.sums.append(torch.stack(sums))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        added, sums, self.sums = {}, self.sums, []
        if sums:
            loss, count = self.trainer.accelerator.reduce(torch.stack(sums).sum(0)).tolist()
            added["perplexity"] = perplexity(loss / max(count, 1))
        if self.metrics.modules and (rows := list(_replies(self.trainer.eval_dataset, self.most))):
            added |= self.metrics.compute(*self._generated(rows))
        added = {f"eval_{name}": value for name, value in added.items()}
        for entry in (metrics, state.log_history[-1] if state.log_history else None):
            if entry is not None and "eval_loss" in entry:
                entry |= added

    def _generated(self, rows: list[tuple[list[int], list[int]]]) -> tuple[list[str], list[str]]:
        """What the model says after each prompt, and what it should say: every process makes the same texts."""
        model, size = (
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.trainer.args.per_device_eval_batch_size,
        )
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
        options, said = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id}, list[str]()
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            most = max(len(reply) for _, reply in batch)
            said += generate(model, tokenizer, [prompt for prompt, _ in batch], most, **options)
        self.sums = []
        wanted = tokenizer.batch_decode([reply for _, reply in rows], skip_special_tokens=True)
        return [text.strip() for text in said], [text.strip() for text in wanted]


def _replies(rows: Any, most: int):
    """(prompt, reply) of the first rows, in tokens: the reply is the last run of tokens that have a label."""
    for row in rows.take(most):
        ids, labels = row["input_ids"], row["labels"]
        stop = max((at + 1 for at, label in enumerate(labels) if label != IGNORED), default=0)
        start = max((at + 1 for at in range(stop) if labels[at] == IGNORED), default=0)
        if 0 < start < stop:
            yield ids[:start], ids[start:stop]
