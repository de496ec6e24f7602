"""Train all of a LLaMA on a GPU that is made as small as another: `make proof-gpu`.

Of the card's memory only `--card` is used: what the driver's context takes of it, and the rest by torch's allocator,
which refuses more (set_per_process_memory_fraction). Random weights are made on the GPU, one parameter after the other;
the text is the State of the Union speeches in the 32,000 pieces of mistral-common's tokenizer. A few steps with rows
selected anew in between; then the loss on the text must have fallen.

    proof_gpu.py --config configs/llama_13b.json --card 40 --rank 512 --tokens 256 [--method adamw] ... (--help)
"""

import argparse
import time
from statistics import mean, median

import torch
from proving import (
    GIB,
    ROWS,
    empty_model,
    fill,
    in_int8,
    loss_of,
    parser,
    plain,
    random_values,
    say,
    train,
    training_texts,
)
from torch import cuda, nn
from transformers import AutoConfig

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.measure.bench import record
from grass_hf.measure.estimate.simulate import enable_checkpointing

DEFAULTS = {
    "config": "configs/llama_13b.json",
    "steps": 9,
    "tokens": 256,
    "rank": 512,
    "interval": 4,
    "lr": 1e-4,
    "card": 40.0,
}
DEVICE = "cuda"
# Bytes: more than a driver's context takes of a GPU.
MOST_TAKEN = 2 * 10**9


def limited(gigabytes: float) -> int:
    """Make the allocator refuse what a card of so many 10^9 bytes would; bytes that the driver has taken of it."""
    free, total = cuda.mem_get_info()
    taken = total - free
    if taken > MOST_TAKEN:
        raise SystemExit(
            f"{taken / 1e9:.1f} GB of the GPU are in use: end the other processes on it, which would count."
        )
    cuda.set_per_process_memory_fraction((gigabytes * 1e9 - taken) / total)
    return taken


def made(args: argparse.Namespace, config) -> nn.Module:
    """The model on the GPU; int8 weights are quantised as soon as they have been made."""
    store = in_int8 if args.int8 else plain
    model = fill(empty_model(config), random_values(config.initializer_range, device=DEVICE), store, DEVICE)
    model.model.rotary_emb.to(DEVICE)
    if args.checkpointing:
        enable_checkpointing(model)
    return model


def ready(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    if args.method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    more = {"weight_dtype": "int8"} if args.int8 else {"resident": not args.released, "slice_dtype": "bfloat16"}
    settings = GrassConfig(rank=args.rank, update_interval=args.interval, target_modules=args.targets, **ROWS, **more)
    convert_to_grass(model, settings)
    return grass_optimizer(model, torch.optim.AdamW, lr=args.lr, fused=True)


def prove(args: argparse.Namespace) -> dict:
    """Train, and what was seen."""
    taken = limited(args.card)
    config = AutoConfig.from_pretrained(args.config, use_cache=False)
    texts = training_texts(args.texts, args.tokens, config.vocab_size).to(DEVICE)
    begun = time.perf_counter()
    model = made(args, config)
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters made in {time.perf_counter() - begun:.1f} s, {taken / GIB:.2f} GiB taken by the driver")
    optimizer = ready(args, model)
    steps = train(model, optimizer, texts, args.steps)
    peak, reserved = cuda.max_memory_allocated(), cuda.max_memory_reserved()
    coverage = optimizer.grass.metrics()["grass/coverage"] if args.method == "grass" else 1.0
    del optimizer  # and its weights' gradients, which a step has set to None
    seconds = {kind: [s["seconds"] for s in steps[1:] if s["observes"] == kind] for kind in (False, True)}
    return {
        "parameters": count,
        "losses": [s["loss"] for s in steps],
        "before": mean(s["loss"] for s in steps[: args.texts]),
        "trained": loss_of(model, texts),
        "coverage": coverage,
        "seconds": [s["seconds"] for s in steps],
        "ordinary": median(seconds[False]),
        "observing": median(seconds[True]) if seconds[True] else None,
        "driver_bytes": taken,
        "allocated_bytes": peak,
        "reserved_bytes": reserved,
    }


def main(args: argparse.Namespace) -> None:
    if not cuda.is_available():
        raise SystemExit("proof_gpu.py needs a GPU, and torch sees none: proof_7b.py and proof_13b_int8.py need none.")
    row = {"proof": "gpu", **{name: value for name, value in vars(args).items() if name != "json"}}
    try:
        row |= prove(args)
    except torch.OutOfMemoryError as error:
        row |= {"ok": False, "out_of_memory": str(error)}
        print(f"{args.method} does NOT fit {args.card:g} GB: {str(error).splitlines()[0]}")
    else:
        used = row["driver_bytes"] + row["reserved_bytes"]
        row["ok"] = row["trained"] < row["before"] and used <= args.card * 1e9
        print(
            f"{'ok' if row['ok'] else 'FAILED'}: {args.method}, {row['parameters'] / 1e9:.2f} B parameters, "
            f"r={args.rank}, {args.tokens} tokens a step, {row['ordinary']:.3f} s a step, "
            f"observing {row['observing']}, "
            f"loss {row['before']:.3f} -> {row['trained']:.3f}, {row['coverage']:.1%} of the rows trained; "
            f"GiB: {row['allocated_bytes'] / GIB:.2f} allocated, {row['reserved_bytes'] / GIB:.2f} reserved, "
            f"{used / GIB:.2f} with the driver's, of {args.card * 1e9 / GIB:.2f}"
        )
    if args.json:
        record.append(args.json, {**row, **record.machine()})
    raise SystemExit(0 if row["ok"] else 1)


def flags() -> argparse.Namespace:
    made = parser(__doc__, **DEFAULTS)
    made.add_argument("--card", type=float, help="GB (10^9 bytes) of the card that this one is made as small as")
    made.add_argument("--method", choices=("grass", "adamw"), default="grass")
    made.add_argument("--targets", default="all-linear", help="target_modules of Grass")
    made.add_argument("--int8", action="store_true", help="weights of the layers in int8")
    made.add_argument("--released", action="store_true", help="resident=False")
    made.add_argument("--checkpointing", action="store_true", help="activations are recomputed")
    made.set_defaults(**DEFAULTS)
    return made.parse_args()


if __name__ == "__main__":
    main(flags())
