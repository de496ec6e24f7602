"""The command ``grass-hf estimate`` and its options; the work is in the modules beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..config.presets import with_preset
from ..config.settings import GrassConfig, parse_field
from ..config.shipped_files import model_config_file
from .network_commands import TARGETS, names


def _default(value: Any, help: str) -> Any:
    """An option that stands for a field's default, which a preset may change."""
    return typer.Option(None, help=help, show_default=str(value))


def _estimate_recipe(context: typer.Context, recipe: str, **allowed: Any) -> None:
    """Estimate a recipe, which says itself what other options say: they are refused."""
    for param in context.command.params:
        source = context.get_parameter_source(str(param.name))
        if source is not None and source.name == "COMMANDLINE" and param.name not in {"model", *allowed}:
            raise ValueError(
                f"{param.opts[0]} does not go with {recipe}, whose own step is estimated: leave it out, and change the "
                "recipe instead."
            )
    from .recipe_memory import run_recipe_estimate

    run_recipe_estimate(Path(recipe), **allowed)


def estimate(
    context: typer.Context,
    model: str = typer.Argument(
        ..., help="A folder, a config JSON, a shipped config's name (llama_13b), a hub id, or a recipe (RECIPE.yaml)."
    ),
    method: list[str] = typer.Option(
        [],
        help="grass, adamw, frozen, lora, adamw8bit, galore, apollo; several with commas or repeated.",
        show_default="grass, and adamw beside it",
    ),
    preset: str | None = typer.Option(None, help="A named set of settings (paper, max_memory); others override it."),
    rank: int | None = typer.Option(None, help="Rows r of every target matrix that are trained at a time."),
    density: float | None = typer.Option(None, help="The same as a share of the rows; 0.25 if neither is given."),
    density_pattern: str | None = typer.Option(
        None, help="Densities of some layers, as in optim_args: '(q|k|v|o)_proj:0.5;down_proj:0.1'."
    ),
    rank_pattern: str | None = typer.Option(None, help="The same for ranks: '(q|k|v|o)_proj:512'."),
    side: str | None = _default(GrassConfig.side, "Side that is selected: input (columns), output (rows) or auto."),
    selection: str | None = _default(
        GrassConfig.selection,
        "Rule by which rows are chosen; uniform_nr never observes; multinomial_stale_nr is research.",
    ),
    state_policy: str | None = _default(
        GrassConfig.state_policy,
        "What becomes of optimizer state at a selection: carry_seeded or reset; carry and reset_warmup are research.",
    ),
    stagger: int | None = _default(
        GrassConfig.stagger, "Number of steps among which the layers' selections are divided; 1 for all at once."
    ),
    targets: str | None = _default("all-linear", TARGETS),
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
    resident: bool | None = typer.Option(
        None,
        "--resident/--released",
        help="Whether slices stay in memory between steps (GrassConfig.resident).",
        show_default="resident",
    ),
    world_size: int = typer.Option(1, help="Processes that train together; the table is one rank's, and so is batch."),
    engine: str = typer.Option("ddp", help="How they do: ddp, fsdp2, zero1, zero2 or zero3."),
    base: str = typer.Option("", help="Base optimizer by its Trainer name (sgd, say); fused AdamW if not given."),
    fit: str = typer.Option(
        "", help="Find settings that fit, and the largest rank: 40GB (10^9 bytes each) or 40GiB (2^30)."
    ),
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

        grass-hf estimate llama_13b --fit 40GB

        grass-hf estimate RECIPE.yaml

        grass-hf estimate llama_13b --rank 512 --world-size 8 --engine fsdp2 --method grass,adamw

    With --bandwidth also what AdamW and Grass send in a step under DDP and FSDP2, and how long it takes:

        grass-hf estimate llama_7b --slice-dtype bfloat16 --world-size 64 --bandwidth 25GB/s --step-time 600ms

    What is counted, and what comes on top of it, stands in docs/memory.md and docs/communication.md.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        _estimate_recipe(context, model, within=within, json=json)
        return
    asked: dict[str, Any] = {
        "preset": preset,
        "rank": rank,
        "density": density,
        "density_pattern": density_pattern and parse_field("density_pattern", density_pattern, "--density-pattern"),
        "rank_pattern": rank_pattern and parse_field("rank_pattern", rank_pattern, "--rank-pattern"),
        "side": side,
        "selection": selection,
        "state_policy": state_policy,
        "stagger": stagger,
        "target_modules": None if targets is None else names(targets),
        "slice_dtype": slice_dtype,
        "weight_dtype": weight_dtype,
        "resident": resident,
    }
    grass, preset_base = with_preset({name: value for name, value in asked.items() if value is not None})
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
        base=base or preset_base or "",
        fit=fit,
        within=within,
        json=json,
        png=png,
        network=network,
        **setting,
    )
