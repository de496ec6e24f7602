"""What the model writes after training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from .schema import EvaluationSection, Recipe
from .tasks import Prepared


def write_samples(trainer: Trainer, recipe: Recipe, prepared: Prepared) -> list[tuple[str, str]]:
    """(prompt, continuation) of every prompt of the recipe; none for classifiers and for sharded models."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if (
        sharded
        or not trainer.accelerator.unwrap_model(trainer.model).can_generate()
        or not recipe.evaluation.prompts
        or not trainer.is_world_process_zero()
    ):
        return []
    model = trainer.accelerator.unwrap_model(trainer.model)
    chat = recipe.task != "pretraining" and prepared.tokenizer.chat_template is not None
    return [
        (
            prompt,
            write(model, prepared.tokenizer, prompt, recipe.evaluation, chat=chat, system=recipe.data.system_prompt),
        )
        for prompt in recipe.evaluation.prompts
    ]


@torch.no_grad()
def write(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: EvaluationSection,
    *,
    chat: bool,
    system: str | None = None,
) -> str:
    """What the model says after a prompt, or in reply to it as a chat."""
    model.eval()
    if chat:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chat)
    inputs = inputs.to(model.device)
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    if settings.do_sample:
        options |= {"do_sample": True, "top_k": 40, "temperature": 0.8}
    else:
        options |= {"do_sample": False}
    tokens = model.generate(**inputs, **options)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
