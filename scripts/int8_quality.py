"""Frozen weights in int8 against bfloat16: the same model, text, steps and seeds; held-out loss, a file and a figure.

LLaMA of configs/llama_20m.json from random bfloat16 weights, on the State of the Union speeches in the 32,000 pieces of
mistral-common's tokenizer (`make .venv/.stamp-proof`); the last speeches are held out. Slices are float32 in both runs,
so what differs is how rows wait for their turn, and how they are rounded when they leave.

    OMP_NUM_THREADS=1 int8_quality.py --json docs/results/int8_quality.json --png docs/int8_quality.png
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from proving import tokens_of_speeches
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.bench.record import machine

HELD_OUT = 12  # speeches


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/llama_20m.json")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="per sequence")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--interval", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=40, help="steps between two evaluations")
    parser.add_argument("--evaluated", type=int, default=32, help="held-out sequences")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


def run(args: argparse.Namespace, weight_dtype: str | None, seed: int, train: Tensor, held_out: Tensor) -> dict:
    """Held-out losses by step of one run."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(args.config, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = {"density": args.density, "update_interval": args.interval, "seed": seed}
    convert_to_grass(model, GrassConfig(weight_dtype=weight_dtype, **settings))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=args.lr, weight_decay=0.1, fused=True)
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.Generator().manual_seed(seed)
    losses, started = {}, time.perf_counter()
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            losses[step] = held_out_loss(model, held_out, args.batch)
        if step == args.steps:
            break
        tokens = train[torch.randint(len(train), (args.batch,), generator=order)]
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - started
    coverage = optimizer.grass.metrics()["grass/coverage"]
    name = weight_dtype or "bfloat16"
    print(
        f"{name}, seed {seed}: held-out loss {losses[args.steps]:.4f}, {coverage:.0%} trained, {seconds:.0f} s",
        flush=True,
    )
    return {"weights": name, "seed": seed, "losses": losses, "coverage": coverage, "seconds": seconds}


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Tensor, batch: int) -> float:
    model.eval()
    losses = [model(input_ids=tokens, labels=tokens).loss.item() * len(tokens) for tokens in held_out.split(batch)]
    model.train()
    return sum(losses) / len(held_out)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    for row in rows:
        style = {
            "color": "C0" if row["weights"] == "bfloat16" else "C1",
            "linestyle": ["-", "--", ":"][row["seed"] % 3],
        }
        axes.plot(row["losses"].keys(), row["losses"].values(), label=f"{row['weights']}, seed {row['seed']}", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    vocabulary = AutoConfig.from_pretrained(args.config).vocab_size
    speeches = list(tokens_of_speeches(vocabulary))
    train, held_out = (
        torch.tensor([token for speech in part for token in speech])
        for part in (speeches[:-HELD_OUT], speeches[-HELD_OUT:])
    )
    train, held_out = (t[: len(t) // args.tokens * args.tokens].view(-1, args.tokens) for t in (train, held_out))
    held_out = held_out[:: max(1, len(held_out) // args.evaluated)][: args.evaluated]
    rows = [
        run(args, weight_dtype, int(seed), train, held_out)
        for seed in args.seeds.split(",")
        for weight_dtype in (None, "int8")
    ]
    for name in ("bfloat16", "int8"):
        found = [row["losses"][args.steps] for row in rows if row["weights"] == name]
        print(f"{name}: mean held-out loss {sum(found) / len(found):.4f} of {len(found)} seeds")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows, **machine()}, indent=2) + "\n")
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
