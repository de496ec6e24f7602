"""The table that a run starts with, as rich tables and lines; what stands in it comes from `start_table`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..config.sizes import shown_bytes

if TYPE_CHECKING:
    from .start_table import StartReport


def render(report: StartReport) -> Group:
    """The report as rich tables and lines, to print; at 80 columns every name can be read."""
    compressed = _table("Grass trains a slice of", weights="right", modules="left", shape="right", side="left")
    for heading in ("r", "density"):
        compressed.add_column(heading, justify="right", no_wrap=True)
    for count, name, shape, side, rank, density in report.targets:
        sizes = " x ".join(map(str, shape))
        compressed.add_row(str(count), _broken(name, 36), sizes, side, str(rank), f"{density:.1%}")
    ordinary = _table("and in full", parameters="right", names="left", elements="right")
    ordinary.add_column("why", overflow="fold")
    for count, name, elements, reason in report.ordinary:
        ordinary.add_row(str(count), _broken(name, 30), f"{elements:,}", reason)
    memory = _table("Memory, weights and activations aside", **{"": "left", "Grass": "right", "full AdamW": "right"})
    for field, label in (
        ("slices", "slices"),
        ("gradients", "gradients"),
        ("optimizer_state", "optimizer state"),
    ):
        memory.add_row(label, shown_bytes(getattr(report.grass, field)), shown_bytes(getattr(report.adamw, field)))
    said = "\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in _lines(report))
    return Group(compressed, ordinary, memory, Text(said))


def _table(title: str, **columns: Any) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _broken(name: str, width: int) -> str:
    """A module's name on lines of at most `width` characters, each but the last ending with a dot."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _lines(report: StartReport) -> Iterator[str]:
    config, elements = report.config, report.elements
    yield (
        f"{report.optimizer} steps over the slices; others are selected every K = {config.update_interval} steps by "
        f"{config.selection}, state {config.state_policy}"
    )
    scaled = "" if config.scale == 1 else f" (scale {config.scale:g})"
    others = f", others {_numbers(report.other_rates)}" if report.other_rates else ""
    yield f"learning rate: slices {_numbers(report.slice_rates)}{scaled}{others}"
    yield (
        f"trained now: {report.trained_now:,} of {elements:,} parameters ({report.trained_now / elements:.1%}); "
        f"in all: {report.trained_in_all:,} ({report.trained_in_all / elements:.1%})"
    )
    found = report.coverage
    if found is None:
        return
    reached = f"at most {found.most:.0%}" if found.expected is None else f"about {found.expected:.0%}"
    if found.turn <= found.steps:
        yield f"after {found.steps:,} steps {reached} of the compressed weights are trained"
    else:
        yield (
            f"K x 1/density = {found.turn:,} steps would reach every row, and {found.steps:,} are planned: {reached} "
            "of the compressed weights will ever be trained; a smaller update_interval or a larger density reaches more"
        )


def _numbers(values: list[float]) -> str:
    return " and ".join(f"{value:g}" for value in values)
