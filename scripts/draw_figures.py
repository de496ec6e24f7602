"""The figures of the README and the docs: quality beside memory, the method, and a start table.

    draw_figures.py              # memory_quality.png, how_it_works.png and start_table.svg in docs/
    draw_figures.py --out DIR    # the same into another folder

`make figures` runs it. The first one has the best point of every method over two seeds, from rows in docs/results,
beside the peak of its step. The last one is of the model of `make demo`, with the defaults of the package.
"""

import argparse
import io
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.integrations.start_table import render, start_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
FILES = ("quality_peers", "quality_peers_high", "ideas")
GRASS, PEER = "#2e7d32", "#8d8d8d"
# The runs that are compared: one model, one length, no rise of the rate.
MODEL, STEPS = "llama_15m.json", 600
# What a row must say to be of a method: its kind, and of Grass its base optimizer, density, and attention's density.
METHODS = {
    "Grass, preset=muon": ("grass", "muon", 0.25, 1.0),
    "Grass, preset=muon_quarter": ("grass", "muon", 0.125, 0.5),
    "Grass, the defaults": ("grass", "adamw_torch_fused", 0.25, None),
    "LoRA": ("lora", None, None, None),
    "AdamW": ("adamw", None, None, None),
    "GaLore": ("galore", None, None, None),
    "APOLLO": ("apollo", None, None, None),
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the images")
    return parser.parse_args()


def is_of(row: dict, kind: str, base: str | None, density: float | None, attention: float | None) -> bool:
    """Whether a row is a run of a method, with the package's settings for what the method leaves open."""
    settings = row["settings"]
    if row["kind"] != kind:
        return False
    if kind == "lora":
        return settings.get("rank") == 48 and row["method"] == "lora"
    if kind != "grass":
        return True
    pattern = list((settings.get("density_pattern") or {}).values())
    if (row["optim"], settings["density"], pattern) != (base, density, [] if attention is None else [attention]):
        return False
    # of the defaults: the interval and the turns of the package, and its rule
    return base == "muon" or (settings["update_interval"], settings["stagger"], settings["side"]) == (200, 4, "input")


def best_points() -> dict[str, tuple[float, float]]:
    """Per method the lowest mean perplexity of two seeds, and the peak of a training step in MiB."""
    rows = [json.loads(line) for name in FILES for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    found: dict[str, tuple[float, float]] = {}
    for label, said in METHODS.items():
        points: dict[tuple, dict[int, dict]] = defaultdict(dict)
        for row in rows:
            document = row["document"]
            same = Path(document["model"]["config_name"]).name == MODEL and not row.get("target_warmup")
            if same and document["training"]["max_steps"] == STEPS and is_of(row, *said):
                points[row["learning_rate"], row["multiplier"]][row["seed"]] = row
        means = [
            (sum(row["perplexity"] for row in seeds.values()) / len(seeds), row["peak_bytes"] / 2**20)
            for seeds in points.values()
            if len(seeds) == 2 and all(row["status"] == "finished" for row in seeds.values())
            for row in [next(iter(seeds.values()))]
        ]
        found[label] = min(means)
    return found


def draw_memory_and_quality(path: Path) -> None:
    """Dots for perplexity, whose axis does not begin at zero; bars for memory, whose axis does."""
    points = best_points()
    labels = sorted(points, key=lambda label: points[label][0], reverse=True)
    colours = [GRASS if label.startswith("Grass") else PEER for label in labels]
    figure, (quality, memory) = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained")
    for place, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        perplexity, peak = points[label]
        quality.plot(perplexity, place, "o", color=colour, markersize=9)
        quality.annotate(f"{perplexity:.1f}", (perplexity, place), (9, -4), textcoords="offset points", fontsize=9)
        memory.barh(place, peak, color=colour, height=0.6)
        memory.annotate(f"{peak:.0f}", (peak, place), (4, -4), textcoords="offset points", fontsize=9)
    quality.set_yticks(range(len(labels)), labels)
    quality.set_title("held-out perplexity: further left is better", fontsize=10)
    quality.set_xlim(79, 98)
    quality.grid(axis="x", alpha=0.3)
    memory.set_title("peak of a training step, MiB: shorter is better", fontsize=10)
    memory.set_xlim(0, 225)
    for axes in (quality, memory):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def matrix(axes: Axes, left: float, title: str, rows: int, columns: int, chosen: tuple[int, ...], under: str) -> None:
    """A grid of cells with some columns coloured."""
    for column in range(columns):
        colour = GRASS if column in chosen else "#e6e6e6"
        for row in range(rows):
            axes.add_patch(Rectangle((left + column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(left + columns / 2, rows + 0.5, title, ha="center", fontsize=10)
    axes.text(left + columns / 2, -0.4, under, ha="center", va="top", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color="#444444"))
    axes.text((start[0] + end[0]) / 2, start[1] + 0.25, text, ha="center", va="bottom", fontsize=9)


def draw_how_it_works(path: Path) -> None:
    """A weight, the slice beside it, its gradient and state, and the same weight in the next interval."""
    figure, axes = plt.subplots(figsize=(10.5, 3.1), layout="constrained")
    now, then = (1, 4), (2, 6)
    matrix(axes, 0, "weight", 6, 8, now, "the whole matrix, frozen.\n2 of 8 columns are chosen")
    arrow(axes, (8.4, 3), (11.2, 3), "copied\nonce")
    matrix(axes, 11.6, "slice", 6, 2, (0, 1), "the trained\nparameter")
    arrow(axes, (14, 3), (17.2, 3), "backward,\noptimizer")
    matrix(axes, 17.6, "gradient", 6, 2, (0, 1), "as large as\nthe slice")
    matrix(axes, 20.6, "state", 6, 2, (0, 1), "once or\ntwice that")
    arrow(axes, (23, 3), (26.2, 3), "written back\nafter every step")
    matrix(axes, 26.6, "weight, K steps later", 6, 8, then, "other columns are chosen.\nThe slice now holds these")
    axes.set_xlim(-0.5, 35.2)
    axes.set_ylim(-2.1, 7.2)
    axes.set_aspect("equal")
    axes.axis("off")
    save(figure, path)


def draw_start_table(path: Path) -> None:
    """The table at the start of a run, as a terminal shows it."""
    config = AutoConfig.from_pretrained(ROOT / "configs" / "llama_9m.json", vocab_size=4096)
    model = AutoModelForCausalLM.from_config(config)
    convert_to_grass(model, GrassConfig(density=0.25, update_interval=100))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=5e-3)
    console = Console(record=True, width=92, file=io.StringIO())
    console.print(render(start_report(model, optimizer, steps=500)))
    drawing = console.export_svg(title="grass_hf.summary(model, optimizer, steps=500)", unique_id="start")
    # a reader's own fonts: the page loads nothing from elsewhere
    drawing = re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.S).replace("Fira Code, monospace", "monospace")
    path.write_text("\n".join(line.rstrip() for line in drawing.splitlines()) + "\n", encoding="utf-8")
    print(path)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # without the version of matplotlib in it, the same data make the same file
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    print(path)


def main() -> None:
    out = parsed().out
    draw_memory_and_quality(out / "memory_quality.png")
    draw_how_it_works(out / "how_it_works.png")
    draw_start_table(out / "start_table.svg")


if __name__ == "__main__":
    main()
