"""The commands and their help; the work is in the modules beside this one, imported when it is asked for."""

from __future__ import annotations

import sys

import typer

from . import autoload as autoload_module

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Full-parameter training of language models with structured sparse gradients (Grass, arXiv 2406.17660).\n\n"
        "Run any script that uses the Hugging Face Trainer with [bold]--optim grass[/bold]:\n\n"
        "  grass-hf run run_clm.py --optim grass --optim_args \"rank=64,update_interval=200\" ...\n\n"
        "  accelerate launch -m grass_hf run run_clm.py --optim grass ..."
    ),
)
bench = typer.Typer(no_args_is_help=True, help="Measure Grass against its limits and its peers on this machine.")
app.add_typer(bench, name="bench")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="",
)
def run(
    context: typer.Context,
    script: str = typer.Argument(..., help="A Python file, or `-m` followed by a module's name."),
) -> None:
    """Run an unmodified training script with the optimizer name "grass" known to the Trainer.

    Everything after the script is the script's own:

      grass-hf run run_clm.py --model_name_or_path gpt2 --optim grass --optim_args "density=0.25" --output_dir out

    The same under other launchers: `python -m grass_hf run ...`, `accelerate launch -m grass_hf run ...`,
    `torchrun -m grass_hf run ...`.
    """
    from .run import run_script

    run_script(script, context.args)


@app.command()
def autoload(
    switch: autoload_module.Switch = typer.Argument(..., help="on, off, or status"),
) -> None:
    """Make bare `python script.py --optim grass` work in this Python environment, or stop doing so.

    `on` writes one start-up line (a .pth file) into the environment's site-packages; it teaches transformers the
    name when a script imports it and costs other scripts a few milliseconds. `off` removes it; nothing else
    is changed.
    """
    typer.echo(autoload_module.switch(switch))


def main() -> None:
    """Entry point of ``grass-hf``: errors of the user's making are one sentence and exit code 2."""
    try:
        app(prog_name="grass-hf")
    except autoload_module.AutoloadError as error:
        print(f"grass-hf: {error}", file=sys.stderr)
        sys.exit(2)
