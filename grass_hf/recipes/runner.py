"""`grass-hf train`: everything a recipe says, in its order. Only the main process prints and writes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import set_seed

from . import preview
from .checks import check_model, check_places, find_checkpoint
from .metrics import perplexity
from .models import load_model
from .report import Run, report_run
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
    training = recipe.training
    check_places(recipe, overwrite)
    prepared = prepare(recipe)
    check_model(recipe, prepared)
    checkpoint = find_checkpoint(recipe)
    say = Console(highlight=False, soft_wrap=True).print if training.process_index == 0 else _nothing
    for line in preview.describe(prepared, recipe.task):
        say(escape(line))
    set_seed(training.seed)
    model = load_model(recipe, prepared.config)
    say(f"model: {recipe.model.name}, {model.num_parameters():,} parameters, {recipe.method}")
    # Within train(), where the model is wrapped: evaluate() before it leaves a model without DDP (accelerate 1.15).
    training.eval_on_start = (
        prepared.evaluation is not None and recipe.evaluation.before_training and checkpoint is None
    )
    with _nothing_left_behind(Path(training.output_dir)):
        trainer = build_trainer(recipe, prepared, model)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    before = next((entry for entry in history if entry["step"] == 0 and "eval_loss" in entry), {})
    after = {} if prepared.evaluation is None else trainer.evaluate()
    trainer.save_model()  # the tokenizer goes with it
    trainer.save_state()
    samples = write_samples(trainer, recipe, prepared)
    results = _results(trainer, recipe, prepared, before, after, result, time.perf_counter() - started)
    if training.process_index != 0:
        return results
    run = Run(recipe, results, trainer.state.log_history, samples, " ".join(sys.argv))
    for path in report_run(run, trainer, Path(training.output_dir)):
        say(f"written: {path}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(run.as_json(), indent=2) + "\n", encoding="utf-8")
    for prompt, text in samples:
        say(f"generated: {escape(prompt)} {escape(text)}")
    say(closing(recipe.task, before, after))
    return results


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


def shown(metrics: dict[str, Any]) -> str:
    """The measured quantities of an evaluation, without timings."""
    names = [name for name in metrics if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))]
    return ", ".join(f"{name.removeprefix('eval_')} {metrics[name]:.4g}" for name in names if _is_number(metrics[name]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def closing(task: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The last line: what training has changed."""
    if not after:
        return "nothing was held out, so nothing was measured"
    name = {"classification": "eval_accuracy"}.get(task, "eval_loss")
    if task in ("pretraining", "sft"):
        measured = [perplexity(m["eval_loss"]) if "eval_loss" in m else None for m in (before, after)]
        name = "perplexity"
    else:
        measured = [m.get(name) for m in (before, after)]
        name = name.removeprefix("eval_")
    untrained, trained = (
        None if value is None else f"{value:.1f}" if name == "perplexity" else f"{value:.4f}" for value in measured
    )
    return f"{name}: " + (f"untrained {untrained}, " if untrained else "") + f"trained {trained}"


def _results(trainer, recipe: Recipe, prepared: Prepared, before, after, result, seconds: float) -> dict[str, Any]:
    training = recipe.training
    results: dict[str, Any] = {}
    for when, measured in (("before", before), ("after", after)):
        for name, value in measured.items():
            if name.startswith("eval_") and _is_number(value) and not name.endswith(("runtime", "per_second")):
                results[f"{name.removeprefix('eval_')} {when}"] = value
    results["steps"] = trainer.state.global_step
    results["best checkpoint"] = trainer.state.best_model_checkpoint
    results["training seconds"] = result.metrics.get("train_runtime")
    if recipe.task == "pretraining" and find_checkpoint(recipe) is None:
        tokens = trainer.state.global_step * training.train_batch_size * training.gradient_accumulation_steps
        tokens *= training.world_size * recipe.data.sequence_length
        results |= {"tokens": tokens, "tokens per second": tokens / results["training seconds"]}
    results["seconds in all"] = seconds
    return results
