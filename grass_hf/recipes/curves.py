"""The curves of a run, drawn by matplotlib: as SVG text that stands inside a page, and the loss as a PNG file."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Series = tuple[list[int], list[float]]
Line = tuple[Series, str, str]

TRAIN, EVAL, OTHER = "#2f6f9f", "#c2410c", "#4d7c0f"


def series(history: list[dict[str, Any]], key: str) -> Series:
    """Steps and values of a quantity in `TrainerState.log_history`, finite ones only."""
    points = [(entry["step"], entry[key]) for entry in history if isinstance(entry.get(key), (int, float))]
    points = [(step, value) for step, value in points if abs(value) < float("inf") and value == value]
    return [step for step, _ in points], [value for _, value in points]


def draw(history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, SVG) of every curve that `TrainerState.log_history` has points for; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")  # no display is needed

    wanted: list[tuple[str, list[Line]]] = [("loss", _losses(history))]
    for key, caption in (
        ("eval_accuracy", "accuracy on held-out rows"),
        ("eval_f1", "F1 on held-out rows"),
        ("eval_token_accuracy", "share of held-out tokens predicted"),
        ("eval_mean_token_accuracy", "share of held-out tokens predicted"),
        ("eval_rewards/accuracies", "share of held-out pairs with the chosen answer preferred"),
    ):
        wanted.append((caption, [(series(history, key), "held out", EVAL)]))
    wanted += [
        (
            "Grass: rows trained so far, and share of the squared gradient norm in the rows chosen last",
            [
                (series(history, "grass/coverage"), "coverage", OTHER),
                (series(history, "grass/energy"), "energy", EVAL),
            ],
        ),
        ("gradient norm", [(series(history, "grad_norm"), "", TRAIN)]),
        ("learning rate", [(series(history, "learning_rate"), "", TRAIN)]),
    ]
    drawn = []
    for caption, lines in wanted:
        lines = [line for line in lines if line[0][0]]
        if lines:
            drawn.append((caption, _figure(lines, bounded=caption.startswith("Grass"))))
    return drawn


def save_loss(history: list[dict[str, Any]], path: str | os.PathLike) -> bool:
    """Draw the loss curve into a PNG file; False without matplotlib or without points."""
    lines = [line for line in _losses(history) if line[0][0]]
    try:
        import matplotlib
    except ImportError:
        return False
    if lines:
        matplotlib.use("Agg")
        with _plotted(lines) as figure:
            figure.savefig(path, dpi=150)
    return bool(lines)


def _losses(history: list[dict[str, Any]]) -> list[Line]:
    return [(series(history, "loss"), "training", TRAIN), (series(history, "eval_loss"), "held out", EVAL)]


def _figure(lines: list[Line], bounded: bool) -> str:
    with _plotted(lines, bounded) as figure:
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _inline(out.getvalue())


@contextmanager
def _plotted(lines: list[Line], bounded: bool = False) -> Iterator[Any]:
    from matplotlib import pyplot

    style: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "grass-hf"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(5.6, 2.9), layout="constrained")
        for (steps, values), label, colour in lines:
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label or None)
        if bounded:
            axes.set_ylim(-0.02, 1.02)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))  # learning rates: 2 x 1e-4 and not 0.00020
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
        yield figure
        pyplot.close(figure)


def _inline(svg: str) -> str:
    """An SVG document as an element of a page: no prologue, a size that the page decides."""
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return head + ">" + re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
