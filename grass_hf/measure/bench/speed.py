"""``grass-hf bench speed``: seconds per training step of fused AdamW, Grass, the frozen limit, and Grass's peers.

The frozen limit trains everything that Grass trains except the target matrices: it still back-propagates through
them, so no method that trains them can be faster. All methods are stepped in every round of one run, because the speed
of a shared machine drifts, in changing order, and medians are compared. No counted step of a round selects or
projects; the one after the last round does, of every method that has such steps, and is timed by itself.

[Note: memory kept] On a CPU the C library gives much of a step's memory back to the system after the step and takes it
again, page by page, in the next; which method pays for it depends on what was stepped before. The allocators of
accelerators keep their memory, and so does this bench, for all methods alike (`keep_memory`).

[Note: own peaks] On a GPU all methods' models are in memory together, so the peak of one is what its step adds to what
was there before it, and what it holds between its steps.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from ...config.fields import unknown_key
from ...config.settings import GrassConfig
from ...convert.conversion import convert_to_grass
from ...integrations.base import base_class_and_kwargs, check_base
from ...optim.factory import grass_optimizer
from .methods import KINDS, check_installed, make_ready, resolve, target_names, trainer_flags

METHODS = ("adamw", "grass", "frozen")


@dataclass(frozen=True)
class Setting:
    """What is timed: a LLaMA, a batch and a rank. Defaults are the acceptance setting.

    Attributes:
        methods: names of `measure.bench.methods.KINDS`.
        base: Grass's base optimizer, a Trainer name or "muon".
        compiled: forward and backward by torch.compile, of every method.
        multiple: the feed-forward width is rounded up to one of it, LLaMA's own: a GPU multiplies odd sizes many times
            slower.
        interval: steps between Grass's selections, None for `gap`.
    """

    rank: int = 128
    side: str = "auto"
    layers: int = 12
    hidden: int = 768
    vocabulary: int = 32000
    batch: int = 4
    sequence: int = 256
    rounds: int = 18
    warmup: int = 2
    methods: tuple[str, ...] = METHODS
    base: str = "adamw_torch_fused"
    compiled: bool = False
    multiple: int = 256
    interval: int | None = None

    @property
    def gap(self) -> int:
        """Steps between two that select or project: the first is of the warm-up, the second after all rounds."""
        return self.warmup + self.rounds


# glibc's mallopt: never give memory back, take more of it at a time, no mappings of their own for large blocks.
_MALLOPT = {-1: -1, -2: 2**26, -4: 0}


def keep_memory() -> bool:
    """Let the C library keep freed memory from now on; whether it could. See [Note: memory kept]."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return all([mallopt(option, value) == 1 for option, value in _MALLOPT.items()])


def check(setting: Setting) -> None:
    """Refuse methods that are not known or not installed, and a base optimizer that is not known.

    Raises:
        ValueError: with a sentence.
    """
    for method in setting.methods:
        if method not in KINDS:
            raise ValueError(f"--method {unknown_key(method, KINDS, 'a method that can be timed')}")
        check_installed(method)
    if "grass" not in setting.methods or len(set(setting.methods)) < len(setting.methods):
        raise ValueError(f"--method {', '.join(setting.methods)}: name grass, and what it is compared with, once each.")
    check_base(setting.base, "--base")


def slowdown(dtype: torch.dtype, device: str) -> float:
    """How many times slower than float32 this device multiplies matrices in `dtype`: far above 1 means emulated."""

    def seconds(kind: torch.dtype) -> float:
        a, b = (torch.ones(256, 256, dtype=kind, device=device) for _ in range(2))
        return min(timed(lambda: torch.mm(a, b), device) for _ in range(5))

    return seconds(dtype) / seconds(torch.float32)


@dataclass(frozen=True)
class Timing:
    """What was found in one dtype, by method.

    Attributes:
        dtype: of the weights.
        seconds: of every counted step.
        reselecting: seconds of a step that selects or projects; of methods that have such steps.
        peaks: bytes at the peak of any step, on a GPU; see [Note: own peaks].
    """

    dtype: str
    seconds: dict[str, list[float]]
    reselecting: dict[str, float]
    peaks: dict[str, int]

    def median(self, method: str) -> float:
        return statistics.median(self.seconds[method])

    def ratio(self, method: str, other: str) -> float:
        return self.median(method) / self.median(other)


