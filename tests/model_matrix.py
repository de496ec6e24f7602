"""The model matrix: tiny models of many types, and what is checked of each; `scripts/support_table.py` prints it.

Every model is built from its own configuration class with random weights, and all of its matrices are compressed.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert import grass_slices
from grass_hf.modules import kind_of
from grass_hf.report import start_report

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
# Tried by `make test-slow` only.
MORE: dict[str, dict] = {
    "apertus": GROUPED,
    "arcee": GROUPED,
    "aria_text": {**GROUPED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "biogpt": {},
    "bitnet": GROUPED,
    "ctrl": {**GPT2_STYLE, "dff": 48},
    "deepseek_v2": CAUSAL["deepseek_v3"],
    "ernie4_5": {**GROUPED, "head_dim": 8},
    "exaone4": GROUPED,
    "glm4_moe": {
        **GROUPED,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "granitemoeshared": {**GROUPED, "num_local_experts": 4, "shared_intermediate_size": 16},
    "helium": {**GROUPED, "head_dim": 8},
    "hunyuan_v1_dense": {**GROUPED, "head_dim": 8},
    "lfm2": GROUPED,
    "minimax": {**GROUPED, "num_local_experts": 4, "head_dim": 8},
    "nemotron": GROUPED,
    "openai-gpt": GPT2_STYLE,
    "persimmon": {},
    "seed_oss": {**GROUPED, "head_dim": 8},
}
# Trains, but not every matrix can be compressed; the table says which and why.
PARTLY: dict[str, dict] = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    },
    "jetmoe": {**GROUPED, "num_local_experts": 4, "kv_channels": 8},
    "llama4_text": {**GROUPED, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
    "mamba": {"state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 4},
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
# Modules whose weights the model reads without calling them: Grass stops at the first step and says so.
EXCLUDED = {"mamba": ["dt_proj"]}
OTHERS: dict[str, dict] = {
    "bert": {"num_labels": 3},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}


ALL = {**CAUSAL, **MORE, **PARTLY, **OTHERS}
AUTO = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}


@dataclass
class Result:
    """What the matrix found for one model type.

    Attributes:
        model_type: as in transformers.
        kinds: number of compressed weights by kind.
        tied: whether embedding and head share one slice.
        in_full: reason by parameter pattern for what is not compressed, vectors left out.
        losses: three training steps at a quarter of the rows.
        apart: largest distance to AdamW's weights after three steps at rank = m, float64.
        moved: largest distance that AdamW moved a weight.
    """

    model_type: str
    kinds: Counter = field(default_factory=Counter)
    tied: bool = False
    in_full: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    apart: float = float("nan")
    moved: float = float("nan")


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


def train(model: nn.Module, result: Result | None = None, **options) -> list[float]:
    """Convert and take three steps over two selections; the model stays converted."""
    convert_to_grass(model, GrassConfig(**{**every_matrix(model), "density": 0.25, **options}))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=5e-3)
    if result is not None:
        result.kinds = Counter(kind_of(part.owner).name for part in grass_slices(model))
        uses = [id(part) for m in model.modules() for part in getattr(m, "own_slices", dict)().values()]
        result.tied = len(uses) > len(set(uses))
        report = start_report(model, optimizer)
        result.in_full = {name: reason for _, name, _, reason in report.ordinary if "a vector" not in reason}
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


def check(model_type: str) -> tuple[Result, nn.Module]:
    """All of a type's findings, and the converted model after training."""
    result = Result(model_type)
    model = build(model_type)
    result.losses = train(model, result)
    result.apart, result.moved = distance_at_full_rank(build(model_type))
    return result, model


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
