"""``grass-hf bench``: run a measurement, show it, file it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..measure.bench import host, memory, record, speed
from ..measure.bench.methods import PACKAGES

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# A dtype that multiplies this many times slower than float32 is emulated; timings in it say nothing.
_EMULATED = 4.0
# The last column of the table of speeds, by device.
_PEAK = {"cpu": (), "cuda": ("peak MiB",)}


def run_speed(
    *, dtypes: list[str], device: str, slow_dtypes: bool, keep_memory: bool, json: Path | None, **given: Any
) -> None:
    """Time every dtype, print one table of medians and ratios, append one row per dtype to `json`.

    Raises:
        ValueError: a dtype, a device or a method is not known or not there.
    """
    for name in dtypes:
        if name not in _DTYPES:
            raise ValueError(f"dtype={name!r} is not known: choose one of {', '.join(_DTYPES)}.")
    device = _device(device)
    setting = speed.Setting(**given)
    speed.check(setting)
    kept = keep_memory and device == "cpu" and speed.keep_memory()
    console = Console()
    console.print(
        f"LLaMA {setting.layers} layers x {setting.hidden}, {setting.batch * setting.sequence} tokens a step, "
        f"r = {setting.rank}, side={setting.side}, base={setting.base}, {'compiled, ' * setting.compiled}"
        f"on {record.device()}"
    )
    table = Table()
    for heading in ("dtype", "method"):
        table.add_column(heading)
    for heading in ("ms a step", "tokens/s", "Grass / it", "ms, selecting or projecting", *_PEAK[device]):
        table.add_column(heading, justify="right")
    for name in dtypes:
        dtype = getattr(torch, name)
        factor = speed.slowdown(dtype, device)
        if factor > _EMULATED and not slow_dtypes:
            console.print(
                f"{name} left out: this device multiplies it {factor:.0f} times slower than float32, so it is "
                "emulated and its timings say nothing about the method (--slow-dtypes times it all the same)."
            )
            continue
        timing = _measured(setting, dtype, device, console)
        for method in setting.methods:
            table.add_row(name, *_cells(timing, method, setting))
        if json is not None:
            row = {"bench": "speed", "memory_kept": kept, **_row(timing, setting)}
            record.append(json, row | record.machine(*PACKAGES))
    if table.row_count:
        console.print(table)
        console.print(f"medians of {setting.rounds} steps each, taken in turn")


def run_host(*, rounds: int, dtype: str, device: str, compiled: bool, json: Path | None) -> None:
    """Time the cases in which the host is the limit, print one table with targets beside, append one row to `json`.

    Raises:
        ValueError: a dtype or a device is not known or not there.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(_DTYPES)}.")
    device, console = _device(device), Console()
    words = f"LLaMA 12 layers x 64, 16 tokens a step, one thread, {dtype}, {'compiled, ' * compiled}"
    console.print(f"{words}on {record.device()}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("rounds", total=rounds)
        for result in host.measure(rounds, getattr(torch, dtype), device, compiled):
            if isinstance(result, dict):
                found = result
            else:
                progress.update(task, completed=max(0, result))
    reference = found["adamw"].median
    words = (
        f"LLaMA 12 layers x 64, 16 tokens a step, {dtype}, one thread, {'compiled, ' * compiled}on {record.device()}"
    )
    table = Table(title=words, title_justify="left")
    table.add_column("method")
    for heading in ("ms a step", "of AdamW's", "target", "operations", "target"):
        table.add_column(heading, justify="right")
    for name, case in host.CASES.items():
        took, operations = found[name].median, found[name].operations
        ratio = f"{case.ratio:.2f}" if case.ratio and not compiled else "-"
        most = f"{case.operations:,}" if case.operations and operations else "-"
        shown = f"{operations:,}" if operations else "-"
        table.add_row(name, f"{took * 1e3:.1f}", f"{took / reference:.2f}", ratio, shown, most)
    console.print(table)
    console.print(f'medians of {rounds} steps each, taken in turn; "observing" observes and selects in every step')
    if json is not None:
        row = {"bench": "host", "dtype": dtype, "compiled": compiled}
        row |= {"cases": {name: dataclasses.asdict(each) for name, each in found.items()}}
        record.append(json, row | record.machine(*PACKAGES))


def _measured(setting: speed.Setting, dtype: torch.dtype, device: str, console: Console) -> speed.Timing:
    """The timing of one dtype, with a bar that shows how far it is."""
    with Progress(console=console, transient=True) as progress:
        name = str(dtype).removeprefix("torch.")
        task = progress.add_task(f"{name}: rounds of {', '.join(setting.methods)}", total=setting.gap)
        for result in speed.measure(setting, dtype, device):
            if isinstance(result, speed.Timing):
                return result
            progress.update(task, completed=result)
    raise RuntimeError(f"the measurement of {name} gave no timing: that is a mistake in grass-hf, please report it.")


def _row(timing: speed.Timing, setting: speed.Setting) -> dict[str, Any]:
    """What is filed of a timing."""
    return {
        "dtype": timing.dtype,
        "setting": dataclasses.asdict(setting),
        "seconds": timing.seconds,
        "reselecting": timing.reselecting,
        "peak_bytes": timing.peaks,
        "median": {method: timing.median(method) for method in setting.methods},
        "grass_over": {method: timing.ratio("grass", method) for method in setting.methods},
    }


def _device(name: str) -> str:
    """A device by its name, or the one that there is."""
    if name not in ("", "cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not known: give cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and torch sees no GPU: give --device cpu.")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _cells(timing: speed.Timing, method: str, setting: speed.Setting) -> Iterator[str]:
    """A method's line of the table, from its name on."""
    seconds = timing.median(method)
    yield method
    yield f"{seconds * 1e3:.1f}"
    yield f"{setting.batch * setting.sequence / seconds:,.0f}"
    yield f"{timing.ratio('grass', method):.3f}"
    yield f"{timing.reselecting[method] * 1e3:.1f}" if method in timing.reselecting else "-"
    if method in timing.peaks:
        yield f"{timing.peaks[method] / 2**20:,.0f}"


# How close an estimate has to be, as a share of what was counted, and of what the system saw.
_COUNTED, _RESIDENT = 0.01, 0.05


def run_memory(*, cases: str, device: str, json: Path | None) -> None:
    """Estimate and train the chosen cases, print one table, append one row per case to `json`.

    Raises:
        ValueError: a case is not known, or an estimate is further off than it may be.
    """
    chosen = _cases(cases)
    device = _device(device)
    console, table = Console(), Table(title=f"peaks in MiB, on {record.device()}", title_justify="left")
    table.add_column("case")
    for heading in ("estimate", "counted", "off by", "allocated" if device == "cuda" else "resident", "off by"):
        table.add_column(heading, justify="right")
    far = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("cases estimated and trained", total=len(chosen))
        for number, case in chosen:
            found = memory.compare(case, device)
            progress.advance(task)
            errors = found.counted_error, found.resident_error
            sizes = [f"{size / 2**20:.1f}" for size in (found.estimate, found.counted, found.resident)]
            table.add_row(f"{number} {case.name}", *sizes[:2], f"{errors[0]:+.3%}", sizes[2], f"{errors[1]:+.2%}")
            if abs(errors[0]) > _COUNTED or abs(errors[1]) > _RESIDENT:
                far.append(case.name)
            if json is not None:
                row = {"bench": "memory", "on": device, "errors": {"counted": errors[0], "resident": errors[1]}}
                record.append(json, row | dataclasses.asdict(found) | {"malloc": memory.MALLOC} | record.machine())
    console.print(table)
    if far:
        raise ValueError(
            f"estimates of {', '.join(far)} are off by more than {_COUNTED:.0%} of the counted or {_RESIDENT:.0%} of "
            "the resident bytes: nothing else should run on the machine; if it is quiet, the estimator is wrong."
        )


def _cases(numbers: str) -> list[tuple[int, memory.Case]]:
    known = dict(enumerate(memory.CASES, start=1))
    try:
        wanted = [int(number) for number in numbers.split(",")] if numbers else list(known)
        return [(number, known[number]) for number in wanted]
    except (ValueError, KeyError):
        raise ValueError(f"--cases {numbers!r} names no cases: give numbers of 1 to {len(known)}, as 1,6.") from None
