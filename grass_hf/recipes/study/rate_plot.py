"""Held-out loss against the learning rate, a line for every method: how much a wrong first guess costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Entry


def draw_rates(found: Sequence[Entry], path: Path) -> bool:
    """Draw a study's whole grids; a method with several multipliers has a line for each.

    Args:
        found: of `report.entries`.
        path: of the image.

    Returns:
        Whether it was drawn: matplotlib is installed, and some method has two rates.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    lines = [line for entry in found for line in rate_lines(entry)]
    if not any(len(rates) > 1 for _, rates, _ in lines):
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for number, (name, rates, losses) in enumerate(lines):
        style = "--" if "multiplier" in name else "-"
        axes.plot(rates, losses, style, color=colours(number % 20), marker="o", markersize=3, label=name)
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


def rate_lines(entry: Entry) -> list[tuple[str, list[float], list[float]]]:
    """(name, rates, mean losses) for every multiplier of a method; points that diverged are left out."""
    multipliers = sorted({multiplier for _, multiplier in entry.points})
    lines = []
    for own in multipliers:
        rates = sorted(rate for rate, multiplier in entry.points if multiplier == own)
        rates = [rate for rate in rates if entry.loss((rate, own)) < math.inf]
        name = entry.name if len(multipliers) == 1 else f"{entry.name}, multiplier {own:g}"
        lines.append((name, rates, [entry.loss((rate, own)) for rate in rates]))
    return lines
