"""What is wrong with a recipe, found before anything is trained or written.

`train` and `validate` look at the folders a run writes to and resumes from, at the settings that its trainer would
only read while it runs, and at the model without memory; `validate` then rehearses the run (`rehearsal`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments, get_scheduler

from ..convert.targets import Plan, plan
from ..integrations.deepspeed import check_config
from ..optim.parameter_groups import GROUP_KEY, ordinary
from ..optim.resume import read_meta
from . import folders
from .metrics import Metrics
from .models import check_generation, empty_model
from .names import text_of
from .schema import Recipe
from .tasks import Prepared


def find_checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from, as `folders.find_checkpoint`."""
    return folders.find_checkpoint(recipe.training.output_dir, recipe.training.resume_from_checkpoint)


def check_checkpoint(checkpoint: str, model: Any) -> None:
    """Check that a checkpoint is of this model: same names, same shapes.

    Args:
        checkpoint: a folder.
        model: not converted; it may be on the meta device.

    Raises:
        ValueError: it is another model's.
    """
    config = Path(checkpoint) / "config.json"
    if config.is_file():
        saved = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if saved != model.config.model_type:
            raise ValueError(
                f"training.resume_from_checkpoint={checkpoint} is of a {saved} model, and the recipe trains a "
                f"{model.config.model_type}: resume with the model that wrote it."
            )
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in _saved_shapes(Path(checkpoint)):
        if name not in own or own[name] != shape:
            here = f"shape {list(own[name])}" if name in own else "no such weight"
            raise ValueError(
                f"training.resume_from_checkpoint={checkpoint} is of another model: {name} has shape {list(shape)} "
                f"there, and the recipe's model has {here}."
            )


def _saved_shapes(folder: Path):
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no mapping
                    yield name, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read, it is probably truncated ({error}): resume from another one."
            ) from error


def check_model(recipe: Recipe, prepared: Prepared) -> tuple[nn.Module, Plan | None]:
    """Build the model without memory and match the targets of Grass.

    Raises:
        ValueError: the targets or the rank fit none of it.
    """
    model = empty_model(recipe, prepared.config)
    checkpoint = find_checkpoint(recipe)
    if checkpoint is not None:
        check_checkpoint(checkpoint, model)
        check_resumed(recipe, checkpoint)
    if recipe.lora is not None:
        try:
            get_peft_model(empty_model(recipe, prepared.config), recipe.lora.config(recipe.task))
        except ValueError as error:
            raise ValueError(f"lora: {error}") from error
    return model, None if recipe.grass is None else plan(model, recipe.grass)


