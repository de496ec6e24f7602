"""The peak memory of a recipe's own step: its batch, attention, accumulation, smoothing and autocast."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from ..config.settings import GrassConfig
from ..convert.conversion import grass_slices
from ..integrations.base import base_class_and_kwargs
from ..integrations.model_configs import shapes_of
from ..measure.estimate.memory import MemoryEstimate, estimate_memory
from ..measure.estimate.simulate import Loss, causal_loss, vocabulary_of
from .models import auto_class, from_config, whole
from .schema import Recipe
from .tasks import Prepared


def estimate(recipe: Recipe, prepared: Prepared) -> MemoryEstimate:
    """The peak of a training step of the recipe in one process, for dpo without its reference model.

    Raises:
        ValueError: it cannot be estimated.
    """
    training = recipe.training
    gc.freeze()  # what was imported is no garbage, and a simulated step begins with a collection
    cls, options = base_class_and_kwargs(training, recipe.base, {}, Trainer.get_optimizer_cls_and_kwargs)
    batch = training.per_device_train_batch_size * (2 if recipe.task == "dpo" else 1)
    kind, adapters = type(prepared.config), None
    checkpointing = training.gradient_checkpointing_kwargs or {}
    if recipe.lora is not None:
        named = recipe.lora.lora_target_modules or "all-linear"
        targets = named if isinstance(named, str) else tuple(named)
        adapters = GrassConfig(rank=recipe.lora.lora_r, target_modules=targets, slice_dtype="float32")
    _ = auto_class(recipe.task, prepared.config)._model_mapping[kind]  # imported here, not under fake tensors

    def make() -> nn.Module:
        with whole(recipe):
            return shapes_of(lambda: from_config(recipe, prepared.config))

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
    """The loss of an optimizer step on random tokens, under the recipe's autocast.

    Of accumulated batches two are enough: while the second is computed the gradients of the first are there.
    """
    training, length = recipe.training, recipe.data.sequence_length
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    made: list[Any] = []

    def of_batch(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", half) if half else contextlib.nullcontext():
            made[:] = made or [_batch_loss(recipe, model, batch, length)]
            return made[0](model)

    def of_step(model: nn.Module) -> torch.Tensor:
        of_batch(model).backward()
        return of_batch(model)

    return of_batch if training.gradient_accumulation_steps == 1 else of_step


def _batch_loss(recipe: Recipe, model: Any, batch: int, length: int) -> Loss:
    """What the task's trainer computes of one batch."""
    smoother: Any = (
        LabelSmoother(recipe.training.label_smoothing_factor) if recipe.training.label_smoothing_factor else None
    )
    tokens = torch.randint(vocabulary_of(model) or 1, (batch, length))
    if recipe.task == "classification":
        labels = torch.zeros(batch, dtype=torch.long)
        if smoother is None:
            return lambda model: model(input_ids=tokens, labels=labels).loss
        return lambda model: smoother(model(input_ids=tokens), labels)
    plain = causal_loss(model, batch, length)  # looks at the length too
    fused = recipe.task in ("sft", "dpo") and not (recipe.grass and _calls_its_head(model))
    if fused:
        _fuse(model)

    def of_tokens(model: nn.Module) -> torch.Tensor:
        return -model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs.sum() / tokens.numel()

    def smoothed(model: nn.Module) -> torch.Tensor:
        loss = smoother(model(input_ids=tokens), tokens, shift_labels=True)
        if fused:
            with torch.no_grad():  # for TRL's metrics
                of_tokens(model)
        return loss

    if smoother is not None and recipe.task in ("pretraining", "sft"):
        return smoothed
    return of_tokens if fused else plain


def _calls_its_head(model: Any) -> bool:
    """Whether Grass has compressed the output head, so that the loss is made from its logits."""
    head = model.get_output_embeddings()
    return head is not None and any(part.weight is head.weight for part in grass_slices(model))


def _fuse(model: Any) -> None:
    """Give the model the head by which TRL makes log-probabilities without all logits."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def visible_memory() -> tuple[int, str]:
    """Bytes of the device that would be trained on, and its name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
