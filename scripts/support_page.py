"""docs/support.md: the rows that `scripts/support_table.py` found, as a page."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from matrix_checks import ENOUGH

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "support.md", ROOT / "README.md"
HEAD = """# Supported models

Written by `make support-table`, which builds every class below tiny, with random weights, from its own configuration
class, compresses all of its matrices (`target_modules="all-matrices"`) and compares it with the plain model:

* **gradients**: at density 1 the gradient of every slice and of every ordinary parameter is the plain weight's, with
  `all-matrices` and with `all-linear`; the norms that are observed are those of its rows;
* **AdamW**: at density 1 two steps end at the plain run's weights;
* **movement**: at density 1/4 a step moves the selected rows to where the plain step moves them, and nothing else by a
  single bit;
* **files**: the checkpoint has the plain one's keys, shapes and dtypes, and loads to the trained weights.

All of it in float64, where the model knows it, else in float32. **{ok} classes of {types} model types are right**,
among them {causal} of {causal_all} causal language models of transformers {transformers} (torch {torch}); {wrong}.
`make test` tries a sample of them, `make test-slow` all. What could not be tried is listed at the end, with the
reason.

*Covered* is the share of the trained parameters in matrices (of two dimensions or more, convolutions too) that is
compressed. A tiny model has small matrices and convolutions as they are, so it is lower here than in a real one: below
{enough:.0%} the share at the configuration class's own default sizes stands beside it, and the largest of what is left
out are named. A run's start table names all of them, with the reason.
"""
TABLE = """
## {kind}

| model type | class | compressed | covered | right | left out |
|---|---|---|---|---|---|
"""
TAIL = """
## Not compressed, and why

* **Parameters that no product of a known kind uses**: routers' scores, convolutions, embeddings of positions, XLNet's
  attention. They train in full.
* **Weights that the model reads without calling their module** (Mamba's `dt_proj`, WavLM's attention) get no gradient
  through a tap: they train in full, or training stops with a sentence that says which.
* **Weights without a gradient** on the inputs of the test, as the indexers of sparse attention, which transformers does
  not train either: they are left alone.
* **Subclasses that compute something else** than the product with their weight, and embeddings with `max_norm`,
  `scale_grad_by_freq` or `sparse`: trained in full, named in the start table.
* **Experts under transformers 4.57** that are 3-D parameters (gpt-oss) have no experts interface there; mixtures made
  of `nn.Linear` (Mixtral, Qwen3-MoE) are compressed expert by expert.
* **Quantised weights** stay as they are.
"""


def write(rows: list[dict]) -> None:
    """Write the page, and the count in the README."""
    PAGE.write_text(page(rows), encoding="utf-8")
    right = [row for row in rows if row["status"] == "ok"]
    line = f"{len(right)} classes of {len({row['model_type'] for row in right})} model types tried"
    README.write_text(re.sub(r"\d+ (classes of \d+ )?model types tried", line, README.read_text()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {line}")


def page(rows: list[dict]) -> str:
    """The whole text."""
    right = [row for row in rows if row["status"] == "ok"]
    wrong = [row for row in rows if row["status"] == "wrong"]
    causal = [row for row in rows if row["kind"] == "causal LM"]
    text = HEAD.format(
        ok=len(right),
        types=len({row["model_type"] for row in right}),
        causal=sum(row["status"] == "ok" for row in causal),
        causal_all=len(causal),
        wrong=f"{len(wrong)} are wrong, in bold print" if wrong else "none is wrong",
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        enough=ENOUGH,
    )
    for kind in dict.fromkeys(row["kind"] for row in rows):
        tried = [row_text(row) for row in rows if row["kind"] == kind and row["status"] != "not built"]
        if tried:
            text += TABLE.format(kind=kind[0].upper() + kind[1:]) + "\n".join(sorted(tried)) + "\n"
    text += TAIL + "\n## Not tried\n\n"
    for row in rows:
        if row["status"] == "not built":
            text += f"* {row['model_type']}, {row['cls']} ({row['kind']}): {_escaped(row['why'])}\n"
    return text


def row_text(row: dict) -> str:
    """One line of a table."""
    targets = ", ".join(f"{count} {kind}" for kind, count in sorted(row["targets"].items()))
    result = "yes" if row["status"] == "ok" else "**no**: " + _escaped("; ".join(row["wrong"])[:200])
    notes = [] if row["dtype"] == "float64" else [row["dtype"]]
    notes += [row["inputs"].partition(", ")[2]] if "without" in row["inputs"] or "alone" in row["inputs"] else []
    result += f" ({', '.join(notes)})" if notes else ""
    cells = [row["model_type"], row["cls"], targets, _coverage(row), result, _left_out(row) or "–"]
    return f"| {' | '.join(cells)} |"


def _coverage(row: dict) -> str:
    full = row.get("full_size")
    return f"{row['coverage']:.1%}" + (f" (full size {full:.1%})" if full is not None else "")


def _left_out(row: dict) -> str:
    if row["coverage"] >= ENOUGH:
        return ""
    parts = []
    for key, share in list(row["left_out"].items())[:4]:
        if share >= 0.01:
            name, _, reason = key.partition(": ")
            parts.append(f"`{name.rpartition('*.')[2].removesuffix('.weight')}` {share:.0%}: {_shorter(reason)}")
    return _escaped("; ".join(parts))


def _shorter(reason: str) -> str:
    reason = re.sub(r"a parameter of (\w+), which is no linear layer.*", r"\1", reason)
    reason = re.sub(r"(\w+) is no linear layer.*", r"\1", reason)
    return reason.replace(": trained in full", "")


def _escaped(text: str) -> str:
    # brackets are links to Markdown
    for sign, written in {"|": "\\|", "<": "&lt;", "[": "\\[", "]": "\\]", "\n": " "}.items():
        text = text.replace(sign, written)
    return text
