"""``grass-hf bench rollout``: run it, show its table, file it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..config.settings import GrassConfig
from ..measure.bench import record, rollout

_PACKAGED = "smollm2-135m-instruct"
CASES = {"grpo-1e-6": (1e-6, True), "grpo-1e-5": (1e-5, True), "finetune-1e-4": (1e-4, False)}


def run_rollout(
    *, model: str, case: list[str], steps: int, density: float, batch: int, sequence: int, json: Path | None
) -> None:
    """Print a table of both methods for every case, and append them to `json`."""
    if unknown := [name for name in case if name not in CASES]:
        raise ValueError(f"case={unknown[0]!r} is not known: choose of {', '.join(CASES)}.")
    if batch % rollout.GROUP:
        raise ValueError(f"batch={batch} is no multiple of {rollout.GROUP}, the sequences of a group: give one.")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        place = model
        if model == _PACKAGED:
            from ..recipes.packaged import unpack

            place = f"{folder}/model"
            unpack(model, Path(place))
        table = Table()
        for heading in ("case", "method", "elements", "payload", "largest", "seconds", "bytes a weight"):
            table.add_column(heading, justify="left" if heading in ("case", "method") else "right")
        for name in case:
            lr, grpo = CASES[name]
            rows = _rows(place, lr, grpo, steps, density, batch, sequence, console)
            for row in rows:
                shares = [f"{row[key]:.2%}" for key in ("elements", "payload", "largest_payload")]
                table.add_row(name, row["method"], *shares, f"{row['seconds']:.3f}", f"{row['memory_per_weight']:.3f}")
            ratio = {key: rows[1][key] / rows[0][key] for key in ("elements", "seconds", "memory_per_weight")}
            table.add_row(
                "", "ratio", f"{ratio['elements']:.2f}", "", "", *(f"{ratio[k]:.2f}" for k in list(ratio)[1:])
            )
            if json is not None:
                setting = {"lr": lr, "steps": steps, "density": density, "batch": batch, "sequence": sequence}
                record.append(json, {"bench": "rollout", "case": name, **setting, "rows": rows} | record.machine())
        console.print(table)


def _rows(
    place: str, lr: float, grpo: bool, steps: int, density: float, batch: int, sequence: int, console: Console
) -> list[dict]:
    from transformers import AutoModelForCausalLM

    def make() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).float()

    config: Any = make().config
    vocabulary = config.vocab_size

    def batches(step: int) -> torch.Tensor:
        return torch.randint(vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(step))

    found = rollout.compare(
        make,
        batches,
        lr=lr,
        grpo=grpo,
        steps=steps,
        config=GrassConfig(density=density, target_modules="all-matrices"),
        progress=lambda text: console.print(f"lr {lr:g}: {text}", highlight=False),
    )
    if not found[1].bounded:
        raise RuntimeError(
            f"lr={lr:g}: a synchronisation sent more than the columns in slices and the ordinary parameters hold: that "
            "is a mistake in grass-hf, please report it."
        )
    return [each.row() for each in found]
