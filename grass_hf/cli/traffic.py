"""``grass-hf estimate --bandwidth``: steps of AdamW and Grass on a network, by the model of
`measure.estimate.network_model`."""

from __future__ import annotations

import dataclasses
import json as json_module
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ..config.settings import GrassConfig
from ..integrations.model_configs import causal_model
from ..measure.bench.record import machine
from ..measure.estimate.network_model import MEASURED_ERROR, Compute, Link, StepTime, ddp_step, fsdp2_step
from ..measure.estimate.traffic import ENGINES, KINDS, Traffic, ring_bytes, traffic

DTYPES = ("float32", "bfloat16", "float16", "float64")

_RATES = {"b/s": 1.0, "kb/s": 1e3, "mb/s": 1e6, "gb/s": 1e9, "tb/s": 1e12}
_RATES |= {"bit/s": 1 / 8, "kbit/s": 1e3 / 8, "mbit/s": 1e6 / 8, "gbit/s": 1e9 / 8}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_SPEEDS = {"g": 1e9, "t": 1e12, "p": 1e15}


def bytes_per_second(text: str, option: str = "--bandwidth") -> float:
    """A rate as a person writes it: 25GB/s, 200Gbit/s."""
    number, unit = _quantity(text)
    if unit not in _RATES or not number:
        raise ValueError(f"{option} {text!r} is not a rate: write 25GB/s (bytes) or 200Gbit/s (bits).")
    return number * _RATES[unit]


def seconds(text: str, option: str) -> float:
    """A time as a person writes it: 350ms, 5us."""
    number, unit = _quantity(text)
    if unit not in _TIMES:
        raise ValueError(f"{option} {text!r} is not a time: write 1.2s, 350ms or 5us.")
    return number * _TIMES[unit]


def flops_per_second(text: str) -> float:
    """A speed as a person writes it: 400T."""
    number, unit = _quantity(text)
    if unit not in _SPEEDS or not number:
        raise ValueError(f"--flops {text!r} is not a speed: write 400T, for 4e14 operations a second.")
    return number * _SPEEDS[unit]


def _quantity(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Zµ/]*)\s*", text)
    return (float(match[1]), match[2].lower()) if match else (0.0, "?")


@dataclass(frozen=True)
class Network:
    """The options of a network as they were typed; `link` and `compute` read them."""

    ranks: int
    bandwidth: str
    latency: str = "0us"
    tree: bool = False
    step_time: str = ""
    flops: str = ""

    def __post_init__(self):
        if self.ranks < 2:
            raise ValueError(f"--world-size {self.ranks} sends nothing: --bandwidth needs 2 or more.")
        if self.step_time and self.flops:
            raise ValueError(
                f"--step-time {self.step_time} and --flops {self.flops} both say how long compute takes: keep one."
            )
        self.link()
        self.compute(0.0)

    def link(self) -> Link:
        return Link(bytes_per_second(self.bandwidth), seconds(self.latency, "--latency"), self.ranks, self.tree)

    def compute(self, operations: float) -> Compute:
        """A step's, of so many floating-point operations."""
        if self.flops:
            return Compute.of(operations / flops_per_second(self.flops))
        return Compute.of(seconds(self.step_time, "--step-time") if self.step_time else 0.0)


def predict(
    factory: Callable[[], nn.Module],
    config: GrassConfig,
    network: Network,
    *,
    batch: int,
    sequence: int,
    gradient_checkpointing: bool,
    **_: Any,
) -> list[dict[str, Any]]:
    """Steps of AdamW and Grass on a network; one row for each engine and method."""
    with torch.device("meta"):
        plain = factory()
    link = network.link()
    rows: list[dict[str, Any]] = []
    for engine in ENGINES:
        for method, settings in (("adamw", None), ("grass", config)):
            sent = traffic(plain, settings, engine)
            timed = _timed(engine, sent, link, network.compute(sent.flops(batch * sequence, gradient_checkpointing)))
            kinds = sent.sent(engine, network.ranks)
            row = {"engine": engine, "method": method, "sent": kinds, "ring_bytes": ring_bytes(kinds, network.ranks)}
            row |= {"compute": timed.compute, "communication": timed.communication, "step": timed.step}
            rows.append(row | {"speed_up": rows[-1]["step"] / timed.step if method == "grass" else 1.0})
    return rows


def _timed(engine: str, sent: Traffic, link: Link, compute: Compute) -> StepTime:
    return ddp_step(sent, link, compute) if engine == "ddp" else fsdp2_step(sent, link, compute)


def show_steps(
    console: Console,
    model: str,
    factory: Callable[[], nn.Module],
    config: GrassConfig,
    network: Network,
    **setting: Any,
) -> dict[str, Any]:
    """Print what `predict` says as a table, and return it with the network's options."""
    rows = predict(factory, config, network, **setting)
    hops = "a tree's" if network.tree else "a ring's"
    ranks = f"{network.ranks} ranks, {network.bandwidth}, {network.latency} for each of {hops} hops"
    title = f"{model}, {escape(config.shown_rank)}; {ranks}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    errors = "; ".join(f"{name} {low:+.0%} to {high:+.0%}" for name, (low, high) in MEASURED_ERROR.items())
    table.caption = (
        "GB (10^9 bytes) of messages of an average step; times by the model of docs/communication.md, whose error on "
        f"measured steps of 8 ranks over gloo was {errors}. It has not been checked on GPUs."
    )
    for heading in ("", "", "all-reduce", "reduce-scatter", "all-gather", "sent by a rank"):
        table.add_column(heading, justify="right" if heading else "left")
    for heading in ("communication", "compute", "step", "speed-up"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = [*(row["sent"][kind] for kind in KINDS[:3]), row["ring_bytes"]]
        cells = [row["engine"], row["method"], *(f"{size / 1e9:.3f}" if size else "-" for size in sizes)]
        cells += [f"{row[key]:.3f} s" for key in ("communication", "compute", "step")]
        table.add_row(*cells, f"{row['speed_up']:.2f}", end_section=row["method"] == "grass")
    console.print(table)
    if not rows[0]["compute"]:
        console.print("Without --step-time or --flops compute takes no time: the speed-up is that of messages alone.")
    return dataclasses.asdict(network) | {"steps": rows, "measured_error": MEASURED_ERROR}


def run_prediction(
    model: str, grass: dict[str, Any], dtype: str, network: Network, json: Path | None, **setting: Any
) -> None:
    """The table of `show_steps` alone; `json` is written with it."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
    config = GrassConfig(**grass)
    _, factory = causal_model(model, getattr(torch, dtype))
    steps = show_steps(Console(), model, factory, config, network, **setting)
    if json is not None:
        result = {"model": model, "dtype": dtype, "config": config.to_dict(), "setting": setting, "network": steps}
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps(result | {"versions": machine()["versions"]}, indent=2) + "\n")
