"""Checkpoints that an older build wrote go on where that build would have gone on.

``data/format4.pt`` was written by the first build whose optimizer states have format 4 (commit 0e92ef7): for each of
three settings the weights and the optimizer after five steps, and the weights after twelve.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer

FILE = Path(__file__).parent / "data" / "format4.pt"


def model_of(weights) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32, use_cache=False))
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("name", ["top_r", "cycle", "multinomial_norm"])
def test_a_checkpoint_of_format_4_goes_on(name):
    saved = torch.load(FILE, weights_only=True)[name]
    model = model_of(saved["model"])
    convert_to_grass(model, GrassConfig(**saved["config"]))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(5, 12):  # two selections, or more
        ids = (torch.arange(12) + torch.arange(4).unsqueeze(1) * 5 + step) % 32
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = model.state_dict()
    assert saved["after"].keys() == weights.keys()
    for key, value in saved["after"].items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=2e-6, msg=lambda said, key=key: f"{key}: {said}")
