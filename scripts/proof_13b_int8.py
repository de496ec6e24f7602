"""Train all of LLaMA-13B in 20 GiB, its frozen weights in eight bits: `make proof-13b-int8`.

As `proof_7b.py`, but every weight of a linear layer is stored in int8 as soon as it has been made, so that the 26 GB of
the model in bfloat16 are never there. A few steps, with rows selected anew in between; then a plain bfloat16 checkpoint
is written shard by shard (`save_plain`), read again and quantised weight by weight, and gives the very same loss.

    proof_13b_int8.py [--config configs/llama_13b.json] [--steps 3] [--tokens 256] [--rank 128] ... (--help)
"""

from __future__ import annotations

import gc
import shutil
import time
from pathlib import Path

import torch
from proving import (
    conclude,
    empty_model,
    fill,
    loss_of,
    parser,
    random_values,
    say,
    size_of,
    stored_values,
    train,
    training_texts,
)
from torch import Tensor, nn
from transformers import AutoConfig

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, save_plain
from grass_hf.int8 import quantize

DEFAULTS = {
    "config": "configs/llama_13b.json",
    "steps": 3,
    "tokens": 256,
    "rank": 128,
    "interval": 2,
    "lr": 2e-4,
    "budget": 20.0,
    "output": Path("runs/proof_13b_int8"),
}


def in_int8(module: nn.Module, name: str, weight: Tensor) -> nn.Parameter:
    """What a parameter is stored as: linear layers in int8, but for the output head."""
    linear = isinstance(module, nn.Linear) and not name.startswith("lm_head")
    return quantize(weight) if linear else nn.Parameter(weight)


def main() -> None:
    args = parser(__doc__, **DEFAULTS).parse_args()
    started = time.perf_counter()
    config = AutoConfig.from_pretrained(args.config, use_cache=False)
    texts = training_texts(args.texts, args.tokens, config.vocab_size)
    settings = GrassConfig(
        rank=args.rank, update_interval=args.interval, target_modules="all-matrices", weight_dtype="int8"
    )
    model = fill(empty_model(config), random_values(config.initializer_range), in_int8)
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters made in {time.perf_counter() - started:.0f} s")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    convert_to_grass(model, settings)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=args.lr, fused=True)
    taken = train(model, optimizer, texts, args.steps)
    coverage = optimizer.grass.metrics()["grass/coverage"]
    optimizer.grass.settle()
    del optimizer
    model.zero_grad()
    gc.collect()
    trained = loss_of(model, texts)
    begun = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    try:
        save_plain(model, args.output, max_shard_size=5 * 10**8)
        say(f"checkpoint of {size_of(args.output) / 1e9:.1f} GB written in {time.perf_counter() - begun:.0f} s")
        del model
        gc.collect()
        begun = time.perf_counter()
        again = convert_to_grass(fill(empty_model(config), stored_values(args.output), in_int8), settings)
        reloaded = loss_of(again, texts)
        say(f"read again and run in {time.perf_counter() - begun:.0f} s")
    finally:
        shutil.rmtree(args.output, ignore_errors=True)
    conclude(args, started, taken, parameters=count, coverage=coverage, trained=trained, reloaded=reloaded)


if __name__ == "__main__":
    main()
