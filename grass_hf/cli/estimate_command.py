"""``grass-hf estimate``: its options, by what they are about. What it does is in `grass_hf.cli.estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.settings import GrassConfig, parse_field
from ..config.shipped_files import model_config_file
from .network_commands import TARGETS, names


def _option(panel: str, help: str, *flags: str, **more: Any) -> Any:
    """An option of `grass-hf estimate`, under the heading `panel` of its help."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


# -- what is trained, and how long a step is
_STEP = "Model and step"
Model = Annotated[
    str, typer.Argument(help="A folder, a config JSON, a shipped config's name (llama_13b), or a hub id.")
]
Method = Annotated[
    list[str],
    _option(_STEP, "grass, adamw, frozen, lora, adamw8bit, galore, apollo; several with commas or repeated."),
]
Base = Annotated[str, _option(_STEP, "Base optimizer by its Trainer name (sgd, say); fused AdamW if not given.")]
Dtype = Annotated[str, _option(_STEP, "Dtype of the weights.")]
Batch = Annotated[int, _option(_STEP, "Sequences per step.")]
Sequence = Annotated[int, _option(_STEP, "Tokens per sequence.")]
Checkpointing = Annotated[bool, _option(_STEP, "Recompute layers in backward.", "--gradient-checkpointing")]

# -- settings of Grass, as in GrassConfig
_GRASS = "Settings of Grass"
Rank = Annotated[int | None, _option(_GRASS, "Rows r of every target matrix that are trained at a time.")]
Density = Annotated[float | None, _option(_GRASS, "The same as a share of the rows; 0.25 if neither is given.")]
RankPattern = Annotated[
    str | None, _option(_GRASS, "Ranks of some layers, as in optim_args: '(q|k|v|o)_proj:512;down_proj:64'.")
]
DensityPattern = Annotated[str | None, _option(_GRASS, "The same for densities: '(q|k|v|o)_proj:0.5;down_proj:0.1'.")]
Side = Annotated[str, _option(_GRASS, "Side that is selected: input (columns), output (rows) or auto.")]
Rule = Annotated[
    str, _option(_GRASS, "Rule by which rows are chosen; uniform_nr never observes; multinomial_stale_nr is research.")
]
StatePolicy = Annotated[
    str,
    _option(
        _GRASS,
        "What becomes of optimizer state at a selection: carry_seeded or reset; carry and reset_warmup are research.",
    ),
]
Stagger = Annotated[
    int, _option(_GRASS, "Number of steps among which the layers' selections are divided; 1 for all at once.")
]
Targets = Annotated[str, _option(_GRASS, TARGETS)]
SliceDtype = Annotated[
    str | None,
    _option(_GRASS, "Dtype of the slices and of LoRA's adapters; float32 over half-precision weights if not given."),
]
WeightDtype = Annotated[str | None, _option(_GRASS, "int8 stores frozen weights in eight bits (GrassConfig).")]
Resident = Annotated[
    bool,
    _option(_GRASS, "Whether slices stay in memory between steps (GrassConfig.resident).", "--resident/--released"),
]

# -- several processes, and what they send
_RANKS = "Several processes"
WorldSize = Annotated[int, _option(_RANKS, "Processes that train together; the table is one rank's, and so is batch.")]
Engine = Annotated[str, _option(_RANKS, "How they do: ddp, fsdp2, zero1, zero2 or zero3.")]
Bandwidth = Annotated[
    str, _option(_RANKS, "What the slowest link carries: 25GB/s or 200Gbit/s. Adds a table of communication.")
]
Latency = Annotated[str, _option(_RANKS, "Time of a hop between two ranks, for that table: 10us.")]
Tree = Annotated[bool, _option(_RANKS, "Count the hops of a tree of ranks instead of a ring's.", "--tree")]
StepTime = Annotated[str, _option(_RANKS, "Time of a step on one rank without communication, for that table: 350ms.")]
Flops = Annotated[str, _option(_RANKS, "Instead: operations a second that one rank sustains, 400T say.")]

# -- what is asked for, and where it goes
_RESULT = "Result"
Fit = Annotated[str, _option(_RESULT, "Find the largest rank that fits: 40GB (10^9 bytes each) or 40GiB (2^30).")]
Within = Annotated[str, _option(_RESULT, "Fail (exit code 2) if the first method's peak is above this size.")]
Memory = Annotated[
    bool, _option(_RESULT, "--no-memory leaves the table of memory out, and the simulation; with --bandwidth.")
]
Json = Annotated[Path | None, _option(_RESULT, "Write the result to this JSON file.", dir_okay=False)]
Png = Annotated[Path | None, _option(_RESULT, "Draw a stacked bar per method into this file.", dir_okay=False)]


def estimate(
    context: typer.Context,
    model: Model,
    # what is trained, and how long a step is
    method: Method = ["grass"],  # noqa: B006  # typer makes a new list for every call
    base: Base = "",
    dtype: Dtype = "bfloat16",
    batch: Batch = 1,
    sequence: Sequence = 256,
    gradient_checkpointing: Checkpointing = False,
    # settings of Grass
    rank: Rank = None,
    density: Density = None,
    rank_pattern: RankPattern = None,
    density_pattern: DensityPattern = None,
    side: Side = GrassConfig.side,
    selection: Rule = GrassConfig.selection,
    state_policy: StatePolicy = GrassConfig.state_policy,
    stagger: Stagger = GrassConfig.stagger,
    targets: Targets = "all-linear",
    slice_dtype: SliceDtype = None,
    weight_dtype: WeightDtype = None,
    resident: Resident = True,
    # several processes, and what they send
    world_size: WorldSize = 1,
    engine: Engine = "ddp",
    bandwidth: Bandwidth = "",
    latency: Latency = "0us",
    tree: Tree = False,
    step_time: StepTime = "",
    flops: Flops = "",
    # what is asked for, and where it goes
    fit: Fit = "",
    within: Within = "",
    memory: Memory = True,
    json: Json = None,
    png: Png = None,
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
    grass = _settings(context.params)
    model_config_file(model, "MODEL")  # a wrong name is said before torch is imported
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
    result: dict[str, Any] = {"fit": fit, "within": within, "json": json, "png": png}
    run_estimate(model, methods=method, grass=grass, dtype=dtype, base=base, network=network, **result, **setting)


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `GrassConfig` from what the options say, checked before torch is imported."""
    asis = (
        "rank",
        "density",
        "side",
        "selection",
        "state_policy",
        "stagger",
        "slice_dtype",
        "weight_dtype",
        "resident",
    )
    fields = {name: said[name] for name in asis} | {"target_modules": names(said["targets"])}
    for name in ("rank_pattern", "density_pattern"):
        fields[name] = said[name] and parse_field(name, said[name], "--" + name.replace("_", "-"))
    GrassConfig(**fields)
    return fields
