"""`grass-hf train`: everything a recipe says, in its order. Only the main process prints and writes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, Trainer, set_seed

from . import folders, preview
from .checks import check_model, check_settings, find_checkpoint
from .models import load_model
from .report import as_json, report_run
from .samples import write_samples
from .schema import Recipe
from .tasks import Prepared, build_trainer, prepare


def train(recipe: Recipe, *, overwrite: bool = False, json_file: Path | None = None) -> dict[str, Any]:
    """Train, evaluate, save and report.

    Args:
        recipe: what to do.
        overwrite: write into an output folder that is not empty.
        json_file: also write the results there.

    Returns:
        The results, as in `json_file`.

    Raises:
        ValueError: the recipe cannot be run; nothing has been trained or written then.
    """
    started = time.perf_counter()
    training, output = recipe.training, Path(recipe.training.output_dir)
    folders.check_places(training.output_dir, training.resume_from_checkpoint, overwrite)
    prepared = prepare(recipe)
    remarks = check_settings(recipe, prepared)
    check_model(recipe, prepared)
    checkpoint = find_checkpoint(recipe)
    say = Console(highlight=False, soft_wrap=True).print if training.process_index == 0 else _nothing
    for line in (*preview.describe(prepared, recipe.task), *remarks):
        say(escape(line))
    set_seed(training.seed)
    model = load_model(recipe, prepared.config)
    say(f"model: {recipe.model.name}, {model.num_parameters():,} parameters, {recipe.method}")
    with _nothing_left_behind(output):
        trainer = new_trainer(recipe, prepared, model)
        done = carry_out(trainer, recipe, prepared, checkpoint, output, say)
    results = _results(trainer, recipe, prepared, done, time.perf_counter() - started)
    if training.process_index != 0:
        return results
    asked = json_file is not None or recipe.evaluation.report  # it makes other arguments, which ends accelerate's state
    run = as_json(recipe, results, done.samples) if asked else {}
    for path in report_run(run, recipe, trainer, output):
        say(f"written: {path}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    for prompt, text in done.samples:
        say(f"generated: {escape(prompt)} {escape(text)}")
    say(closing(recipe.task, done.before, done.after))
    return results


@dataclass(frozen=True)
class Done:
    """What a run has measured and written.

    Attributes:
        before, after: metrics of the evaluations before and after training; empty where there was none.
        trained: metrics of training itself.
        samples: (prompt, continuation).
    """

    before: dict[str, Any]
    after: dict[str, Any]
    trained: dict[str, Any]
    samples: list[tuple[str, str]]


def new_trainer(recipe: Recipe, prepared: Prepared, model: PreTrainedModel) -> Trainer:
    """The task's trainer, with rows to train on.

    Raises:
        ValueError: the settings do not fit, or the trainer has left out all rows.
    """
    trainer = build_trainer(recipe, prepared, model)
    for what, rows in (("train", trainer.train_dataset), ("evaluate", trainer.eval_dataset)):
        if rows is not None and hasattr(rows, "__len__") and len(rows) == 0:
            raise ValueError(
                f"data.sequence_length={recipe.data.sequence_length}: no row to {what} on is left, as the prompts "
                "alone fill it: give a larger one."
            )
    return trainer


def carry_out(
    trainer: Trainer, recipe: Recipe, prepared: Prepared, checkpoint: str | None, output: Path, say: Any = None
) -> Done:
    """Train and save; then evaluate and write samples, which cannot take the weights away any more.

    The last evaluation comes after saving also because it may cast the model (``bf16_full_eval``).
    """
    # Within train(), where the model is wrapped: evaluate() before it leaves a model without DDP (accelerate 1.15).
    trainer.args.eval_on_start = (
        prepared.evaluation is not None and recipe.evaluation.before_training and checkpoint is None
    )
    trained = trainer.train(resume_from_checkpoint=checkpoint).metrics
    history = trainer.state.log_history
    before = next((entry for entry in history if entry["step"] == 0 and "eval_loss" in entry), {})
    trainer.save_model()  # the tokenizer goes with it
    trainer.save_state()
    try:
        after = {} if prepared.evaluation is None else trainer.evaluate()
        trainer.save_state()
        samples = write_samples(trainer, recipe, prepared.tokenizer)
    except Exception:
        (say or _nothing)(f"the trained weights are in {output}; what came after training has failed:")
        raise
    return Done(before, after, trained, samples)


@contextlib.contextmanager
def _nothing_left_behind(output: Path) -> Iterator[None]:
    """Remove the empty folder that a Trainer makes before it finds out that it cannot train."""
    existed = output.exists()
    try:
        yield
    except Exception:
        if not existed and output.is_dir() and not any(output.iterdir()):
            with contextlib.suppress(OSError):  # another process was first
                output.rmdir()
        raise


def _nothing(*_: Any) -> None:
    """Other processes say nothing."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def closing(task: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The last line: what training has changed."""
    if not after:
        return "nothing was held out, so nothing was measured"
    names = {"classification": ("accuracy",), "reward": ("accuracy",), "grpo": ("reward",)}.get(task, ("perplexity",))
    name = next(name for name in (*names, "loss") if f"eval_{name}" in after or name == "loss")
    digits = 1 if name == "perplexity" else 4
    untrained, trained = (
        None if value is None else f"{value:.{digits}f}" for value in (m.get(f"eval_{name}") for m in (before, after))
    )
    return f"{name}: " + (f"untrained {untrained}, " if untrained else "") + f"trained {trained}"


def _results(trainer, recipe: Recipe, prepared: Prepared, done: Done, seconds: float) -> dict[str, Any]:
    training = recipe.training
    results: dict[str, Any] = {}
    for when, measured in (("before", done.before), ("after", done.after)):
        for name, value in measured.items():
            if name.startswith("eval_") and _is_number(value) and not name.endswith(("runtime", "per_second")):
                results[f"{name.removeprefix('eval_')} {when}"] = value
    results["steps"] = trainer.state.global_step
    results["best checkpoint"] = trainer.state.best_model_checkpoint
    results["training seconds"] = done.trained.get("train_runtime")
    if recipe.task == "pretraining" and find_checkpoint(recipe) is None:
        tokens = trainer.state.global_step * training.train_batch_size * training.gradient_accumulation_steps
        tokens *= training.world_size * recipe.data.sequence_length
        results |= {"tokens": tokens, "tokens per second": tokens / results["training seconds"]}
    results["seconds in all"] = seconds
    return results
