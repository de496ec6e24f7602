"""Train all of LLaMA-7B in the memory of a small machine: `make proof-7b`.

Random bfloat16 weights, the State of the Union speeches in the 32,000 pieces of mistral-common's tokenizer, a few steps
with rows selected anew in between; then the checkpoint is written and read again shard by shard. What is never there:
a second copy of the weights, a full gradient, a full optimizer state.

    proof_7b.py [--config configs/llama_7b.json] [--steps 6] [--tokens 256] [--rank 256] ... (--help)
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
from transformers import AutoConfig

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model

DEFAULTS = {
    "config": "configs/llama_7b.json",
    "steps": 6,
    "tokens": 256,
    "rank": 256,
    "interval": 3,
    "lr": 2e-4,
    "budget": 18.5,
    "output": Path("runs/proof_7b"),
}


def main() -> None:
    args = parser(__doc__, **DEFAULTS).parse_args()
    started = time.perf_counter()
    config = AutoConfig.from_pretrained(args.config, use_cache=False)
    texts = training_texts(args.texts, args.tokens, config.vocab_size)
    model = fill(empty_model(config), random_values(config.initializer_range))
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters made in {time.perf_counter() - started:.0f} s")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = GrassConfig(rank=args.rank, update_interval=args.interval, target_modules="all-matrices", resident=False)
    convert_to_grass(model, settings)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=args.lr, fused=True)
    taken = train(model, optimizer, texts, args.steps)
    coverage = optimizer.grass.metrics()["grass/coverage"]
    del optimizer
    restore_model(model)
    gc.collect()
    trained = loss_of(model, texts)
    begun = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    try:
        model.save_pretrained(args.output, max_shard_size="500MB")
        say(f"checkpoint of {size_of(args.output) / 1e9:.1f} GB written in {time.perf_counter() - begun:.0f} s")
        del model
        gc.collect()
        begun = time.perf_counter()
        again = loss_of(fill(empty_model(config), stored_values(args.output)), texts)
        say(f"read again and run in {time.perf_counter() - begun:.0f} s")
    finally:
        shutil.rmtree(args.output, ignore_errors=True)
    conclude(args, started, taken, parameters=count, coverage=coverage, trained=trained, reloaded=again)


if __name__ == "__main__":
    main()
