"""``grass-hf bench speed``: seconds per training step of fused AdamW, Grass and the frozen limit.

The frozen limit trains everything that Grass trains except the target matrices: it still back-propagates through
them, so no method that trains them can be faster. All three are stepped in every round of one run, because the speed
of a shared machine drifts, in changing order, and medians are compared.

[Note: memory kept] On a CPU the C library gives much of a step's memory back to the system after the step and takes it
again, page by page, in the next; which method pays for it depends on what was stepped before. The allocators of
accelerators keep their memory, and so does this bench, for all methods alike (`keep_memory`).
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..config import GrassConfig
from ..convert import convert_to_grass
from ..optim import grass_optimizer
from ..targets import plan

METHODS = ("adamw", "grass", "frozen")


@dataclass(frozen=True)
class Setting:
    """What is timed: a LLaMA, a batch and a rank. Defaults are the acceptance setting."""

    rank: int = 128
    side: str = "auto"
    layers: int = 12
    hidden: int = 768
    vocabulary: int = 32000
    batch: int = 4
    sequence: int = 256
    rounds: int = 18
    warmup: int = 2


# glibc's mallopt: never give memory back, take more of it at a time, no mappings of their own for large blocks.
_MALLOPT = {-1: -1, -2: 2**26, -4: 0}


def keep_memory() -> bool:
    """Let the C library keep freed memory from now on; whether it could. See [Note: memory kept]."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return all([mallopt(option, value) == 1 for option, value in _MALLOPT.items()])


def slowdown(dtype: torch.dtype, device: str) -> float:
    """How many times slower than float32 this device multiplies matrices in `dtype`: far above 1 means emulated."""

    def seconds(kind: torch.dtype) -> float:
        a, b = (torch.ones(256, 256, dtype=kind, device=device) for _ in range(2))
        return min(_timed(lambda: torch.mm(a, b), device) for _ in range(5))

    return seconds(dtype) / seconds(torch.float32)


@dataclass(frozen=True)
class Timing:
    """Seconds per step, a list per method, in one dtype; `observing` is Grass on a step that observes."""

    dtype: str
    seconds: dict[str, list[float]]
    observing: float

    def median(self, method: str) -> float:
        return statistics.median(self.seconds[method])

    def ratio(self, method: str, other: str) -> float:
        return self.median(method) / self.median(other)


def measure(setting: Setting, dtype: torch.dtype, device: str) -> Iterator[Timing | int]:
    """Time all methods in turn; yields the number of each finished round, then the `Timing`."""
    steps = {method: _make_step(method, setting, dtype, device) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    observing = 0.0
    # A step leaves caches and the allocator as it left them, so each method comes after each other one equally often.
    orders = itertools.cycle(itertools.permutations(METHODS))
    for number, order in zip(range(setting.warmup + setting.rounds), orders, strict=False):
        for method in order:
            elapsed = _timed(steps[method], device)
            if number >= setting.warmup:
                seconds[method].append(elapsed)
            elif method == "grass" and number == 0:
                observing = elapsed  # with the process's warm-up in it, so an upper bound
        yield number + 1
    yield Timing(str(dtype).removeprefix("torch."), seconds, observing)


def _make_step(method: str, setting: Setting, dtype: torch.dtype, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 8 // 3,
        num_hidden_layers=setting.layers,
        num_attention_heads=max(1, setting.hidden // 64),
        vocab_size=setting.vocabulary,
        max_position_embeddings=max(1024, setting.sequence),
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    # no counted step selects; the one before them takes the rows that docs/speed.md was measured with
    grass = GrassConfig(rank=setting.rank, side=setting.side, selection="top_r", update_interval=10**9, stagger=1)
    settings = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
    if method == "grass":
        optimizer = grass_optimizer(convert_to_grass(model, grass), torch.optim.AdamW, **settings)
    else:
        if method == "frozen":
            for target in plan(model, grass).targets:
                target.module.weight.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    tokens = torch.randint(setting.vocabulary, (setting.batch, setting.sequence), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
