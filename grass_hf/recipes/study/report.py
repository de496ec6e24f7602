"""From rows to tables and a plot: the best point of every method's grid, and the whole grids below.

A point's figure is the mean of its held-out losses over seeds, shown as perplexity. Where some points have more
seeds than others (finalists), the best is chosen among those with the most. A best point at the edge of what was
tried says that the grid was too small there; a run that diverged makes its point the worst.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rate_plot import draw_rates
from .rows import Row, deciding
from .task_scores import before, cells, figure, headings, measure_of, task_of

Point = tuple[float, float]


@dataclass(frozen=True)
class Entry:
    """One method with settings: its rows by (learning rate, multiplier), one per seed."""

    name: str
    points: dict[Point, list[Row]]

    def loss(self, point: Point) -> float:
        """Mean over the seeds; infinite where a run diverged."""
        losses = [row["loss"] for row in self.points[point]]
        return math.inf if None in losses else statistics.fmean(losses)

    @property
    def best(self) -> Point:
        most = max(len(rows) for rows in self.points.values())
        return min((point for point, rows in self.points.items() if len(rows) == most), key=self.loss)

    @property
    def rows(self) -> list[Row]:
        """Of the best point."""
        return self.points[self.best]

    def edges(self) -> str:
        """Where the best point lies on the edge of the grid, or nothing was tuned."""
        said = []
        for axis, name in enumerate(("rate", "multiplier")):
            values = sorted({point[axis] for point in self.points})
            if len(values) == 1:
                if name == "rate" or self.rows[0]["kind"] != "frozen":
                    said.append(f"one {name}")
            elif self.best[axis] in (values[0], values[-1]):
                said.append(f"{name} {'lowest' if self.best[axis] == values[0] else 'highest'}")
        return ", ".join(said) or "no"


def entries(rows: Iterable[Row]) -> list[Entry]:
    """Rows by method, the best method first.

    Raises:
        ValueError: the rows are not of one comparison.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows to report: run grass-hf bench quality first.")
    for what in ("document", "text", "evaluated_tokens", "target_warmup"):
        if len({json.dumps(row.get(what) or None, sort_keys=True) for row in rows}) > 1:
            raise ValueError(f"the rows differ in {what}, so they cannot be compared: give rows of one study.")
    found: dict[str, dict[Point, dict[int, Row]]] = {}
    names: dict[str, str] = {}
    for row in rows:
        # what one rate for everything means is a multiplier's matter, so in finetuning it makes another method
        own = [] if task_of(row) == "pretraining" else [row["method"], row.get("frozen")]
        what = json.dumps([row["kind"], deciding(row["kind"], row["settings"]), *own], sort_keys=True)
        names.setdefault(what, row["method"])
        points = found.setdefault(what, defaultdict(dict))
        points[row["learning_rate"], row["multiplier"]][row["seed"]] = row
    made = [
        Entry(names[what], {p: list(seeds.values()) for p, seeds in points.items()}) for what, points in found.items()
    ]
    return sorted(made, key=lambda entry: entry.loss(entry.best))


