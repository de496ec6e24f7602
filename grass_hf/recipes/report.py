"""What a run leaves behind: report.html, one file that holds everything, training.jsonl and loss.png beside it.

Results before and after, curves, memory beside full AdamW's, what was compressed and what was not, samples, the
resolved recipe and the versions.
"""

from __future__ import annotations

import html
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..config.sizes import shown_bytes
from ..convert.conversion import is_converted
from ..integrations.start_table import start_report
from ..measure.bench.record import machine
from .curves import draw
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
pre { background: #f5f7fa; border-radius: 6px; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: 13px; line-height: 1.45 }
blockquote { margin: .6rem 0; border-left: 3px solid #9fb3c8; padding: .1rem 1rem } blockquote b { color: #486581 }
"""


def peak_memory() -> dict[str, int]:
    """The most memory that this process held, in bytes: of the machine, and of CUDA tensors."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["cuda tensors"] = torch.cuda.max_memory_allocated()
    return peaks


def as_json(recipe: Recipe, results: dict[str, Any], samples: list[tuple[str, str]]) -> dict[str, Any]:
    """What a report says, as plain JSON types.

    Args:
        recipe: that was run.
        results: quantity -> value; None where there is none.
        samples: (prompt, continuation).
    """
    return {
        "title": recipe.title,
        "command": " ".join(sys.argv),
        "results": results,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
        "memory": peak_memory(),
        "recipe": resolved(recipe),
        "machine": machine(),
    }


def report_run(run: dict[str, Any], recipe: Recipe, trainer: Trainer, folder: Path) -> list[Path]:
    """Write training.jsonl, and report.html and loss.png if the recipe wants them; the paths."""
    lines, page, picture = (folder / name for name in ("training.jsonl", "report.html", "loss.png"))
    history = trainer.state.log_history
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    if not recipe.evaluation.report:
        return [lines]
    model = trainer.accelerator.unwrap_model(trainer.model)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    start = str(start_report(model, optimizer)) if is_converted(model) and optimizer is not None else ""
    curves = draw(history, picture)
    page.write_text(render(run, recipe, start, curves), encoding="utf-8")
    return [lines, page, picture] if curves and curves[0][0] == "loss" else [lines, page]


def render(run: dict[str, Any], recipe: Recipe, start: str, curves: list[tuple[str, str]]) -> str:
    """The page.

    Args:
        run: of `as_json`.
        recipe: that was run.
        start: the table that the run began with; empty without Grass.
        curves: (caption, SVG).
    """
    text, settings = html.escape, recipe.training
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    body = [
        f"<h1>{text(recipe.title)}</h1>",
        f'<p class="sub">{text(recipe.task)} of {text(recipe.model.name)} on {text(", ".join(recipe.data.dataset))}: '
        f"{text(recipe.method)}, {text(recipe.base)}, {run['results']['steps']:,} steps of {batch} examples</p>",
        _cards(run["results"]),
    ]
    if curves:
        figures = "".join(f"<figure><figcaption>{text(caption)}</figcaption>{svg}</figure>" for caption, svg in curves)
        body += ["<h2>Curves</h2>", f'<div class="curves">{figures}</div>']
    if run["samples"]:
        body += ["<h2>Samples</h2>"]
        body += [f"<blockquote><b>{text(s['prompt'])}</b> {text(s['text'])}</blockquote>" for s in run["samples"]]
    held = (f"most memory held, {name}: {shown_bytes(count)}" for name, count in run["memory"].items())
    blocks = {
        "Memory": "\n".join(held),
        "What was trained a slice at a time, and what in full": start,
        "Recipe": f"{run['command']}\n\n{as_yaml(run['recipe'])}",
        "Versions": as_yaml(run["machine"]),
    }
    body += [f"<h2>{title}</h2><pre>{text(said)}</pre>" for title, said in blocks.items() if said]
    head = f'<meta charset="utf-8"><title>{text(recipe.title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _cards(results: dict[str, Any]) -> str:
    """A card per quantity; where there are two, before and after, both on one card."""
    cards = []
    for name, value in results.items():
        if value is None or name.endswith(" before"):
            continue
        quantity = name.removesuffix(" after")
        earlier = results.get(f"{quantity} before")
        said = (f"{cell(earlier)} → " if earlier is not None else "") + cell(value)
        title = html.escape(quantity.replace("_", " "))
        cards.append(f'<div class="card"><b>{html.escape(said)}</b><span>{title}</span></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def cell(value: Any) -> str:
    """A number in a form to read, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else Path(value).name  # a checkpoint's folder
