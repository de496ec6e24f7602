"""What the code blocks of README and docs begin with: a model, its rows and a loader, all tiny."""

from __future__ import annotations

import torch
from helpers import VOCABULARY, tiny_llama
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM


def new_model() -> LlamaForCausalLM:
    """A LLaMA of two layers with random weights."""
    return tiny_llama()


def _row(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (16,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


rows = [_row(seed) for seed in range(4)]
loader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]  # a list is a dataset
