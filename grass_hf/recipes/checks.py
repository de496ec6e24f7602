"""What is wrong with a recipe, found before anything is trained or written.

`check_places` looks at the folders a run would write to and resume from; `grass-hf validate` also builds the model on
the meta device, where it has shapes and no memory, matches the targets, and estimates the peak of a step.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ..config.settings import GrassConfig
from ..convert.targets import Plan, plan
from ..integrations.base import base_class_and_kwargs
from ..measure.estimate.memory import MemoryEstimate, estimate_memory
from ..measure.estimate.simulate import causal_loss
from .models import auto_class, dtype_of, empty_model
from .schema import Recipe
from .tasks import Prepared


def check_places(recipe: Recipe, overwrite: bool) -> None:
    """Check that the output folder can be written, is not another run's, and that a checkpoint to resume from is one.

    Raises:
        ValueError: it is not so.
    """
    output = Path(recipe.training.output_dir)
    parent = output
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"training.output_dir={output}: {parent} is a file: give another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"training.output_dir={output}: there is no permission to write in {parent}: give another folder."
        )
    resume = find_checkpoint(recipe)
    if resume is None and not overwrite and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"training.output_dir={output} is not empty: give another folder, go on with its run "
            "(--resume_from_checkpoint true), or replace its files (--overwrite)."
        )


def find_checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from: the one that is named, the last one for `true`, or None.

    Raises:
        ValueError: there is none, or it has no trainer state.
    """
    said = recipe.training.resume_from_checkpoint
    if said in (None, False) or str(said).lower() in ("false", "none"):
        return None
    output = recipe.training.output_dir
    if str(said).lower() == "true":
        found = get_last_checkpoint(output) if os.path.isdir(output) else None
        if found is None:
            raise ValueError(
                f"training.resume_from_checkpoint=true, but {output} has no checkpoint: leave it out to start anew."
            )
        return found
    if not os.path.isfile(os.path.join(said, "trainer_state.json")):
        what = "has no trainer_state.json" if os.path.isdir(said) else "is no folder"
        raise ValueError(
            f"training.resume_from_checkpoint={said} {what}: give a folder checkpoint-N that the Trainer wrote."
        )
    return str(said)


def check_checkpoint(checkpoint: str, model: nn.Module) -> None:
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
    if recipe.lora is not None:
        try:
            get_peft_model(empty_model(recipe, prepared.config), recipe.lora.config(recipe.task))
        except ValueError as error:
            raise ValueError(f"lora: {error}") from error
    return model, None if recipe.grass is None else plan(model, recipe.grass)


def estimate(recipe: Recipe, prepared: Prepared) -> MemoryEstimate:
    """The peak of a training step of the recipe in one process, for dpo without its reference model.

    Raises:
        ValueError: it cannot be estimated.
    """
    training = recipe.training
    cls, options = base_class_and_kwargs(training, recipe.base, {}, Trainer.get_optimizer_cls_and_kwargs)
    dtype = dtype_of(recipe.model, prepared.config)
    batch = training.per_device_train_batch_size * (2 if recipe.task == "dpo" else 1)
    kind, adapters = type(prepared.config), None
    checkpointing = training.gradient_checkpointing_kwargs or {}
    if recipe.lora is not None:
        targets = recipe.lora.lora_target_modules or "all-linear"
        adapters = GrassConfig(rank=recipe.lora.lora_r, target_modules=targets, slice_dtype="float32")
    _ = auto_class(recipe.task)._model_mapping[kind]  # imported here, not under fake tensors

    def make() -> nn.Module:
        return auto_class(recipe.task).from_config(prepared.config, dtype=dtype)

    return estimate_memory(
        make,
        adapters or recipe.grass,
        method="lora" if adapters else "adamw" if recipe.grass is None else "grass",
        optimizer=cls,
        optimizer_args={key: value for key, value in options.items() if key != "params"},
        batch=batch,
        sequence=recipe.data.sequence_length,
        gradient_checkpointing=training.gradient_checkpointing and checkpointing.get("every_n_layers", 1),
        loss=_loss(recipe, batch),
    )


def _loss(recipe: Recipe, batch: int):
    """The loss of the recipe's model on random tokens, under the recipe's autocast."""
    training, length = recipe.training, recipe.data.sequence_length
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    made: list[Any] = []

    def loss(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", half) if half else contextlib.nullcontext():
            if recipe.task == "classification":
                tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, length))
                return model(input_ids=tokens, labels=torch.zeros(batch, dtype=torch.long)).loss
            made[:] = made or [causal_loss(model, batch, length)]
            return made[0](model)

    return loss


def visible_memory() -> tuple[int, str]:
    """Bytes of the device that would be trained on, and its name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
