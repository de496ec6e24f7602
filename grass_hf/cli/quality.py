"""``grass-hf bench quality`` and ``grass-hf bench report``: run a study and show it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import typer


def quality(
    study: Path = typer.Argument(
        ..., help="A YAML file: studies/smoke.yaml, studies/peers.yaml.", metavar="STUDY.yaml"
    ),
    out: Path | None = typer.Option(
        None, help="The rows, as lines of JSON: runs/quality_STUDY.jsonl if not given.", dir_okay=False
    ),
    only: str = typer.Option("", help="Methods of the study to run, with commas; all if not given."),
    workers: int = typer.Option(1, help="Runs side by side; seconds are measured with one alone.", min=1),
    threads: int = typer.Option(0, help="Of each run; 0 shares the cores among the workers.", min=0),
    limit: int | None = typer.Option(None, help="Stop after so many runs; the same command goes on.", min=1),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be run, and how long it took so far."),
) -> None:
    """Train one model on one text by every method, each at its own best rates, and file a row per run.

    For example:

        grass-hf bench quality studies/peers.yaml

        grass-hf bench quality studies/peers.yaml --only adamw,grass_paper --workers 2

    The rate of the target matrices (as a multiple of the rate of everything else) is tuned beside the rate itself, on
    a grid of equal size for each method. A study that was interrupted goes on with the runs that have no row yet.
    `grass-hf bench report` makes tables and a plot; docs/benchmarks.md says how the comparison is made fair.
    """
    from ..recipes.parse import read_document

    read_document(study)  # a file that cannot be read is refused before torch is imported

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..measure.bench.methods import check_installed
    from ..recipes.study.grid import load_study
    from ..recipes.study.rows import read_rows
    from ..recipes.study.workers import run_study

    chosen = load_study(study, [name for name in only.split(",") if name])
    for kind in sorted({method.kind for method in chosen.methods}):
        check_installed(kind)
    out = out or Path("runs") / f"quality_{chosen.name}.jsonl"
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    console = Console(highlight=False, soft_wrap=True)
    rows = read_rows(out)
    console.print(f"{chosen.name}: {chosen.size()} runs of {len(chosen.methods)} methods, {len(rows)} rows in {out}")
    if dry_run:
        for run in chosen.next_runs(rows):
            console.print(f"{run.method.name}: rate {run.learning_rate:g} x {run.multiplier:g}, seed {run.seed}")
        timed = [row["seconds"] for row in rows if row["status"] == "finished"]
        if timed:
            missing, each = chosen.missing(rows), sum(timed) / len(timed)
            console.print(f"{missing} runs to go: {missing * each / workers / 3600:.1f} hours at {each:.0f} s a run")
        return
    bars = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*bars, console=console, transient=True) as progress:
        size = chosen.size()
        task = progress.add_task("runs", total=size, completed=size - chosen.missing(rows))
        for row in run_study(chosen, out, workers, threads, limit):
            found = row["status"] if row["loss"] is None else f"perplexity {row['perplexity']:.1f}"
            rate = f"rate {row['learning_rate']:g} x {row['multiplier']:g}, seed {row['seed']}"
            console.print(f"{row['method']}: {rate}: {found}, {row['seconds']:.0f} s")
            progress.advance(task)
    console.print(f"rows: {out}; tables: grass-hf bench report {out}")


def report(
    rows: list[Path] = typer.Argument(..., help="Files of `grass-hf bench quality`.", metavar="ROWS.jsonl"),
    out: Path = typer.Option(Path("docs/results"), help="Folder for the table and the plot.", file_okay=False),
    name: str = typer.Option("", help="Name of the two files; that of the first file of rows if not given."),
    title: str = typer.Option("", help="Heading."),
) -> None:
    """Write a Markdown table (and a plot, with matplotlib) of a study's rows.

    For example:

        grass-hf bench report runs/quality_peers.jsonl --out docs/results

    Every method stands there at the best point of its grid by the mean over seeds, with the spread, and with a word if
    that point lies at the grid's edge; then all points of all grids.
    """
    from ..recipes.study.report import write_report
    from ..recipes.study.rows import read_rows

    for path in rows:
        if not path.is_file():
            raise ValueError(f"{path} is not a file: give rows that grass-hf bench quality wrote.")
    found = [row for path in rows for row in read_rows(path)]
    command = " ".join(["grass-hf", *map(shlex.quote, sys.argv[1:])])
    for path in write_report(found, out, name or rows[0].stem, command, title):
        typer.echo(f"written: {path}")
