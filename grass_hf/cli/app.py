"""The commands and their help; the work is in the modules beside this one, imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..config.settings import GrassConfig, parse_field
from ..config.shipped_files import model_config_file
from . import autoload as autoload_module
from .adapter_commands import commands as adapter_commands
from .bench_commands import memory, rollout, speed
from .network_commands import TARGETS, comm, names, net
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


@app.command()
def estimate(
    model: str = typer.Argument(..., help="A folder, a config JSON, a shipped config's name (llama_13b), or a hub id."),
    method: list[str] = typer.Option(
        ["grass"], help="grass, adamw, frozen, lora, adamw8bit, galore, apollo; several with commas or repeated."
    ),
    rank: int | None = typer.Option(None, help="Rows r of every target matrix that are trained at a time."),
    density: float | None = typer.Option(None, help="The same as a share of the rows; 0.25 if neither is given."),
    density_pattern: str | None = typer.Option(
        None, help="Densities of some layers, as in optim_args: '(q|k|v|o)_proj:0.5;down_proj:0.1'."
    ),
    rank_pattern: str | None = typer.Option(None, help="The same for ranks: '(q|k|v|o)_proj:512'."),
    side: str = typer.Option(GrassConfig.side, help="Side that is selected: input (columns), output (rows) or auto."),
    selection: str = typer.Option(
        GrassConfig.selection, help="Rule by which rows are chosen; uniform_nr never observes."
    ),
    state_policy: str = typer.Option(
        GrassConfig.state_policy, help="What becomes of optimizer state at a selection (GrassConfig.state_policy)."
    ),
    stagger: int = typer.Option(
        GrassConfig.stagger, help="Number of steps among which the layers' selections are divided; 1 for all at once."
    ),
    targets: str = typer.Option("all-linear", help=TARGETS),
    dtype: str = typer.Option("bfloat16", help="Dtype of the weights."),
    slice_dtype: str | None = typer.Option(
        None, help="Dtype of the slices and of LoRA's adapters; float32 over half-precision weights if not given."
    ),
    batch: int = typer.Option(1, help="Sequences per step."),
    sequence: int = typer.Option(256, help="Tokens per sequence."),
    gradient_checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", help="Recompute layers in backward."
    ),
    weight_dtype: str | None = typer.Option(None, help="int8 stores frozen weights in eight bits (GrassConfig)."),
    resident: bool = typer.Option(
        True, "--resident/--released", help="Whether slices stay in memory between steps (GrassConfig.resident)."
    ),
    world_size: int = typer.Option(1, help="Processes that train together; the table is one rank's, and so is batch."),
    engine: str = typer.Option("ddp", help="How they do: ddp, fsdp2, zero1, zero2 or zero3."),
    base: str = typer.Option("", help="Base optimizer by its Trainer name (sgd, say); fused AdamW if not given."),
    fit: str = typer.Option("", help="Find the largest rank that fits: 40GB (10^9 bytes each) or 40GiB (2^30)."),
    bandwidth: str = typer.Option(
        "", help="What the slowest link carries: 25GB/s or 200Gbit/s. Adds a table of communication."
    ),
    latency: str = typer.Option("0us", help="Time of a hop between two ranks, for that table: 10us."),
    tree: bool = typer.Option(False, "--tree", help="Count the hops of a tree of ranks instead of a ring's."),
    step_time: str = typer.Option("", help="Time of a step on one rank without communication, for that table: 350ms."),
    flops: str = typer.Option("", help="Instead: operations a second that one rank sustains, 400T say."),
    memory: bool = typer.Option(True, help="--no-memory leaves that table alone, without the simulation."),
    within: str = typer.Option("", help="Fail (exit code 2) if the first method's peak is above this size."),
    json: Path | None = typer.Option(None, help="Write the result to this JSON file.", dir_okay=False),
    png: Path | None = typer.Option(None, help="Draw a stacked bar per method into this file.", dir_okay=False),
) -> None:
    """Peak memory of a training step, simulated without a GPU and without allocating weights.

    For example:

        grass-hf estimate llama_13b --rank 512 --slice-dtype bfloat16 --method grass,adamw,lora

        grass-hf estimate llama_13b --slice-dtype bfloat16 --fit 40GB

        grass-hf estimate llama_13b --rank 512 --world-size 8 --engine fsdp2 --method grass,adamw

    With --bandwidth also what AdamW and Grass send in a step under DDP and FSDP2, and how long it takes:

        grass-hf estimate llama_7b --slice-dtype bfloat16 --world-size 64 --bandwidth 25GB/s --step-time 600ms

    What is counted, and what comes on top of it, stands in docs/memory.md and docs/communication.md.
    """
    grass: dict[str, Any] = {
        "rank": rank,
        "density": density,
        "density_pattern": density_pattern and parse_field("density_pattern", density_pattern, "--density-pattern"),
        "rank_pattern": rank_pattern and parse_field("rank_pattern", rank_pattern, "--rank-pattern"),
        "side": side,
        "selection": selection,
        "state_policy": state_policy,
        "stagger": stagger,
        "target_modules": names(targets),
        "slice_dtype": slice_dtype,
        "weight_dtype": weight_dtype,
        "resident": resident,
    }
    GrassConfig(**grass)  # what is wrong with them, and with the model's name, is said before torch is imported
    model_config_file(model, "MODEL")
    setting: dict[str, Any] = {"batch": batch, "sequence": sequence, "gradient_checkpointing": gradient_checkpointing}
    network = None
    if bandwidth:
        from .traffic import Network, run_prediction

        network = Network(world_size, bandwidth, latency, tree, step_time, flops)
        if not memory:
            run_prediction(model, grass, dtype, network, json, **setting)
            return
    elif not memory:
        raise ValueError("--no-memory leaves nothing to estimate: give --bandwidth, or leave it out.")
    from .estimate import run_estimate

    setting |= {"world_size": world_size, "engine": engine}
    run_estimate(
        model,
        methods=method,
        grass=grass,
        dtype=dtype,
        base=base,
        fit=fit,
        within=within,
        json=json,
        png=png,
        network=network,
        **setting,
    )