def check_settings(recipe: Recipe, prepared: Prepared) -> list[str]:
    """Check what a trainer would only find out while it runs, and that what it leaves behind can be saved.

    Returns:
        Sentences about what is trained or saved in another way than the recipe's files say.

    Raises:
        ValueError: something does not fit.
    """
    training, evaluation = recipe.training, recipe.evaluation
    evaluates = text_of(training.eval_strategy) != "no"
    best, names = training.metric_for_best_model, Metrics(recipe).names
    _check_engine(recipe)
    if evaluates and prepared.evaluation is None:
        raise ValueError(
            f"training.eval_strategy={text_of(training.eval_strategy)}, and there are no rows to evaluate on: give "
            "data.holdout (0.05, say), data.eval_split or data.eval_dataset."
        )
    if evaluation.early_stopping_patience is not None and (best is None or not evaluates):
        raise ValueError(
            f"evaluation.early_stopping_patience={evaluation.early_stopping_patience} needs something to watch: set "
            "training.metric_for_best_model: loss (or another metric) and training.eval_strategy: steps."
        )
    if best is not None and names is not None and best.removeprefix("eval_") not in names:
        raise ValueError(
            f"training.metric_for_best_model={best} is not measured by task={recipe.task} here: give one of "
            f"{', '.join(sorted(names))}, or add it to evaluation.metrics."
        )
    if training.batch_eval_metrics and names is not None:
        raise ValueError(
            "training.batch_eval_metrics=true: metrics here are reduced batch by batch already: leave it out."
        )
    _check_scheduler(training)
    found = check_generation(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        named = "config_name" if recipe.model.config_name else "model_name_or_path"
        for what, part, field in (
            ("tokenizer", prepared.tokenizer, "tokenizer_name"),
            ("config", prepared.config, named),
        ):
            try:
                part.save_pretrained(folder)
            except Exception as error:  # of the tokenizer's or the config's own code
                raise ValueError(
                    f"the {what} of {recipe.model.name} cannot be saved ({type(error).__name__}: {error}), so the run "
                    f"would be lost: give another model.{field}."
                ) from error
    if not found:
        return []
    return [
        f"generation_config: {', '.join(found)} only serve sampling, so do_sample is set to true: transformers would "
        "not save it otherwise"
    ]


def _check_scheduler(training: Any) -> None:
    """Make the scheduler once, over a parameter of its own."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    steps = training.max_steps if training.max_steps > 0 else 100
    options = training.lr_scheduler_kwargs
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options if isinstance(options, dict) else None,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training.lr_scheduler_type={text_of(training.lr_scheduler_type)} with lr_scheduler_kwargs={options}: "
            f"{str(error).rstrip('.')}: say it in training.lr_scheduler_kwargs."
        ) from error


def uses_fsdp(training: TrainingArguments) -> bool:
    """Whether recipe or launcher ask for it."""
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _check_engine(recipe: Recipe) -> None:
    """Refuse what Grass cannot do under FSDP and DeepSpeed, whoever says it: the recipe or the launcher."""
    training = recipe.training
    if recipe.grass is None:
        return
    plugin = getattr(training, "fsdp_plugin_args", None) or {}
    version = plugin.get("fsdp_version") or (training.fsdp_config or {}).get("version", 1)
    if uses_fsdp(training) and int(version if training.fsdp else os.environ.get("FSDP_VERSION", 1)) == 1:
        raise ValueError(
            "grass-hf does not run under FSDP1, which flattens parameters: use FSDP2 (training.fsdp_config: "
            "{version: 2}, or fsdp_version: 2 in the accelerate config), or DDP."
        )
    if training.deepspeed_plugin is not None:  # of the recipe or of the launcher
        check_config(training.deepspeed_plugin.deepspeed_config, recipe.grass)


def check_resumed(recipe: Recipe, checkpoint: str) -> None:
    """Refuse settings that a checkpoint's own values would silently replace: the optimizer's, in its saved groups.

    Raises:
        ValueError: the recipe says another value.
    """
    for name, values in _saved_settings(Path(checkpoint)).items():
        said = getattr(recipe.training, name)
        if name not in recipe.given["training"] or not values:
            continue
        if any(math.isclose(said, value, rel_tol=1e-6) for value in values):  # some are kept as float32
            continue
        shown = sorted({f"{value:g}" for value in values})
        remedy = f"write --{name} {shown[0]}" if len(shown) == 1 else f"say {name} as the run that wrote it did"
        raise ValueError(
            f"training.{name}={said:g} beside a resume would have no effect, as {checkpoint} goes on with "
            f"{', '.join(shown)}: {remedy}, or start anew from its weights (--model_name_or_path {checkpoint})."
        )


def _saved_settings(folder: Path) -> dict[str, list[float]]:
    """What a checkpoint's optimizer goes on with, as arguments of a Trainer: of slices as without Grass."""
    if not (folder / "optimizer.pt").is_file():  # an engine has saved it in a form of its own
        if not (folder / "scheduler.pt").is_file():
            return {}
        state = torch.load(folder / "scheduler.pt", weights_only=True, map_location="cpu")
        return {"learning_rate": [float(rate) for rate in state.get("base_lrs", ())]}
    saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["param_groups"]
    meta = read_meta(saved)
    scale = 1.0 if meta is None else meta["config"]["scale"]
    groups = [ordinary(group, scale) if GROUP_KEY in group else group for group in saved]
    rates = [group.get("initial_lr", group.get("lr")) for group in groups]
    return {
        "learning_rate": [float(rate) for rate in rates if rate is not None],
        "weight_decay": [float(g["weight_decay"]) for g in groups if g.get("weight_decay")] or [0.0],
        "adam_beta1": [float(g["betas"][0]) for g in groups if "betas" in g],
        "adam_beta2": [float(g["betas"][1]) for g in groups if "betas" in g],
        "adam_epsilon": [g["eps"] for g in groups if isinstance(g.get("eps"), float)],
    }
