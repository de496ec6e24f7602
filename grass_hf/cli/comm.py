"""``grass-hf bench comm``: messages of training steps, counted in running processes, beside the expectation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config.settings import GrassConfig
from ..integrations.model_configs import causal_model
from ..measure.bench import comm, record
from ..measure.estimate.traffic import ENGINES, KINDS, traffic
from .traffic import DTYPES

_COLUMNS = ("ordinary step", "selecting step", "mean over K", "expected", "counted / expected", "Grass / AdamW")


def run_comm(
    model: str, *, grass: dict[str, Any], engines: list[str], ranks: int, dtype: str, json: Path | None, **shape: int
) -> None:
    """Count every engine's messages, print one table, append one row to `json`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
    if ranks < 2:
        raise ValueError(f"--ranks {ranks} sends nothing: give 2 or more.")
    config = GrassConfig(**grass)
    model_config, factory = causal_model(model, getattr(torch, dtype))
    with torch.device("meta"):
        plain = factory()
    # before anything is started: what does not fit is said here
    expected = {}
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"--engine {engine} is not known: choose among {', '.join(ENGINES)}.")
        placed = comm.placed(config, engine, ranks, dtype)
        for method, settings in (("adamw", None), ("grass", placed)):
            expected[engine, method] = traffic(plain, settings, engine).sent(engine, ranks)
    console = Console()
    title = f"{model}, {dtype}, {ranks} ranks, {config.shown_rank}, {config.target_modules}, side={config.side}"
    table = Table(title=f"{title}, K = {config.update_interval}", title_justify="left")
    for heading in ("", "", "", *_COLUMNS):
        table.add_column(heading, justify="right" if heading else "left")
    rows: list[dict[str, Any]] = []
    with spinner(console, f"{ranks} processes train {model}"):
        given: dict[str, Any] = {"engines": engines, "ranks": ranks, "dtype": dtype, **shape}
        for engine, method, counted in comm.measure(model_config.to_dict(), config, **given):
            average = counted.average(config.update_interval)
            row = {"engine": engine, "method": method, "ordinary": counted.ordinary, "selecting": counted.selecting}
            rows.append(row | {"messages": counted.messages, "mean": average, "expected": expected[engine, method]})
            _add(table, rows[-1], rows[-2]["mean"] if method == "grass" else None)
    console.print(table)
    console.print("MB (10^6 bytes) of messages; around a ring each rank sends 2 (N-1)/N of what is all-reduced.")
    if json is not None:
        setting = {"model": model, "ranks": ranks, "dtype": dtype, **shape}
        filed: dict[str, Any] = {"bench": "comm", "setting": setting, "grass": config.to_dict(), "counted": rows}
        record.append(json, filed | record.machine())


def _add(table: Table, row: dict[str, Any], base: dict[str, float] | None) -> None:
    for kind in KINDS:
        mean, expected = row["mean"][kind], row["expected"][kind]
        if not mean and not expected:
            continue
        cells = [row["engine"], row["method"], kind.replace("_", "-")]
        cells += [f"{v / 1e6:.4f}" for v in (row["ordinary"][kind], row["selecting"][kind], mean, expected)]
        cells += [
            f"{mean / expected:.4f}" if expected else "",
            f"{mean / base[kind]:.4f}" if base and base[kind] else "",
        ]
        table.add_row(*cells)


def spinner(console: Console, text: str) -> Progress:
    """A line that shows that something goes on, and for how long."""
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
    progress.live.transient = True
    progress.add_task(text, total=None)
    return progress
