"""``grass-hf estimate``: peaks of several methods side by side, and what fits a card."""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config.extras import install
from ..config.settings import GrassConfig
from ..config.sizes import parse_bytes, shown_bytes
from ..integrations.model_configs import causal_model
from ..measure.bench.record import machine
from ..measure.estimate.fake_ranks import check_engine
from ..measure.estimate.memory import MemoryEstimate, estimate_memory
from ..measure.estimate.methods import check_method
from ..measure.estimate.simulate import Breakdown
from . import fitting, traffic

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
    """Estimate every method, print one table, write `json` and `png`; first of all find what fits.

    With `network`, what a step sends and how long it takes comes first. Without `methods` it is grass, and AdamW over
    all weights beside it.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(_DTYPES)}.")
    named = list(dict.fromkeys(name.strip() for given in methods for name in given.split(","))) or ["grass"]
    for method in named:
        check_method(method)
        check_engine(setting["engine"], setting["world_size"], method)
    budget = parse_bytes(fit, "--fit") if fit else None
    limit = parse_bytes(within, "--within") if within else None
    if budget and named[0] != "grass":
        raise ValueError(f"--fit finds settings of grass, and --method {named[0]} was given: leave --method out.")
    pyplot = pyplot_for_png() if png else None
    plain, given = dict(setting), {*grass, *(["base"] if base else [])}
    if base:
        setting |= dict(zip(("optimizer", "optimizer_args"), fitting.base(base), strict=True))
    config = GrassConfig(**grass)
    if budget and config.pattern:
        raise ValueError("--fit finds one rank for all layers: leave --rank-pattern and --density-pattern out.")
    model_config, factory = causal_model(model, getattr(torch, dtype))
    console = Console()
    peak_of = _peaks(console, model, factory)
    choice = fitting.Choice(config, setting)
    if budget:
        choice, said = fitting.best(peak_of, choice, budget, _highest(model, model_config), given)
        console.print(said)
    steps = network and traffic.show_steps(console, model, factory, choice.config, network, **choice.setting)
    estimates = []
    for method in named if methods else (*named, "adamw"):
        # AdamW that nobody asked for is the plain one
        own = choice.setting if method in named else {**plain, **_same(choice.setting)}
        with _progress(console, f"{method}: simulating training steps of {model}"):
            estimates.append(estimate_memory(factory, choice.config, method=method, **own))
    title = _title(model, dtype, choice)
    console.print(table_of(estimates, title))
    for line in remarks(estimates):
        console.print(line)
    if json is not None:
        _write(json, model, dtype, base, choice.config, choice.setting, estimates, steps)
    if png is not None:
        _draw(pyplot, estimates, title, png)
    if limit is not None and estimates[0].peak > limit:
        hint = _hint(peak_of, choice, limit, given) if named[0] == "grass" else ""
        raise ValueError(
            f"--within {within}: {named[0]} needs {shown_bytes(estimates[0].peak)}, more than {shown_bytes(limit)}: "
            f"{hint}--fit {within} finds the largest rank that fits."
        )


def _same(setting: dict[str, Any]) -> dict[str, Any]:
    return {"gradient_checkpointing": setting["gradient_checkpointing"]}


def _hint(peak_of: fitting.Peak, choice: fitting.Choice, limit: int, given: set[str]) -> str:
    found = fitting.first_that_fits(peak_of, choice, limit, given)
    if found is None:
        return "fewer --sequence tokens, a smaller --density or --weight-dtype int8 need less, and "
    return f"{' '.join(found[0].words)} brings it to {shown_bytes(found[1])}, and "


def _highest(model: str, model_config: Any) -> int:
    """The largest rank that a layer of the model can have."""
    names = ("intermediate_size", "hidden_size")
    found = max(getattr(model_config.get_text_config(), name, 0) or 0 for name in names)
    if not found:
        raise ValueError(f"--fit does not know how large a rank can be for {model}: give --rank instead.")
    return found


def _peaks(console: Console, model: str, factory: Callable[[], Any]) -> fitting.Peak:
    """The peak of a choice, printed as it is found."""
    known: dict[str, int] = {}

    def peak_of(choice: fitting.Choice) -> int:
        said = ", ".join((choice.config.shown_rank, *choice.words))
        if said not in known:
            with _progress(console, f"{said}: simulating training steps of {model}"):
                known[said] = estimate_memory(factory, choice.config, **choice.setting).peak
            console.print(f"{said}: {shown_bytes(known[said])}")
        return known[said]

    return peak_of


def _title(model: str, dtype: str, choice: fitting.Choice) -> str:
    config, setting = choice.config, choice.setting
    return (
        f"{model}, {dtype}, {setting['batch']} x {setting['sequence']} tokens"
        + (", gradient checkpointing" if setting["gradient_checkpointing"] else "")
        + f", {escape(config.shown_rank)}, side={config.side}, {config.selection}"
        + (f", stagger={config.stagger}" if config.stagger != GrassConfig.stagger else "")
        + (f", {config.weight_dtype} weights" if config.weight_dtype else "")
        + ("" if config.resident else ", slices released between steps")
        + (f"; one of {setting['world_size']} ranks under {setting['engine']}" if setting["world_size"] > 1 else "")
    )


def _progress(console: Console, text: str) -> Progress:
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
    progress.live.transient = True
    progress.add_task(text, total=None)
    return progress


def table_of(estimates: list[MemoryEstimate], title: str) -> Table:
    """Peaks by what is in them, a column each; of small models in MiB."""
    large = max(estimate.peak for estimate in estimates) >= 2**30
    unit, name, digits = (2**30, "GiB (2^30 bytes)", 2) if large else (2**20, "MiB (2^20 bytes)", 1)

    def shown(count: int) -> str:
        return f"{count / unit:.{digits}f}"

    table = Table(title=title, title_justify="left", caption=f"{name} of live tensors", caption_justify="left")
    table.add_column("at the peak")
    for estimate in estimates:
        table.add_column(estimate.method + ("*" if estimate.computed else ""), justify="right")
    for part in _PARTS:
        if part == "communication" and not any(e.at_peak.communication for e in estimates):
            continue
        table.add_row(part.replace("_", " "), *(shown(getattr(e.at_peak, part)) for e in estimates))
    table.add_section()
    table.add_row("peak", *(shown(e.peak) for e in estimates), style="bold")
    table.add_row("peak of an ordinary step", *(shown(e.step.total) for e in estimates))
    table.add_row("peak of an observing step", *(shown(e.observing.total) if e.observing else "-" for e in estimates))
    return table


def remarks(estimates: Iterable[MemoryEstimate]) -> Iterable[str]:
    """What the figures are not."""
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
