"""What a run leaves behind: report.html, one file that holds everything, training.jsonl and loss.png beside it.

Results before and after, curves, memory beside full AdamW's, what was compressed and what was not, samples, the
resolved recipe and the versions.
"""

from __future__ import annotations

import html
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..config.sizes import shown_bytes
from ..convert.conversion import is_converted
from ..integrations.start_table import StartReport, start_report
from ..measure.bench.record import machine
from .curves import draw, save_loss
from .preview import as_yaml, resolved
from .schema import Recipe

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 66rem; margin: 2rem auto;
  padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d9e2ec }
.sub { color: #627d98; margin: .2rem 0 1.4rem }
.cards { display: flex; flex-wrap: wrap; gap: .8rem }
.card { border: 1px solid #d9e2ec; border-radius: 8px; padding: .6rem 1rem; min-width: 9.5rem }
.card b { display: block; font-size: 1.35rem; font-weight: 600 } .card span { color: #627d98; font-size: .85rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem 1.6rem }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
figcaption { color: #486581; font-size: .9rem }
table { border-collapse: collapse; width: 100%; margin-bottom: 1.2rem }
th { text-align: left; font-weight: 600; color: #486581 }
th, td { padding: .25rem .8rem .25rem 0; border-top: 1px solid #e4ebf1; vertical-align: top; overflow-wrap: anywhere }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { background: #f5f7fa; border-radius: 6px; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: 13px; line-height: 1.45 }
blockquote { margin: .6rem 0; border-left: 3px solid #9fb3c8; padding: .1rem 1rem } blockquote b { color: #486581 }
"""


@dataclass
class Run:
    """What a report says.

    Attributes:
        recipe: that was run.
        results: quantity -> value; None where there is none.
        history: `TrainerState.log_history`.
        samples: (prompt, continuation).
        command: that started the run.
        memory: what was measured, in bytes.
    """

    recipe: Recipe
    results: dict[str, Any]
    history: list[dict[str, Any]]
    samples: list[tuple[str, str]]
    command: str
    memory: dict[str, int] = field(default_factory=lambda: peak_memory())

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "title": self.recipe.title,
            "command": self.command,
            "results": self.results,
            "samples": [{"prompt": prompt, "text": text} for prompt, text in self.samples],
            "memory": self.memory,
            "recipe": resolved(self.recipe),
            "machine": machine(),
        }


def peak_memory() -> dict[str, int]:
    """The most memory that this process held, in bytes: of the machine, and of CUDA tensors."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["cuda tensors"] = torch.cuda.max_memory_allocated()
    return peaks


def report_run(run: Run, trainer: Trainer, folder: Path) -> list[Path]:
    """Write training.jsonl, and report.html and loss.png if the recipe wants them; the paths."""
    lines = folder / "training.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in run.history), encoding="utf-8")
    if not run.recipe.evaluation.report:
        return [lines]
    model = trainer.accelerator.unwrap_model(trainer.model)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    start = start_report(model, optimizer) if is_converted(model) and optimizer is not None else None
    page = folder / "report.html"
    page.write_text(render(run, start), encoding="utf-8")
    picture = folder / "loss.png"
    return [lines, page, picture] if save_loss(run.history, picture) else [lines, page]


def render(run: Run, start: StartReport | None) -> str:
    """The page."""
    recipe, text = run.recipe, html.escape
    settings = recipe.training
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    body = [
        f"<h1>{text(recipe.title)}</h1>",
        f'<p class="sub">{text(recipe.task)} of {text(recipe.model.name)} on {text(", ".join(recipe.data.dataset))}: '
        f"{text(recipe.method)}, {text(recipe.base)}, {run.results['steps']:,} steps of {batch} "
        "examples</p>",
        _cards(run.results),
    ]
    curves = draw(run.history)
    if curves:
        figures = "".join(f"<figure><figcaption>{text(caption)}</figcaption>{svg}</figure>" for caption, svg in curves)
        body += ["<h2>Curves</h2>", f'<div class="curves">{figures}</div>']
    if run.samples:
        body += ["<h2>Samples</h2>"]
        body += [f"<blockquote><b>{text(prompt)}</b> {text(said)}</blockquote>" for prompt, said in run.samples]
    body += ["<h2>Memory</h2>", _memory(run.memory, start)]
    if start is not None:
        body += ["<h2>What was trained a slice at a time, and what in full</h2>", _targets(start)]
    found = machine()
    versions = {**found.pop("versions"), **{key: value for key, value in found.items()}}
    body += [
        "<h2>Recipe</h2>",
        f"<pre>{text(run.command)}</pre>",
        f"<pre>{text(as_yaml(resolved(recipe)))}</pre>",
        "<h2>Versions</h2>",
        _table(("", ""), [(key, str(value)) for key, value in versions.items()]),
    ]
    head = f'<meta charset="utf-8"><title>{text(recipe.title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _cards(results: dict[str, Any]) -> str:
    """A card per quantity; where there are two, before and after, both on one card."""
    cards = []
    for name, value in results.items():
        if value is None or name.endswith(" before"):
            continue
        if name.endswith(" after"):
            quantity = name.removesuffix(" after")
            earlier = results.get(f"{quantity} before")
            said = (f"{cell(earlier)} → " if earlier is not None else "") + cell(value)
            cards.append((quantity.replace("_", " "), said))
        else:
            cards.append((name, cell(Path(value).name if name == "best checkpoint" else value)))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{html.escape(said)}</b><span>{html.escape(name)}</span></div>'
            for name, said in cards
        )
        + "</div>"
    )


def _memory(measured: dict[str, int], start: StartReport | None) -> str:
    rows = [(f"most memory held: {name}", shown_bytes(count), "") for name, count in measured.items()]
    if start is not None:
        for part, label in (("slices", "slices"), ("gradients", "gradients"), ("optimizer_state", "optimizer state")):
            rows.append((label, shown_bytes(getattr(start.grass, part)), shown_bytes(getattr(start.adamw, part))))
    return _table(("", "this run", "full AdamW" if start is not None else ""), rows, numbers=(1, 2))


def _targets(start: StartReport) -> str:
    compressed = [
        (str(count), name, " x ".join(map(str, shape)), side, str(rank), f"{density:.1%}")
        for count, name, shape, side, rank, density in start.targets
    ]
    ordinary = [(str(count), name, f"{elements:,}", why) for count, name, elements, why in start.ordinary]
    return _table(("weights", "modules", "shape", "side", "r", "density"), compressed, numbers=(0, 2, 4, 5)) + (
        _table(("in full", "names", "elements", "why"), ordinary, numbers=(0, 2)) if ordinary else ""
    )


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: tuple[int, ...] = ()) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        kinds = (' class="n"' if place in numbers else "" for place in range(len(cells)))
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{html.escape(said)}</{tag}>" for kind, said in zip(kinds, cells, strict=True))
            + "</tr>"
        )

    head = line("th", headings) if any(headings) else ""
    return f"<table>{head}{''.join(line('td', row) for row in rows)}</table>"


def cell(value: Any) -> str:
    """A number in a form to read, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
