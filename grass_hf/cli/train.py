"""``grass-hf train`` and ``grass-hf validate``: from the command line to a recipe and back."""

from __future__ import annotations

import dataclasses
import gc
import json as json_module
import traceback
from pathlib import Path

from rich.console import Console

import grass_hf

from ..config.sizes import parse_bytes, shown_bytes
from ..recipes.parse import load_recipe
from .errors import is_ours

# What needs torch is imported where it is used: behind `load_recipe`, which finds most mistakes without it.

_console = Console(highlight=False, soft_wrap=True, markup=False)


def run_train(path: Path, flags: list[str], *, grass: bool, dry_run: bool, overwrite: bool, json: Path | None) -> None:
    """Train, or with `dry_run` print the resolved recipe."""
    grass_hf.register()
    recipe = load_recipe(path, flags, grass=grass, overwrite=overwrite)
    if not dry_run:
        from ..recipes.runner import train

        train(recipe, overwrite=overwrite, json_file=json)
        _leave()
        return
    from ..recipes import preview

    settings = preview.resolved(recipe)
    _console.print(preview.as_yaml(settings), end="")
    _write(json, {"recipe": settings})


def _leave() -> None:
    """Leave the other ranks, together with them.

    A thread of gloo's that still holds the tensors of the last message would abort the process where the interpreter
    ends meanwhile, and NCCL warns.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer with a DDP module in it would keep the group, and its threads
        dist.barrier()
        dist.destroy_process_group()


def run_validate(
    path: Path, flags: list[str], *, grass: bool, budget: str, memory: bool, overwrite: bool, json: Path | None
) -> None:
    """Print what a run would do, or stop at the first mistake."""
    grass_hf.register()
    limit = parse_bytes(budget, "--budget") if budget else None
    recipe = load_recipe(path, flags, grass=grass, overwrite=overwrite)

    from ..recipes import preview
    from ..recipes.checks import check_model, check_settings
    from ..recipes.tasks import prepare

    prepared = prepare(recipe)
    first = recipe.training.process_index == 0
    _console.quiet = not first
    remarks = check_settings(recipe, prepared)
    model, plan = check_model(recipe, prepared)
    for line in (*preview.describe(prepared, recipe.task), *remarks):
        _console.print(line)
    count = sum(parameter.numel() for parameter in model.parameters())
    _console.print(f"model: {recipe.model.name}, {type(model).__name__} of {count:,} parameters")
    found = {"recipe": preview.resolved(recipe), "layout": prepared.layout, "parameters": count}
    if plan is not None:
        targets = plan.targets
        elements = sum(getattr(target.module, target.parameter).numel() for target in targets)
        _console.print(
            f"Grass: a slice of {len(targets)} weights with {elements / count:.1%} of the parameters; "
            f"{len(plan.left_out)} of those that match are trained in full"
        )
        found["targets"] = {target.name: target.rank for target in targets}
        found["left_out"] = plan.left_out
    found["dry run"] = _dry_run(recipe, prepared)
    _console.print(found["dry run"])
    if memory:
        found["memory"] = _check_memory(recipe, prepared, model, limit)
    _console.print(f"{path}: nothing is wrong with it")
    if first:
        _write(json, found)
    _leave()


def _dry_run(recipe, prepared) -> str:
    from ..recipes.rehearsal import rehearse

    try:
        with _console.status("a dry run of two steps"):
            return rehearse(recipe, prepared)
    except Exception as error:
        if is_ours(error):
            raise
        traceback.print_exception(error)
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"{recipe.path}: a dry run of two steps stopped, as training would: {type(error).__name__}: {said} (the "
            "traceback stands above)."
        ) from error


def _check_memory(recipe, prepared, model, budget: int | None) -> dict | None:
    from ..recipes.step_memory import estimate, visible_memory

    limit, where = (budget, "--budget") if budget else visible_memory()
    try:
        with _console.status("estimating the memory of a training step"):
            estimated = estimate(recipe, prepared)
    except (
        Exception
    ) as error:  # a mixture, or kernels of an optimizer that know no fake tensors: no mistake of a recipe
        _console.print(f"memory: not estimated ({(str(error).splitlines() or [type(error).__name__])[0]})")
        return None
    reference = 0
    if recipe.task == "dpo" and recipe.lora is None:
        reference = sum(parameter.nbytes for parameter in model.parameters())
    peak = estimated.peak + reference
    _console.print(
        f"memory: {shown_bytes(peak)} of tensors at the peak of a step, of {shown_bytes(limit)} ({where}); an "
        "allocator's fragmentation and the driver's context come on top"
    )
    if peak > limit:
        raise ValueError(
            f"a step takes {shown_bytes(peak)}, and there are {shown_bytes(limit)} ({where}): lower "
            "per_device_train_batch_size, sequence_length or rank, or set gradient_checkpointing."
        )
    return {"peak": peak, "reference model": reference, "at the peak": dataclasses.asdict(estimated.at_peak)}


def _write(path: Path | None, result: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")