def orders(methods: tuple[str, ...]) -> list[list[str]]:
    """Orders in which each method comes after each other one equally often, since a step leaves caches and the
    allocator as it left them: a square of Williams, and the same backwards."""
    count = len(methods)
    first = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    square = [[methods[(place + shift) % count] for place in first] for shift in range(count)]
    return square + [order[::-1] for order in square]


def measure(setting: Setting, dtype: torch.dtype, device: str) -> Iterator[Timing | int]:
    """Time all methods in turn; yields the number of each finished round, then the `Timing`."""
    runs = {method: _Run(method, setting, dtype, device) for method in setting.methods}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for number, order in zip(range(setting.gap), itertools.cycle(orders(setting.methods)), strict=False):
        for method in order:
            elapsed = runs[method].step()
            if number >= setting.warmup:
                seconds[method].append(elapsed)
        yield number + 1
    reselecting = {method: run.step() for method, run in runs.items() if KINDS[method].gap}
    peaks = {method: run.peak for method, run in runs.items() if device == "cuda"}
    yield Timing(str(dtype).removeprefix("torch."), seconds, reselecting, peaks)


class _Run:
    """The model of a method and what it holds.

    Attributes:
        peak: bytes of the GPU's memory; see [Note: own peaks].
    """

    def __init__(self, method: str, setting: Setting, dtype: torch.dtype, device: str):
        self.device, self.held, self.peak = device, 0, 0
        before = self._allocated()
        self._step = make_step(method, setting, dtype, device)
        self.held = self._allocated() - before

    def step(self) -> float:
        """Take a training step; its seconds."""
        before = self._allocated()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elapsed = timed(self._step, self.device)
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before + self.held)
        self.held += self._allocated() - before
        return elapsed

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0


def make_step(method: str, setting: Setting, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A function that takes a training step of a method's own model.

    Args:
        method: a name of `measure.bench.methods.KINDS`.
        setting: of the model, the batch and Grass.
        dtype: of the weights.
        device: "cpu" or "cuda".
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=-(-setting.hidden * 8 // 3 // setting.multiple) * setting.multiple,
        num_hidden_layers=setting.layers,
        num_attention_heads=max(1, setting.hidden // 64),
        vocab_size=setting.vocabulary,
        max_position_embeddings=max(1024, setting.sequence),
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model, optimizer = _make_ready(method, model, setting)
    forward = torch.compile(model) if setting.compiled else model
    tokens = torch.randint(setting.vocabulary, (setting.batch, setting.sequence), device=device)

    def step() -> None:
        forward(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _make_ready(method: str, model: PreTrainedModel, setting: Setting) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as a method trains it, and the optimizer; of peers the one that the Trainer makes."""
    options = {"lr": 1e-4, "weight_decay": 0.1}
    if method == "grass":
        # the first step takes the rows that docs/speed.md was measured with
        interval = setting.interval or setting.gap
        grass = GrassConfig(
            rank=setting.rank, side=setting.side, selection="top_r", update_interval=interval, stagger=1
        )
        convert_to_grass(model, grass)
        factory = Trainer.get_optimizer_cls_and_kwargs
        made, more = base_class_and_kwargs(_arguments(), setting.base, {}, factory)
        return model, grass_optimizer(model, made, **{**more, **options})
    gap = KINDS[method].gap
    settings = resolve(method, {} if gap is None else {gap: setting.gap}, setting.rank, "all-linear")
    names = target_names(model, "all-linear")
    dtype = model.dtype
    ready, _ = make_ready(method, model, settings, names)
    for name, param in ready.named_parameters():
        if "lora_" in name:
            # PEFT makes float32 adapters, which take twice as long over half-precision weights
            param.data = param.data.to(dtype)
    words = trainer_flags(method, settings, names)
    pairs = zip(words[::2], words[1::2], strict=True)
    flags: dict[str, Any] = {name.removeprefix("--"): value for name, value in pairs}
    made, more = Trainer.get_optimizer_cls_and_kwargs(_arguments(**flags), cast(PreTrainedModel, ready))
    trained = more.pop("params", [param for param in ready.parameters() if param.requires_grad])
    return ready, made(trained, **{**more, **options})


def _arguments(**flags: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=tempfile.gettempdir(), report_to="none", **flags)


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds of a call, and of what it has launched on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
