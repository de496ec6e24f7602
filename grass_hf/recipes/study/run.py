"""One run of a study, in this process: a recipe's model and text, a method, and the Trainer; what comes back is its
row.

Every run of a seed starts from the same weights and sees the same blocks in the same order, whatever the method
draws for itself. Held-out loss is the mean over tokens of evenly spaced blocks of the held-out documents, by the
same code for all.

[Note: counted bytes] The peak is counted in a run of its own of a few steps, in which projections and selections
happen on every second one (of Grass as many layers at a time as in the real run), so that the peak of an ordinary step
and of such a one, with all state in place, are both in it: live tensors (`measure.estimate.live_bytes`), weights,
gradients, optimizer state and activations together. Seconds are those of whole optimizer steps of the real run, without
evaluations.
"""

from __future__ import annotations

import math
import tempfile
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, set_seed

from ...integrations.base import base_class_and_kwargs
from ...integrations.trainer import GrassCallback
from ...measure.bench import record
from ...measure.bench.methods import KINDS, PACKAGES, check_installed, make_ready, trainer_flags
from ...measure.estimate.live_bytes import LiveBytes
from ..models import load_model
from ..parse import build_recipe
from ..schema import Recipe
from .grid import Method, Run
from .text import Text, shared_text
from .two_rates import TwoRateTrainer, grass_config

_COUNTED_GAP, _COUNTED_RATE = 2, 1e-4
_LOGGED_POINTS = 20


def run_row(run: Run, workers: int = 1) -> dict[str, Any]:
    """Train, and say what happened.

    Args:
        run: what.
        workers: runs that share this machine, for the row: its seconds mean little if there are several.

    Raises:
        ValueError: a package is missing, or the settings do not fit the model.
    """
    check_installed(run.method.kind)
    text = shared_text(run.study)
    with tempfile.TemporaryDirectory() as folder:
        return _row(run, text, folder, workers)


def _row(run: Run, text: Text, folder: str, workers: int) -> dict[str, Any]:
    peak = _counted_bytes(run, text, folder)
    follow = _Follow(run, text)
    trainer, recipe = _trainer(run, text, [follow], folder)
    model: Any = trainer.model
    started, scored = text.held_out.evaluate(model)
    scored |= text.held_out.costly(model)
    # the run itself
    try:
        trainer.train()
    except FloatingPointError:  # Grass refuses gradients that are not finite; the others go on with them
        follow.diverged = True
    # what it came to
    steps = trainer.state.global_step
    tokens_a_step = recipe.training.train_batch_size * recipe.training.gradient_accumulation_steps
    tokens_a_step = round(tokens_a_step * text.row_tokens)
    loss = None if follow.diverged else follow.validation[-1][1]
    history = [[h["step"], h["loss"]] for h in trainer.state.log_history if math.isfinite(h.get("loss", math.nan))]
    seconds = sum(follow.seconds)
    # what is filed
    row = {
        "bench": "quality",
        "key": run.key,
        "study": run.study.name,
        "method": run.method.name,
        "kind": run.method.kind,
        "optim": run.method.settings.get("base") or KINDS[run.method.kind].optim,
        "settings": run.method.settings,
        "learning_rate": run.learning_rate,
        "multiplier": run.multiplier,
        "seed": run.seed,
        "document": run.study.document,
        "targets": run.study.target_modules,
        "target_warmup": run.study.target_warmup,
        "text": text.digest,
        "status": "diverged" if follow.diverged else "finished",
        "steps": steps,
        "tokens": steps * tokens_a_step,
        "tokens_per_step": tokens_a_step,
        "evaluated_tokens": text.held_out.size,
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "loss_before": started,
        "train": history,
        "validation": follow.validation,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_bytes": peak,
        "seconds": seconds,
        "tokens_per_second": len(follow.seconds) * tokens_a_step / seconds if seconds else None,
        "workers": workers,
    }
    # and what only finetuning has
    return row | _of_finetuning(run, follow, scored) | record.machine(*PACKAGES)


def _of_finetuning(run: Run, follow: _Follow, scored: dict[str, float]) -> dict[str, Any]:
    """What a row of pretraining has not: `scored` is what the model's scores were before."""
    found: dict[str, Any] = {}
    if run.study.finetunes:
        found = {"scores_before": scored, "scores": None if follow.diverged else follow.all_scores()}
    return found if run.method.frozen is None else found | {"frozen": run.method.frozen}


