"""The curves of a run, drawn by matplotlib: as SVG text that stands inside a page, and the loss as a PNG file."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

TRAIN, EVAL, OTHER = "#2f6f9f", "#c2410c", "#4d7c0f"
# caption -> quantity in `TrainerState.log_history`: (label, colour)
CURVES = {
    "loss": {"loss": ("training", TRAIN), "eval_loss": ("held out", EVAL)},
    "accuracy on held-out rows": {"eval_accuracy": ("held out", EVAL)},
    "F1 on held-out rows": {"eval_f1": ("held out", EVAL)},
    "share of held-out tokens predicted": {
        "eval_token_accuracy": ("held out", EVAL),
        "eval_mean_token_accuracy": ("held out", EVAL),
    },
    "share of held-out pairs with the chosen answer preferred": {"eval_rewards/accuracies": ("held out", EVAL)},
    "Grass: rows trained so far, and share of the squared gradient norm in the rows chosen last": {
        "grass/coverage": ("coverage", OTHER),
        "grass/energy": ("energy", EVAL),
    },
    "gradient norm": {"grad_norm": ("", TRAIN)},
    "learning rate": {"learning_rate": ("", TRAIN)},
}
STYLE: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "grass-hf"}


def draw(history: list[dict[str, Any]], picture: Path) -> list[tuple[str, str]]:
    """(caption, SVG) of every curve that `TrainerState.log_history` has finite points for; none without matplotlib.

    The curve of the loss also goes into a PNG file.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    drawn = []
    for caption, quantities in CURVES.items():
        figure, axes = pyplot.subplots(figsize=(5.6, 2.9), layout="constrained")
        for name, (label, colour) in quantities.items():
            points = [(entry["step"], entry[name]) for entry in history if _is_finite(entry.get(name))]
            if points:
                marker = "o" if len(points) < 20 else None
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, label=label)
        if axes.lines:
            axes.set(xlabel="optimizer step", ylim=(-0.02, 1.02) if caption.startswith("Grass") else None)
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))  # learning rates: 2 x 1e-4 and not 0.00020
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if len(axes.lines) > 1:
                axes.legend(frameon=False)
            if caption == "loss":
                figure.savefig(picture, dpi=150)
            drawn.append((caption, _svg(figure)))
        pyplot.close(figure)
    return drawn


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _svg(figure: Any) -> str:
    """A figure as an element of a page, without the prologue of a file."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]
