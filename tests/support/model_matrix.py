"""Tiny models of some types with settings of their own, for tests that train them; all types are in matrix_cases.py.

Every model is built from its own configuration class with random weights, and all of its matrices are compressed.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model

needs_interface = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4.57 has no experts interface"
)
VOCABULARY = 64
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
GPT2_STYLE = {"n_embd": 32, "n_layer": 2, "n_head": 4}

# Settings beside SHAPE, by model type.
CAUSAL: dict[str, dict] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**GPT2_STYLE, "rotary_dim": 8, "n_ctx": 64},
    "cohere": GROUPED,
    "cohere2": {**GROUPED, "sliding_window": 8},
    "falcon": {},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "glm4": {**GROUPED, "head_dim": 8},
    "gpt2": GPT2_STYLE,
    "gpt_bigcode": GPT2_STYLE,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {**GPT2_STYLE, "rotary_dim": 8},
    "granite": GROUPED,
    "llama": GROUPED,
    "mistral": GROUPED,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "olmo2": GROUPED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": GROUPED,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
# Those that other sides and rules are tried on.
TRAINED = [
    "bloom",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "llama",
    "opt",
    "phi3",
    "deepseek_v3",
    "gpt_oss",
    "mixtral",
    "qwen2_moe",
]
# It reads weights without calling their modules.
READS = {"mamba": {"state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}}
# Modules whose weights the model reads without calling them: Grass stops at the first step and says so.
EXCLUDED = {"mamba": ["dt_proj"]}
OTHERS: dict[str, dict] = {
    "bert": {"num_labels": 3},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}


ALL = {**CAUSAL, **READS, **OTHERS}
AUTO = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}


def build(model_type: str) -> nn.Module:
    """A tiny model with the same weights at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **ALL[model_type]})
    config.use_cache = False
    return AUTO.get(model_type, AutoModelForCausalLM).from_config(config)


def every_matrix(model: nn.Module) -> dict:
    excluded = EXCLUDED.get(model.config.model_type)
    return {"target_modules": "all-matrices", "exclude_modules": excluded, "update_interval": 2}


def batch(model: nn.Module) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=draws)
    labels = ids % model.config.num_labels if "SequenceClassification" in type(model).__name__ else ids
    return {"input_ids": ids, "labels": labels[:, 0] if labels is not ids else ids, "attention_mask": ids.ne(0).long()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict, seed: int) -> float:
    torch.manual_seed(seed)  # dropout and router noise
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: nn.Module, **options) -> list[float]:
    """Convert and take three steps over two selections; the model stays converted."""
    convert_to_grass(model, GrassConfig(**{**every_matrix(model), "density": 0.25, **options}))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=5e-3)
    model.train()
    inputs = batch(model)
    return [step(model, optimizer, inputs, seed=0) for _ in range(3)]


def distance_at_full_rank(model: nn.Module, **options) -> tuple[float, float]:
    """(distance between rank = m and AdamW, distance AdamW moved) after three steps, in float64."""
    if getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # transformers' grouped product knows no float64
    theirs = model.double().train()
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    ours = convert_to_grass(copy.deepcopy(theirs), GrassConfig(**{**every_matrix(theirs), "density": 1.0, **options}))
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    pairs = [
        (theirs, torch.optim.AdamW(theirs.parameters(), **settings)),
        (ours, grass_optimizer(ours, torch.optim.AdamW, **settings)),
    ]
    for model, optimizer in pairs:
        for number in range(3):
            step(model, optimizer, batch(model), seed=number)
    final, full = dict(restore_model(ours).named_parameters()), dict(theirs.named_parameters())
    apart = max((final[name] - p).abs().max().item() for name, p in full.items())
    moved = max((start[name] - p).abs().max().item() for name, p in full.items())
    return apart, moved


def save(model: nn.Module, folder: Path) -> None:
    """A checkpoint, with an input and its logits beside it."""
    model.save_pretrained(folder)
    inputs = batch(model.eval())
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder / "logits.pt")
    torch.save(inputs, folder / "inputs.pt")


# Loads every saved model where importing grass_hf fails, and compares logits with those of the trained model.
_RELOAD = """
import pathlib, sys
sys.modules["grass_hf"] = None
import torch, transformers
for pair in sys.argv[2:]:
    name, auto = pair.split("=")
    folder = pathlib.Path(sys.argv[1]) / name
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (name, info)
    with torch.no_grad():
        logits = model.eval()(**torch.load(folder / "inputs.pt")).logits
    apart = (logits - torch.load(folder / "logits.pt")).abs().max().item()
    # experts are multiplied by transformers' own grouped product there, in another order
    assert apart <= (1e-5 if "experts" in repr(model).lower() else 0.0), (name, apart)
    print(name)
"""


def reload(folder: Path, model_types: list[str]) -> subprocess.CompletedProcess:
    """Load saved models in a process without grass_hf; prints the names of those with the same logits."""
    pairs = [f"{name}={AUTO.get(name, AutoModelForCausalLM).__name__}" for name in model_types]
    return subprocess.run([sys.executable, "-c", _RELOAD, str(folder), *pairs], capture_output=True, text=True)