def _trainer(
    run: Run, text: Text, callbacks: list[TrainerCallback], folder: str, **more: Any
) -> tuple[TwoRateTrainer, Recipe]:
    """The Trainer of a run, with the folder that it wants; `more` are further fields of TrainingArguments."""
    method, document = run.method, run.study.document
    flags = {"learning_rate": run.learning_rate, "seed": run.seed, "output_dir": folder, "save_strategy": "no"}
    flags |= {"report_to": "none", "disable_tqdm": True, "eval_strategy": "no", "logging_nan_inf_filter": False}
    steps = (document.get("training") or {}).get("max_steps") or 0
    flags |= {"logging_steps": max(1, steps // _LOGGED_POINTS), **more}
    words = [word for name, value in flags.items() for word in (f"--training.{name}", str(value))]
    words += trainer_flags(method.kind, method.settings, text.names)
    recipe = build_recipe(document, run.study.path, words, grass=False)
    if recipe.training.max_steps < 1:
        raise ValueError(f"{run.study.path}: training.max_steps={recipe.training.max_steps}: give the steps of a run.")
    set_seed(run.seed)
    model, targets = make_ready(
        method.kind, load_model(recipe, text.prepared.config), method.settings, text.names, method.frozen
    )
    if method.kind == "grass":
        config = grass_config(method.settings, run.multiplier, run.study.target_warmup)
        callbacks = [GrassCallback(config), *callbacks]
    base, made = method.settings.get("base"), {}
    if base is not None:
        factory = Trainer.get_optimizer_cls_and_kwargs
        made["optimizer_cls_and_kwargs"] = base_class_and_kwargs(recipe.training, base, {}, factory)
    trainer = TwoRateTrainer(
        model=model,
        args=recipe.training,
        train_dataset=text.prepared.train.dataset,
        data_collator=text.collate,
        callbacks=callbacks,
        targets=targets,
        multiplier=run.multiplier,
        target_warmup=0 if method.kind == "frozen" else run.study.target_warmup,
        **made,
    )
    return trainer, recipe


_peaks: dict[str, int] = {}


def _counted_bytes(run: Run, text: Text, folder: str) -> int:
    """Peak of live bytes in training; see [Note: counted bytes]."""
    method = run.method
    name = repr((run.study, method.kind, method.frozen, sorted(method.settings.items(), key=str)))
    if name not in _peaks:
        settings, gap = dict(method.settings), KINDS[method.kind].gap
        steps = max(_COUNTED_GAP, settings.get("stagger", 1))
        if gap is not None and settings[gap] < 10**6:
            settings[gap] = steps
        short = Method(method.name, method.kind, settings, method.learning_rates, method.multipliers, method.frozen)
        counter = _Count(2 * steps)
        again = Run(run.study, short, _COUNTED_RATE, 1.0, run.seed)
        trainer, _ = _trainer(again, text, [counter], folder, max_steps=2 * steps)
        trainer.train()
        _peaks[name] = counter.peak
    return _peaks[name]


class _Count(TrainerCallback):
    """Counts from the first step to the last of so many."""

    def __init__(self, steps: int):
        self.steps, self.peak = steps, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.mode = LiveBytes()
        self.mode.mark([*model.parameters(), *model.buffers()], "model")
        self.mode.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.peak = max(self.peak, self.mode.peak)
        self.mode.start()
        if state.global_step >= self.steps:
            self.mode.__exit__(None, None, None)


class _Follow(TrainerCallback):
    """Times optimizer steps, evaluates between them, and ends a run whose loss is no number any more.

    Attributes:
        seconds: of every step.
        validation: [step, loss on held-out text, seconds of training until then].
        scores: what else the last evaluation has shown.
        diverged: whether a loss was not finite.
    """

    def __init__(self, run: Run, text: Text):
        self.text, self.evaluations = text, run.study.evaluations
        self.seconds: list[float] = []
        self.validation: list[list[float]] = []
        self.scores: dict[str, float] = {}
        self.diverged = False

    def all_scores(self) -> dict[str, float]:
        """Those of the last evaluation, and the costly ones of the model as it is now."""
        return self.scores | self.text.held_out.costly(self.model)

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.model = model
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        step, steps = state.global_step, state.max_steps
        if step * self.evaluations // steps > (step - 1) * self.evaluations // steps:
            loss, self.scores = self.text.held_out.evaluate(model)
            if not math.isfinite(loss):
                self.diverged = control.should_training_stop = True
            else:
                self.validation.append([step, loss, sum(self.seconds)])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self.diverged = control.should_training_stop = True
