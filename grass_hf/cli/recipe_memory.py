"""``grass-hf estimate RECIPE.yaml``: the peak of a recipe's own step."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path

from rich.console import Console

from ..config.sizes import parse_bytes, shown_bytes
from ..measure.estimate.memory import MemoryEstimate
from ..recipes.parse import load_recipe
from ..recipes.schema import Recipe
from ..recipes.step_memory import estimate
from ..recipes.tasks import Prepared, prepare
from .estimate import remarks, table_of


def run_recipe_estimate(path: Path, *, within: str, json: Path | None) -> None:
    """Print the peak of a step as the recipe takes it, and AdamW's over all weights beside it; write `json`.

    Raises:
        ValueError: the recipe cannot be read, or its step needs more than `within`.
    """
    limit = parse_bytes(within, "--within") if within else None
    console = Console()
    recipe = load_recipe(path)
    with console.status(f"reading the rows of {path}"):
        prepared = prepare(recipe)
    estimates = [_estimate(console, recipe, prepared)]
    if recipe.lora is not None or recipe.grass is not None:
        full = dataclasses.replace(recipe, grass=None, lora=None, base="adamw_torch")
        estimates.append(_estimate(console, full, prepared))
    training = recipe.training
    batch, length = training.per_device_train_batch_size, recipe.data.sequence_length
    console.print(table_of(estimates, f"{path}: {recipe.task}, {batch} x {length} tokens"))
    for line in remarks(estimates):
        console.print(line)
    if recipe.task == "dpo" and recipe.lora is None:
        console.print("The reference model of dpo comes on top: the weights once more.")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(found) | {"peak": found.peak} for found in estimates]
        json.write_text(json_module.dumps({"recipe": str(path), "bytes": rows}, indent=2) + "\n", encoding="utf-8")
    if limit is not None and estimates[0].peak > limit:
        raise ValueError(
            f"--within {within}: a step of {path} needs {shown_bytes(estimates[0].peak)}, more than "
            f"{shown_bytes(limit)}: lower per_device_train_batch_size, sequence_length or density in it, set "
            "gradient_checkpointing, or grass.resident: false."
        )


def _estimate(console: Console, recipe: Recipe, prepared: Prepared) -> MemoryEstimate:
    with console.status(f"simulating training steps of {recipe.path}"):
        return estimate(recipe, prepared)
