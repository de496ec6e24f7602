"""Tiny configurations of any transformers model type: its own defaults, made small field by field.

`tiny_config` makes an instance of a configuration class with its defaults and replaces what makes a model large: the
rules below go by the fields' names, which transformers' configurations share for the most part. What the rules get
wrong for a type stands in `tiny_models.yaml`, as data. Nested configurations are made small in the same way.

Layers are chosen so that each kind of layer of the type occurs: of every list with an entry per layer (``layer_types``,
``mlp_layer_types``, ...) the first positions with different entries stay.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 64
HIDDEN = 32
# Ordinary tokens are drawn below this one; special tokens are moved above it.
FIRST_SPECIAL = 48
MOST_LAYERS = 4

# The first pattern that matches a field's whole name gives its value. A pattern may say None: leave the field alone.
RULES: list[tuple[str, Any]] = [
    (r"num_labels|.*max_window_layers|.*_period|.*_offset|.*layer_interval|.*_kernel(_size)?|.*_expand", None),
    (r".*vocab_size|vocab_size_.*|.*vocab_size_base|encoder_hash_byte_group_vocab|num_embeddings", VOCABULARY),
    # attention
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|num_query_groups", "kv"),
    (r"(.*_)?num_heads|(.*_)?num_attention_heads(_.*)?|n_heads?|attention_heads|.*_attention_heads|num_head", 4),
    (r"index_n_heads|linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"index_head_dim|qk_head_dim", 16),
    (r"(.*_)?head_dim|.*head_size|d_kv|d_head|dim_head|kv_channels|qk_(rope|nope)_head_dim|v_head_dim|rotary_dim", 8),
    (r".*_lora_rank|.*lowrank|laurel_rank|adapter_rank|gated_norm_rank|.*norm_rank", 16),
    (r"(.*_)?sliding_window(_size)?|.*window_(size|len)|local_attention(_window_len)?|keep_window_size", 8),
    (r"attention_window|.*relative_positions|position_buckets", 8),
    (r"num_queries|decoder_n_points|encoder_n_points|num_denoising|.*num_tokens", 5),
    (r"index_topk|mm_tokens_per_image", 4),
    (r"query_pre_attn_scalar", 8),
    # experts
    (r"(moe_|n_|num_)(routed_|local_)?(num_)?experts|num_local_experts|n_routed_experts", 4),
    (r".*num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k|num_selected_experts|num_experts_per_.*", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"(moe|.*expert|.*experts|shared)_.*(intermediate|ffn_hidden)_size|shared_intermediate_size", 16),
    (r"zero_expert_num", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", 1),
    # state spaces
    (r"(mamba_)?(d_state|ssm_state_size|state_size)|ssm_state_size", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_(d_head|headdim|head_dim)", 8),
    (r"(mamba_)?dt_rank|time_step_rank", 4),
    (r"mamba_d_ssm", 64),
    (r"n_groups|mamba_n_groups", 2),
    (r".*chunk_size|context_length", 16),
    # widths
    (r"(.*_)?(intermediate|ffn_hidden|mlp|dim_feedforward|feed_forward)_(size|dim|mlp)(_mlp)?", 48),
    (r"(.*_)?(ffn_dim|d_ff|dim_ff|dff|d_inner|ffn_size|inner_dim|mlp_dim|feedforward_dim|dim_feedforward)", 48),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|emb_dim|embedding_dim|embedding_size|hidden_size_.*)", HIDDEN),
    (
        r"(.*_)?(embed_dim|projection_dim|proj_dim|lru_width|out_hidden_size|embed_proj_dim|attention_hidden_size)",
        HIDDEN,
    ),
    (r"(.*_)?(vision_output_dim|projector_(in|out)put_dim|output_dim|text_hidden_size|codebook_dim)", HIDDEN),
    # positions and images
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|.*max_(source|target)_positions", 64),
    (r"max_sequence_length|original_max_position_embeddings|max_length", 64),
    (r"image_size|crop_size|input_resolution|img_size|vision_image_size", 16),
    (r"patch_size|vision_patch_size", 4),
]
# How many layers there are, by the field's name.
LAYERS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|(.*_)?(encoder|decoder)_layers|num_blocks|num_(en|de)coder_layers|depth|"
    r"num_global_layers|num_layers_per_stack|(.*_)num_hidden_layers|(.*_)layers_count|num_layer|(.*_)?num_block_layers)"
)
_STAGES = re.compile(
    r"(.*_)?(depths|layer_depths|num_heads|num_attention_heads|hidden_sizes|embed_dims?|encoder_hidden_sizes|channels)"
)
_TOKENS = re.compile(r".*_token_(id|index)|.*(boi|eoi|boa|eoa|image|video|audio)_(id|index)|mask_index|unk_index")


def tiny_config(cls: type[PretrainedConfig], overrides: dict[str, Any] | None = None) -> PretrainedConfig:
    """An instance of a configuration class that makes a model of a few thousand parameters.

    Args:
        cls: any configuration class of transformers.
        overrides: fields that the rules get wrong; a dictionary for the field of a nested configuration is merged into
            what the rules say of it.
    """
    overrides = copy.deepcopy(overrides or {})
    given = overrides.pop("_given", {})  # what the class wants to be made with at all
    default = cls(**given)
    fields = _shrunk(default, overrides, _counting(FIRST_SPECIAL))
    return cls(**{**given, **fields})


def _counting(first: int):
    number = first
    while True:
        yield number
        number = number + 1 if number < VOCABULARY - 1 else first


def _shrunk(default: PretrainedConfig, overrides: dict[str, Any], specials) -> dict[str, Any]:
    """The fields of a configuration that differ from its defaults."""
    old = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    fields: dict[str, Any] = {}
    layers = next((old[n] for n in old if LAYERS.fullmatch(n) and isinstance(old[n], int)), 0)
    kept = _positions(old, layers)
    for name, value in old.items():
        if isinstance(value, PretrainedConfig):
            inner = overrides.pop(name, {})
            if inner is None:
                fields[name] = None
                continue
            given = inner.pop("_given", {}) if isinstance(inner, dict) else {}
            fields[name] = type(value)(**{**given, **_shrunk(value, dict(inner), specials)})
        elif isinstance(value, list | tuple) and _STAGES.fullmatch(name) and all(type(v) is int for v in value):
            fields[name] = _small_list(name, value)
        elif isinstance(value, list | tuple) and len(value) == layers > 2 and not isinstance(value[0], list | tuple):
            fields[name] = type(value)(value[i] for i in kept)
            if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
                fields[name] = type(value)(_small(name, v, old) if v > 1 else v for v in fields[name])
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name) if value is not None else None
        elif isinstance(value, int) and not isinstance(value, bool):
            if _TOKENS.fullmatch(name):
                moved = value >= FIRST_SPECIAL or re.match(r"image|video|audio", name)
                fields[name] = next(specials) if moved else value
            elif LAYERS.fullmatch(name) and value > 1:
                fields[name] = len(kept) if value == layers else 2
            else:
                small = _small(name, value, old)
                if small != value:
                    fields[name] = small
        elif isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            fields[name] = _small_list(name, value)
        elif isinstance(value, dict) and "mrope_section" in value:
            fields[name] = {**value, "mrope_section": [2, 1, 1]}  # half of a head of eight
    for name in ("head_dim", "num_key_value_heads"):
        if name in old and old[name] is None:
            fields[name] = 8 if name == "head_dim" else 4
    if "pad_token_id" in old and old["pad_token_id"] is None:
        fields["pad_token_id"] = 0
    return {**{name: value for name, value in fields.items() if name in old}, **overrides}


def _small(name: str, value: int, old: dict[str, Any]) -> int:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            if small == "kv":
                heads = next((old[n] for n in ("num_attention_heads", "n_heads", "n_head") if n in old), None)
                return 4 if value == heads and value != 1 else min(value, 2)
            return value if small is None else min(value, small) if value > 0 else value
    return value


def _small_list(name: str, values):
    """Lists with a number per stage."""
    kind = type(values)
    if re.fullmatch(r"(.*_)?(depths|layers|num_layers|num_blocks|layer_depths)", name):
        return kind(1 for _ in values)
    if re.fullmatch(r"image_size|img_size|input_size", name):
        return kind(16 for _ in values)
    if name == "patch_size":
        return kind(4 for _ in values)
    if re.fullmatch(r"(.*_)?(num_heads|num_attention_heads|heads)", name):
        return kind(min(2 ** (v.bit_length() - 1), 4) for v in values)
    if re.fullmatch(
        r"(.*_)?(hidden_sizes|embed_dims?|encoder_hidden_sizes|dims|channels|hidden_channels|widths)", name
    ):
        return kind(16 * (v // min(values)) if v % min(values) == 0 else 16 for v in values)
    return values


def _positions(old: dict[str, Any], layers: int) -> list[int]:
    """The layers that stay: the first of each kind, at least two."""
    if layers <= 2:
        return list(range(layers))
    lists = [
        v for n, v in old.items() if isinstance(v, list | tuple) and len(v) == layers and not n.startswith("label")
    ]
    kinds = list(zip(*([str(x) for x in v] for v in lists), strict=True)) if lists else [()] * layers
    first = [i for i in range(layers) if kinds[i] not in kinds[:i]][:MOST_LAYERS]
    for i in range(layers):
        if len(first) >= 2:
            break
        if i not in first:
            first.append(i)
    return sorted(first)
