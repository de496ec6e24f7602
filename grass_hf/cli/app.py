"""The commands and their help; the work is in the modules beside this one, imported when it is asked for."""

from __future__ import annotations

from pathlib import Path

import typer

from . import autoload as autoload_module
from .adapter_commands import commands as adapter_commands
from .bench_commands import memory, rollout, speed
from .estimate_command import estimate
from .network_commands import comm, net
from .quality import quality, report
from .recipe_files import recipes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Full-parameter training of language models with structured sparse gradients (Grass, arXiv 2406.17660).\n\n"
        "Run any script that uses the Hugging Face Trainer with **--optim grass**:\n\n"
        '    grass-hf run run_clm.py --optim grass --optim_args "rank=64,update_interval=200" ...\n\n'
        "    accelerate launch -m grass_hf run run_clm.py --optim grass ...\n\n"
        "or a recipe, which is a whole run in one file:\n\n"
        "    grass-hf train llama_demo_sotu"
    ),
)
bench = typer.Typer(no_args_is_help=True, help="Measure Grass against its limits and its peers on this machine.")
app.add_typer(bench, name="bench")
app.add_typer(recipes, name="recipes")
app.add_typer(adapter_commands)
for command in (speed, memory, rollout, comm, net, quality, report):
    bench.command(command.__name__)(command)


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
    from .run import Script

    raise Script(script, context.args)  # to `main`: it runs when typer has nothing to say any more


_RECIPE = {"allow_extra_args": True, "ignore_unknown_options": True}
_RECIPE_ARGUMENT = typer.Argument(
    ..., help="A YAML file, or a name of `grass-hf recipes list`; flags for its fields follow it.", metavar="RECIPE"
)


@app.command(context_settings=_RECIPE)
def train(
    context: typer.Context,
    recipe: Path = _RECIPE_ARGUMENT,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the resolved recipe and stop: nothing is loaded."),
    no_grass: bool = typer.Option(
        False, "--no-grass", help="Train everything in full with training.optim: the baseline to compare with."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write into an output folder that is not empty."),
    json: Path | None = typer.Option(None, help="Write the results to this JSON file.", dir_okay=False),
) -> None:
    """Train what a recipe says: one YAML file with a task and the sections model, data, grass, training, evaluation.

    For example:

        grass-hf train llama_demo_sotu

        grass-hf train my_recipe.yaml --learning_rate 1e-4 --max_steps 20

        accelerate launch --config_file ddp_8gpu.yaml -m grass_hf train my_recipe.yaml

    `grass-hf recipes` lists the recipes and launch configs that come with the package, and copies them.

    Every field is a flag behind the recipe and replaces what the file says: `--rank 64`, `--output_dir runs/try`.

    A field that two sections have wants its section: `--grass.seed 1`. `null` takes a value away.

    To compare: `--no-grass` trains everything in full, `--no-grass --lora_r 64` LoRA adapters.

    Tasks: pretraining (packed text), sft (chats; the loss is of the replies), dpo, kto and reward (preferences), grpo
    (rewards by functions of yours), classification.

    `training` has the names of TrainingArguments, unchanged; for TRL's tasks those of its SFTConfig, DPOConfig, ...

    Its `optim` is the base optimizer of Grass.

    A run leaves a plain checkpoint, training.jsonl and report.html in its output_dir.

    `grass-hf validate` finds mistakes without training; docs/recipes.md lists every field.
    """
    from .train import run_train

    run_train(recipe, context.args, grass=not no_grass, dry_run=dry_run, overwrite=overwrite, json=json)


@app.command(context_settings=_RECIPE)
def validate(
    context: typer.Context,
    recipe: Path = _RECIPE_ARGUMENT,
    budget: str = typer.Option(
        "", help="Memory that a step may take: 24GB (10^9 bytes each) or 24GiB; else that of the visible device."
    ),
    no_memory: bool = typer.Option(False, "--no-memory", help="Leave out the estimate, which takes most of the time."),
    no_grass: bool = typer.Option(False, "--no-grass", help="As in `grass-hf train`."),
    overwrite: bool = typer.Option(False, "--overwrite", help="As in `grass-hf train`."),
    json: Path | None = typer.Option(None, help="Write what was found to this JSON file.", dir_okay=False),
) -> None:
    """Check a recipe without training: model, data, columns, targets, rank, folders and memory.

    For example:

        grass-hf validate llama_demo_sotu --budget 24GB

    Rows are read and tokenised as for training, one example is shown as the model will see it, and the peak memory of a
    step is estimated as by `grass-hf estimate`. The first mistake is one sentence, and the exit code is 2.
    """
    from .train import run_validate

    run_validate(
        recipe,
        context.args,
        grass=not no_grass,
        budget=budget,
        memory=not no_memory,
        overwrite=overwrite,
        json=json,
    )


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


app.command()(estimate)
