"""``grass-hf bench net``: steps over rate-limited links, shown beside the model, filed and drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from ..config.settings import GrassConfig
from ..integrations.model_configs import causal_model
from ..measure.bench import comm, net, record
from ..measure.bench.switch import check_possible
from ..measure.estimate.traffic import ENGINES, traffic
from .estimate import pyplot_for_png
from .traffic import DTYPES, bytes_per_second


def run_net(
    model: str,
    *,
    grass: dict[str, Any],
    targets: dict[str, str | tuple[str, ...]],
    speeds: str,
    engine: str,
    dtype: str,
    layers: int,
    hidden: int,
    vocabulary: int,
    json: Path | None,
    png: Path | None,
    **shape: int,
) -> None:
    """Measure, print one table, append one row to `json`, draw `png`."""
    check_possible()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine} is not known: choose one of {', '.join(ENGINES)}.")
    if shape["workers"] < 2:
        raise ValueError(f"--workers {shape['workers']} sends nothing: give 2 or more.")
    bits = tuple(8 * bytes_per_second(text.strip(), "--speeds") for text in speeds.split(","))
    if not all(bits):
        raise ValueError(f"--speeds {speeds} has a link that carries nothing: give rates above 0.")
    pyplot = pyplot_for_png() if png else None
    if model:
        model_config, factory = causal_model(model, getattr(torch, dtype))
    else:
        model_config = llama(layers, hidden, vocabulary)
        factory = lambda: AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype))  # noqa: E731
    with torch.device("meta"):
        plain = factory()
    methods: dict[str, dict[str, Any] | None] = {net.ADAMW: None}
    sent = {net.ADAMW: traffic(plain, None, engine)}
    for words, target in targets.items():
        config = comm.placed(GrassConfig(**grass, target_modules=target), engine, shape["workers"], dtype)
        name = f"Grass {words}"
        methods[name], sent[name] = config.to_dict(), traffic(plain, config, engine)
    setting = net.Setting(model_config.to_dict(), methods, bits, engine=engine, dtype=dtype, **shape)
    console = Console()
    with console.status("starting") as status:
        for news in net.measure(setting):
            if isinstance(news, net.Measured):
                measured = news
            else:
                status.update(news)
    parameters = sum(p.numel() for p in plain.parameters())
    title = (
        f"{engine}, {setting.workers} workers, {model or 'LLaMA'} of {parameters / 1e6:.2f} M parameters, {dtype}, "
        f"{setting.batch} x {setting.sequence} tokens each, {config.shown_rank}, side={config.side}"
    )
    rows = net.rows(setting, measured, sent)
    _show(console, title, setting, measured, rows)
    if json is not None:
        row = {"bench": "net", "title": title, "setting": dataclasses.asdict(setting), "rows": rows}
        row |= {
            name: getattr(measured, name) for name in ("seconds", "bytes", "compute", "latency", "capacity", "losses")
        }
        record.append(json, row | record.machine())
    if png is not None:
        _draw(pyplot, rows, title, png)


def llama(layers: int, hidden: int, vocabulary: int) -> LlamaConfig:
    """A LLaMA of its usual proportions."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )


def _show(
    console: Console, title: str, setting: net.Setting, measured: net.Measured, rows: list[dict[str, Any]]
) -> None:
    table = Table(title=title, title_justify="left")
    measurements = ("links", "link / compute", "", "step", "speed-up", "MB sent", "of the ring's")
    for heading in (*measurements, "model's step", "its error", "its speed-up"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        first = row["method"] == net.ADAMW
        cells = [f"{row['bits'] / 1e6:g} Mbit/s", f"{row['link_to_compute']:.2f}"] if first else ["", ""]
        cells += [row["method"], f"{row['step']:.3f} s", f"{row['speed_up']:.2f}"]
        cells += [f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / row['ring_bytes']:.3f}"]
        cells += [f"{row['model']:.3f} s", f"{row['model'] / row['step'] - 1:+.1%}", f"{row['model_speed_up']:.2f}"]
        table.add_row(*cells, end_section=row["method"] == list(setting.methods)[-1])
    console.print(table)
    console.print(
        f"medians of {setting.rounds} steps each, taken in turn, of the slowest worker; bytes by the links' counters, "
        "headers included; link / compute: time of AdamW's bytes, at what the links carry, over its compute"
    )
    alone = ", ".join(f"{name} {measured.alone(name).total:.3f} s" for name in setting.methods)
    console.print(
        f"without a network: {alone}; {measured.latency * 1e6:.0f} us a hop; unlimited links carry "
        f"{measured.capacity * 8e-6:.0f} Mbit/s"
    )


def _draw(pyplot, rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        ratio = [row["link_to_compute"] for row in own]
        (line,) = axes.plot(ratio, [row["speed_up"] for row in own], "o", label=name)
        axes.plot(ratio, [row["model_speed_up"] for row in own], "--", color=line.get_color())
    axes.set_xscale("log")
    axes.set_xlabel("time of AdamW's bytes on the link / its compute")
    axes.set_ylabel("speed-up over AdamW (dashed: model)")
    axes.set_title(title, fontsize="x-small", wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
