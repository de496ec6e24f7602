"""What the model writes: after the prompts of a recipe, and for metrics that compare replies."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from .schema import Recipe


def write_samples(trainer: Trainer, recipe: Recipe, tokenizer: Any) -> list[tuple[str, str]]:
    """(prompt, continuation) of every prompt of the recipe; none for classifiers and for sharded models."""
    said = recipe.evaluation
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded or not model.can_generate() or not trainer.is_world_process_zero():
        return []
    chat = recipe.task != "pretraining" and tokenizer.chat_template is not None
    system = [{"role": "system", "content": recipe.data.system_prompt}] if recipe.data.system_prompt else []
    drawn = {"do_sample": True, "top_k": 40, "temperature": 0.8} if said.do_sample else {"do_sample": False}
    samples = []
    for prompt in said.prompts:
        text: Any = prompt
        if chat:
            turns = [*system, {"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        (made,) = generate(model, tokenizer, [ids], said.max_new_tokens, **drawn)
        samples.append((prompt, " ".join(made.split())))
    return samples


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[list[int]], most: int, **options: Any) -> list[str]:
    """What a model says after prompts, as one batch.

    Args:
        model, tokenizer: of each other; the model's mode is left as it is.
        prompts: token ids of each.
        most: new tokens of each.
        options: of `generate`.
    """
    training, pad = model.training, tokenizer.pad_token_id
    padded: Any = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=pad, **padded)
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], **padded)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    model.eval()
    try:
        made = model.generate(**inputs, max_new_tokens=most, pad_token_id=pad, **options)
    finally:
        model.train(training)
    return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
