"""``grass-hf estimate``: peaks of several methods side by side, or the largest rank that fits a card."""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainingArguments
from transformers.trainer import Trainer

from ..config.extras import install
from ..config.settings import GrassConfig
from ..config.sizes import parse_bytes
from ..integrations.base import base_class_and_kwargs
from ..integrations.model_configs import causal_model
from ..measure.bench.record import machine
from ..measure.estimate.fake_ranks import check_engine
from ..measure.estimate.memory import MemoryEstimate, estimate_memory, largest_rank
from ..measure.estimate.methods import check_method
from ..measure.estimate.simulate import Breakdown
from . import traffic

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_PARTS = tuple(field.name for field in dataclasses.fields(Breakdown))


def run_estimate(
    model: str,
    *,
    methods: list[str],
    grass: dict[str, Any],
    dtype: str,
    base: str,
    fit: str,
    within: str,
    json: Path | None,
    png: Path | None,
    network: traffic.Network | None = None,
    **setting: Any,
) -> None:
    """Estimate every method, print one table, write `json` and `png`; or find the largest rank that fits.

    With `network`, what a step sends and how long it takes comes first.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(_DTYPES)}.")
    methods = list(dict.fromkeys(name.strip() for given in methods for name in given.split(",")))
    for method in methods:
        check_method(method)
        check_engine(setting["engine"], setting["world_size"], method)
    budget = parse_bytes(fit, "--fit") if fit else None
    limit = parse_bytes(within, "--within") if within else None
    if budget and methods[0] != "grass":
        raise ValueError(f"--fit finds the rank of grass, and --method {methods[0]} was given: leave --method out.")
    pyplot = pyplot_for_png() if png else None
    if base:
        setting |= dict(zip(("optimizer", "optimizer_args"), _base(base), strict=True))
    config = GrassConfig(**grass)
    if budget and config.pattern:
        raise ValueError("--fit finds one rank for all layers: leave --rank-pattern and --density-pattern out.")
    model_config, factory = causal_model(model, getattr(torch, dtype))
    console = Console()
    if budget:
        config = _fit(console, model, model_config, factory, config, budget, setting)
    steps = network and traffic.show_steps(console, model, factory, config, network, **setting)
    estimates = []
    for method in methods:
        with _progress(console, f"{method}: simulating training steps of {model}"):
            estimates.append(estimate_memory(factory, config, method=method, **setting))
    title = (
        f"{model}, {dtype}, {setting['batch']} x {setting['sequence']} tokens"
        + (", gradient checkpointing" if setting["gradient_checkpointing"] else "")
        + f", {escape(config.shown_rank)}, side={config.side}, {config.selection}"
        + (f", stagger={config.stagger}" if config.stagger != GrassConfig.stagger else "")
        + (f", {config.weight_dtype} weights" if config.weight_dtype else "")
        + ("" if config.resident else ", slices released between steps")
        + (f"; one of {setting['world_size']} ranks under {setting['engine']}" if setting["world_size"] > 1 else "")
    )
    console.print(_table(estimates, title))
    for line in _remarks(estimates):
        console.print(line)
    if json is not None:
        _write(json, model, dtype, base, config, setting, estimates, steps)
    if png is not None:
        _draw(pyplot, estimates, title, png)
    if limit is not None and estimates[0].peak > limit:
        raise ValueError(
            f"--within {within}: {methods[0]} needs {_gib(estimates[0].peak)} GiB, more than {_gib(limit)}: "
            "--fit finds the largest rank that fits."
        )


def _fit(console: Console, model: str, model_config, factory, config: GrassConfig, budget: int, setting) -> GrassConfig:
    """The config with the largest rank whose peak is within the budget."""
    highest = max(
        getattr(model_config.get_text_config(), name, 0) or 0 for name in ("intermediate_size", "hidden_size")
    )
    if not highest:
        raise ValueError(f"--fit does not know how large a rank can be for {model}: give --rank instead.")

    def peak_of(rank: int) -> int:
        with _progress(console, f"rank {rank}: simulating training steps of {model}"):
            tried = dataclasses.replace(config, rank=rank, density=None)
            found = estimate_memory(factory, tried, **setting).peak
        console.print(f"rank {rank}: {_gib(found)} GiB")
        return found

    found = largest_rank(peak_of, budget, highest)
    if found is None:
        raise ValueError(
            f"--fit {_gib(budget)} GiB is less than {model} needs at rank 1: try --gradient-checkpointing, fewer "
            "--sequence tokens, --slice-dtype bfloat16 or --targets all-matrices."
        )
    console.print(f"largest rank within {_gib(budget)} GiB ({budget:,} bytes): {found[0]}, peak {_gib(found[1])} GiB")
    return dataclasses.replace(config, rank=found[0], density=None)


def _base(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    return base_class_and_kwargs(args, name, {}, Trainer.get_optimizer_cls_and_kwargs)


def _progress(console: Console, text: str) -> Progress:
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
    progress.live.transient = True
    progress.add_task(text, total=None)
    return progress


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def _table(estimates: list[MemoryEstimate], title: str) -> Table:
    table = Table(title=title, title_justify="left", caption="GiB (2^30 bytes) of live tensors", caption_justify="left")
    table.add_column("at the peak")
    for estimate in estimates:
        table.add_column(estimate.method + ("*" if estimate.computed else ""), justify="right")
    for part in _PARTS:
        if part == "communication" and not any(e.at_peak.communication for e in estimates):
            continue
        table.add_row(part.replace("_", " "), *(_gib(getattr(e.at_peak, part)) for e in estimates))
    table.add_section()
    table.add_row("peak", *(_gib(e.peak) for e in estimates), style="bold")
    table.add_row("peak of an ordinary step", *(_gib(e.step.total) for e in estimates))
    table.add_row("peak of an observing step", *(_gib(e.observing.total) if e.observing else "-" for e in estimates))
    return table


def _remarks(estimates: Iterable[MemoryEstimate]) -> Iterable[str]:
    yield "An allocator's fragmentation, kernels' own workspace and the driver's context come on top."
    if any(estimate.computed for estimate in estimates):
        yield "* what the optimizer (under ZeRO, the engine) holds is computed by formula; the rest is simulated"


def _write(path: Path, model, dtype, base, config, setting, estimates, network) -> None:
    shown = {k: v for k, v in setting.items() if k not in ("optimizer", "optimizer_args")}
    rows = [dataclasses.asdict(e) | {"peak": e.peak} for e in estimates]
    result = {"model": model, "dtype": dtype, "base": base or "fused AdamW", "config": config.to_dict()}
    result |= {"setting": shown, "bytes": rows} | {"versions": machine()["versions"], "date": machine()["date"]}
    if network:
        result["network"] = network
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")


def pyplot_for_png():
    """matplotlib.pyplot without a display; a sentence if there is none."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"--png needs matplotlib, which is not installed: {install('matplotlib')}.") from None
    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    return pyplot


def _draw(pyplot, estimates: list[MemoryEstimate], title: str, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(2.5 + 1.1 * len(estimates), 4.5), layout="constrained")
    names, bottom = [estimate.method for estimate in estimates], [0.0] * len(estimates)
    for part in _PARTS:
        heights = [getattr(estimate.at_peak, part) / 2**30 for estimate in estimates]
        axes.bar(names, heights, bottom=bottom, label=part.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("GiB at the peak")
    axes.set_title(title, fontsize="small", wrap=True)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