def write_report(rows: Sequence[Row], folder: Path, name: str, command: str, title: str = "") -> list[Path]:
    """Write NAME.md and, where matplotlib is installed, NAME.png; of a finetuning task NAME_rates.png too.

    Args:
        rows: of one comparison.
        folder: where to.
        name: of the files, without endings.
        command: that made the report, which states it.
        title: heading; the study's name if empty.

    Returns:
        The files.
    """
    found = entries(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.md"]
    drawn = _draw(found, folder / f"{name}.png")
    lines = [f"# {title or rows[0]['study']}", "", *_setting(rows, command), "", *best_table(found), ""]
    if drawn:
        files.append(folder / f"{name}.png")
        lines += [f"![loss against tokens, seconds and bytes]({name}.png)", ""]
    if task_of(rows[0]) != "pretraining" and draw_rates(found, folder / f"{name}_rates.png"):
        files.append(folder / f"{name}_rates.png")
        lines += [f"![loss against the learning rate]({name}_rates.png)", ""]
    for entry in found:
        lines += [f"## {entry.name}", "", *grid_table(entry), ""]
    files[0].write_text("\n".join(lines), encoding="utf-8")
    return files


def best_table(found: list[Entry]) -> list[str]:
    """Markdown lines: one per method, at its best point."""
    first = found[0].rows[0]
    heads = ["method", measure_of(first), "over seeds", *headings(first)]
    heads += ["seeds", "rate", "multiplier", "at the edge", "points", "trained", "peak MiB", "s a step", "tokens/s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for entry in found:
        rows, (rate, multiplier) = entry.rows, entry.best
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        spread = f"{figure(first, min(losses))} to {figure(first, max(losses))}" if len(losses) > 1 else "-"
        timed = [row for row in rows if row["workers"] == 1 and row["tokens_per_second"]]
        speed = statistics.fmean(row["tokens_per_second"] for row in timed) if timed else None
        shown = [
            entry.name,
            figure(first, entry.loss(entry.best)),
            spread,
            *cells(rows),
            str(len(rows)),
            f"{rate:g}",
            "-" if rows[0]["kind"] == "frozen" else f"{multiplier:g}",
            entry.edges(),
            str(len(entry.points)),
            f"{rows[0]['trainable'] / 1e6:.2f} M",
            f"{rows[0]['peak_bytes'] / 2**20:.1f}",
            f"{rows[0]['tokens_per_step'] / speed:.3f}" if speed else "-",
            f"{speed:.0f}" if speed else "-",
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def grid_table(entry: Entry) -> list[str]:
    """Markdown lines: perplexities of all points, learning rates down, multipliers across."""
    rates = sorted({rate for rate, _ in entry.points})
    multipliers = sorted({multiplier for _, multiplier in entry.points})
    lines = ["| rate \\ multiplier | " + " | ".join(f"{m:g}" for m in multipliers) + " |"]
    lines.append("|---" + "|---:" * len(multipliers) + "|")
    for rate in rates:
        shown = []
        for multiplier in multipliers:
            rows = entry.points.get((rate, multiplier))
            text = "" if rows is None else figure(rows[0], entry.loss((rate, multiplier)))
            shown.append(f"**{text}**" if (rate, multiplier) == entry.best else text)
        lines.append(f"| {rate:g} | " + " | ".join(shown) + " |")
    return lines


def _setting(rows: Sequence[Row], command: str) -> list[str]:
    first = rows[0]
    training = first["document"]["training"]
    names = ("study", "commit", "device", "versions", "workers")
    said = {name: sorted({json.dumps(row[name]) for row in rows}) for name in names}
    seeds = sorted({row["seed"] for row in rows})
    dates = sorted(row["date"] for row in rows)
    tokens, pretrained = max(row["tokens"] for row in rows), task_of(first) == "pretraining"
    held_out = "documents" if pretrained else f"rows of task {task_of(first)}"
    commits = ", ".join(json.loads(value) or "unknown" for value in said["commit"])
    studies = ", ".join(f"`{json.loads(value)}`" for value in said["study"])
    lines = [
        f"* `{command}`, rows of study {studies}",
        f"* model {json.dumps(first['document']['model'])}, text {json.dumps(first['document']['data'])}",
        f"* training {json.dumps(training)}: {tokens:,} tokens a run",
        f"* held-out {held_out}: {first['evaluated_tokens']:,} {'rows' if measure_of(first) == 'loss' else 'tokens'}, "
        + (f"perplexity {math.exp(first['loss_before']):.0f} untrained" if pretrained else f"{before(first)} before"),
        f"* {len(rows)} runs, seeds {', '.join(map(str, seeds))}, from {dates[0]} to {dates[-1]}",
        f"* commit {commits}; {', '.join(map(json.loads, said['device']))}",
    ]
    for versions in map(json.loads, said["versions"]):
        lines.append("* " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if rising := first.get("target_warmup"):
        lines.append(f"* the rate of the target matrices rises from zero in {rising} steps, for every method")
    if said["workers"] != ["1"]:
        lines.append("* some runs shared the machine with another one: seconds and tokens/s are of the others alone")
    return lines


def _draw(found: list[Entry], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # no times are shown of runs that shared the machine
    timed = any(entry.rows[0]["workers"] == 1 for entry in found)
    labels = ["tokens", *(["seconds of training"] if timed else []), "peak MiB"]
    figure, axes = pyplot.subplots(1, len(labels), figsize=(5 * len(labels), 4.6), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for number, entry in enumerate(entry for entry in found if entry.loss(entry.best) < math.inf):
        row, colour = entry.rows[0], colours(number % 20)
        steps, losses, seconds = zip(*row["validation"], strict=True)
        tokens = [step * row["tokens_per_step"] for step in steps]
        axes[0].plot(tokens, losses, color=colour, marker="o", markersize=3, label=entry.name)
        if row["workers"] == 1:
            axes[1].plot(seconds, losses, color=colour, marker="o", markersize=3)
        axes[-1].plot(row["peak_bytes"] / 2**20, entry.loss(entry.best), color=colour, marker="o")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel("held-out loss")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True
