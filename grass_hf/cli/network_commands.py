"""The commands ``grass-hf bench comm`` and ``grass-hf bench net``: their options and help."""

from __future__ import annotations

from pathlib import Path

import typer

JSON = typer.Option(None, help="Also append the result to this file, as one line of JSON.", dir_okay=False)
TARGETS = "all-linear, all-matrices, a regular expression, or suffixes separated by commas."


def comm(
    model: str = typer.Argument("llama_9m", help="A folder, a config JSON, a shipped config's name, or a hub id."),
    ranks: int = typer.Option(2, help="Processes that train together, on this machine."),
    engine: list[str] = typer.Option(["ddp", "fsdp2"], help="ddp or fsdp2; give it twice for both."),
    rank: int | None = typer.Option(None, help="Rows r of every target matrix that are trained at a time."),
    density: float | None = typer.Option(None, help="The same as a share of the rows; 0.25 if neither is given."),
    side: str = typer.Option("output", help="Side that is selected: output (rows), input (columns) or auto."),
    targets: str = typer.Option("all-linear", help=TARGETS),
    interval: int = typer.Option(200, help="Steps K between two selections."),
    dtype: str = typer.Option("float32", help="Dtype of the weights."),
    slice_dtype: str | None = typer.Option(None, help="Dtype of the slices under DDP."),
    batch: int = typer.Option(1, help="Sequences per step and process.", min=1),
    sequence: int = typer.Option(32, help="Tokens per sequence.", min=2),
    json: Path | None = JSON,
) -> None:
    """Bytes that an optimizer step sends, AdamW and Grass: counted in running processes, beside the expectation.

    For example:

        grass-hf bench comm llama_60m --rank 128

    Every message of DDP, FSDP2 and Grass itself is seen, on steps that select rows and on others. The
    expectation is r/m of every target, the ordinary parameters, and a norm per row every K steps.
    """
    from .comm import run_comm

    run_comm(
        model,
        grass={
            "rank": rank,
            "density": density,
            "side": side,
            "target_modules": names(targets),
            "update_interval": interval,
            "slice_dtype": slice_dtype,
        },
        engines=engine,
        ranks=ranks,
        dtype=dtype,
        json=json,
        batch=batch,
        sequence=sequence,
    )


def net(
    speeds: str = typer.Option(
        "50Mbit/s,200Mbit/s,800Mbit/s,3200Mbit/s,12800Mbit/s", help="Of the links, with commas."
    ),
    workers: int = typer.Option(8, help="Processes, each in a network namespace of its own."),
    engine: str = typer.Option("ddp", help="ddp or fsdp2."),
    rank: int | None = typer.Option(None, help="Rows r of every target matrix that are trained at a time."),
    density: float | None = typer.Option(None, help="The same as a share of the rows; 0.25 if neither is given."),
    side: str = typer.Option("output", help="Side that is selected: output (rows), input (columns) or auto."),
    targets: list[str] = typer.Option(["all-linear", "all-matrices"], help="Grass runs once with each."),
    model: str = typer.Option("", help="A model as bench comm takes it, instead of the LLaMA of the next three."),
    layers: int = typer.Option(8, help="Layers of the LLaMA.", min=1),
    hidden: int = typer.Option(256, help="Its width.", min=64),
    vocabulary: int = typer.Option(2048, help="Its vocabulary.", min=64),
    dtype: str = typer.Option("float32", help="Dtype of the weights."),
    batch: int = typer.Option(1, help="Sequences per step and worker.", min=1),
    sequence: int = typer.Option(128, help="Tokens per sequence.", min=2),
    rounds: int = typer.Option(5, help="Counted steps of every method at every speed.", min=1),
    json: Path | None = JSON,
    png: Path | None = typer.Option(None, help="Draw the speed-ups into this file.", dir_okay=False),
) -> None:
    """Training over rate-limited links: AdamW and Grass in turn, at several speeds (Linux, root, iproute2).

    The workers are processes in network namespaces, joined by a bridge and limited by token buckets; nothing
    is changed in the machine's own network, and nothing is left behind. They share this machine's cores, so
    what counts is the ratio of link time to compute.
    """
    from .net import run_net

    run_net(
        model,
        grass={"rank": rank, "density": density, "side": side},
        targets={words: names(words) for words in targets},
        speeds=speeds,
        engine=engine,
        dtype=dtype,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        json=json,
        png=png,
        workers=workers,
        batch=batch,
        sequence=sequence,
        rounds=rounds,
    )


def names(targets: str) -> str | tuple[str, ...]:
    """What --targets says: one name or expression, or several suffixes."""
    return tuple(targets.split(",")) if "," in targets else targets
