"""``grass-hf bench``: run a measurement, show it, file it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..bench import record, speed

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# A dtype that multiplies this many times slower than float32 is emulated; timings in it say nothing.
_EMULATED = 4.0


def run_speed(
    *, dtypes: list[str], device: str, slow_dtypes: bool, keep_memory: bool, json: Path | None, **setting: Any
) -> None:
    """Time every dtype, print one table of medians and ratios, append one row per dtype to `json`."""
    for name in dtypes:
        if name not in _DTYPES:
            raise ValueError(f"dtype={name!r} is not known: choose one of {', '.join(_DTYPES)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = speed.Setting(**setting)
    kept = keep_memory and device == "cpu" and speed.keep_memory()
    console = Console()
    console.print(
        f"LLaMA {setting.layers} layers x {setting.hidden}, {setting.batch * setting.sequence} tokens a step, "
        f"r = {setting.rank}, side={setting.side}, on {record.machine()['device']}"
    )
    table = Table()
    for heading in ("dtype", "AdamW", "Grass", "frozen limit", "Grass / frozen", "Grass / AdamW"):
        table.add_column(heading, justify="right")
    rounds = setting.warmup + setting.rounds
    for name in dtypes:
        dtype = getattr(torch, name)
        factor = speed.slowdown(dtype, device)
        if factor > _EMULATED and not slow_dtypes:
            console.print(
                f"{name} left out: this device multiplies it {factor:.0f} times slower than float32, so it is "
                "emulated and its timings say nothing about the method (--slow-dtypes times it all the same)."
            )
            continue
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"{name}: rounds of AdamW, Grass, frozen", total=rounds)
            for result in speed.measure(setting, dtype, device):
                if isinstance(result, speed.Timing):
                    timing = result
                else:
                    progress.update(task, completed=result)
        ratios = {other: timing.ratio("grass", other) for other in ("frozen", "adamw")}
        medians = {method: timing.median(method) for method in speed.METHODS}
        table.add_row(name, *(f"{medians[m]:.3f} s" for m in speed.METHODS), *(f"{r:.3f}" for r in ratios.values()))
        if json is not None:
            row = {
                "bench": "speed",
                "dtype": name,
                "setting": dataclasses.asdict(setting),
                "memory_kept": kept,
                "seconds": timing.seconds,
            }
            row |= {"median": medians, "grass_over": ratios}
            record.append(json, row | record.machine())
    if table.row_count:
        console.print(table)
        console.print(f"medians of {setting.rounds} steps each, taken in turn")
