"""``grass-hf bench net``: training steps over rate-limited links, AdamW and Grass in turn.

N workers in network namespaces (`grass_hf.measure.bench.switch`) train the same model from the same weights on the same
batches, once with AdamW and once for every setting of Grass. In every round of one run each method takes a step at
each speed of the links, in changing order; medians are compared. The workers share this machine's cores, so compute
is slow, and equally so for all; what counts is the ratio of link time to compute.

What the model of `measure.estimate.network_model` needs is measured in the same run: steps without a network, on all
workers at once
(compute: of the bare model, or of FSDP2 over a process group that sends nothing, so that its copies and hooks count);
an all-reduce of one number (latency), and one of 16 MB over links without limits, for what this machine can carry at
all. Nothing is fitted to the steps that it predicts.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..estimate.network_model import Compute, Link, StepTime, ddp_step, fsdp2_step
from ..estimate.traffic import Traffic, ring_bytes
from .ranks import Ranks
from .switch import INTERFACE, PAYLOAD, Switch, address, own_network

_PORT = 29500
ADAMW = "AdamW"
# float32 numbers in the large probe.
_LARGE = 4 * 2**20


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: config of a causal language model, as a dict.
        methods: name and settings of Grass, as a dict; None for AdamW.
        speeds: of the links, in bits per second.
        workers: N.
        engine: "ddp" or "fsdp2".
        rounds: steps of every method at every speed.
        dtype, batch, sequence: as of `worker.Rank.make`; batch is that of one worker.
    """

    model: dict[str, Any]
    methods: dict[str, dict[str, Any] | None]
    speeds: tuple[float, ...]
    workers: int = 8
    engine: str = "ddp"
    rounds: int = 5
    dtype: str = "float32"
    batch: int = 1
    sequence: int = 64

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of `worker.Rank.make` that all methods have in common."""
        return {name: getattr(self, name) for name in ("model", "dtype", "batch", "sequence")}


@dataclass
class Measured:
    """What was measured, by method.

    Attributes:
        seconds: of every step at every speed; of the slowest worker.
        bytes: that one worker sent in a step, at every speed, headers included; the mean over workers, the median
            over steps.
        compute: seconds of the parts of a step without a network, of the slowest worker, medians.
        losses: of every step, the mean over workers; the same data for all methods.
        latency: seconds of a hop.
        capacity: bytes per second that a worker can send while all do, over links without limits.
    """

    seconds: dict[str, dict[float, list[float]]] = field(default_factory=dict)
    bytes: dict[str, dict[float, float]] = field(default_factory=dict)
    compute: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    latency: float = 0.0
    capacity: float = 0.0

    def median(self, method: str, speed: float) -> float:
        return statistics.median(self.seconds[method][speed])

    def alone(self, method: str) -> Compute:
        """A step without a network."""
        return Compute(**self.compute[method])


def measure(setting: Setting) -> Iterator[str | Measured]:
    """Run it; yields a word on what is going on now and then, and `Measured` at the end."""
    with own_network(), Ranks(setting.workers, prefix=("unshare", "--net")) as ranks:
        yield f"starting {setting.workers} workers"
        ranks.ask("hello")
        switch = Switch([process.pid for process in ranks.processes])
        each = [{"rank": number} for number in range(setting.workers)]
        where = {"address": address(0), "port": _PORT, "interface": INTERFACE, "timeout": 600}
        joined = ranks.ask("join", each=each, ranks=setting.workers, **where)
        if joined != [setting.workers] * setting.workers:
            raise RuntimeError(
                f"{setting.workers} workers were started, and they see {joined} of each other: another program answers "
                "on their port, perhaps; run the command again."
            )
        for name, grass in setting.methods.items():
            ranks.ask("make", name=name, engine=setting.engine, grass=grass, **setting.shape)
        yield from _Run(setting, ranks, switch).steps()


class _Run:
    def __init__(self, setting: Setting, ranks: Ranks, switch: Switch):
        self.setting, self.ranks, self.switch = setting, ranks, switch
        self.names = list(setting.methods)
        self.numbers = dict.fromkeys(self.names, 0)
        self.measured = Measured(losses={name: [] for name in self.names})

    def steps(self) -> Iterator[str | Measured]:
        setting, measured = self.setting, self.measured
        yield "steps that are not counted"
        for name in self.names * 2:  # DDP rearranges its buckets, Grass selects, AdamW makes its state
            self._step(name)
        sent: dict[str, dict[float, list[float]]] = {}
        for number in range(setting.rounds):
            for speed in setting.speeds:
                yield f"round {number + 1} of {setting.rounds}: {speed / 1e6:g} Mbit/s"
                self.switch.limit(speed)
                for name in self._turn(number):
                    before = self.switch.sent()
                    seconds = self._step(name)
                    moved = [after - start for after, start in zip(self.switch.sent(), before, strict=True)]
                    measured.seconds.setdefault(name, {}).setdefault(speed, []).append(seconds)
                    sent.setdefault(name, {}).setdefault(speed, []).append(statistics.fmean(moved))
        measured.bytes = {n: {s: statistics.median(v) for s, v in by.items()} for n, by in sent.items()}
        self.switch.unlimit()
        yield "latency, and what the machine can carry"
        measured.latency = self._probe(1, 20) / max(2 * (setting.workers - 1), 1)
        share = 2 * (setting.workers - 1) / setting.workers
        measured.capacity = share * 4 * _LARGE / self._probe(_LARGE, 5)
        yield "compute"
        self._compute()
        yield measured

    def _probe(self, numbers: int, repeat: int) -> float:
        return statistics.median(self.ranks.ask("probe", numbers=numbers, repeat=repeat))

    def _turn(self, number: int) -> list[str]:
        """The methods, each one first equally often."""
        at = number % len(self.names)
        return self.names[at:] + self.names[:at]

    def _step(self, name: str) -> float:
        answers = self.ranks.ask("step", name=name, number=self.numbers[name])
        self.numbers[name] += 1
        self.measured.losses[name].append(statistics.fmean(answer["loss"] for answer in answers))
        return max(answer["step"] for answer in answers)

    def _compute(self) -> None:
        """Parts of a step that every worker takes for itself at the same time: the slowest's."""
        setting = self.setting
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self.names}
        for name in self.names:
            self.ranks.ask("drop", name=name)
        for name, grass in setting.methods.items():
            engine = "quiet" if setting.engine == "fsdp2" else "alone"
            self.ranks.ask("make", name=name, engine=engine, grass=grass, **setting.shape)
        for number in range(setting.rounds + 1):
            for name in self._turn(number):
                answers = self.ranks.ask("step", name=name, number=number)
                if number:  # the first step makes the optimizer's state, and selects
                    found[name].append(max(answers, key=lambda answer: answer["step"]))
        for name, steps in found.items():
            self.measured.compute[name] = {part: statistics.median(step[part] for step in steps) for part in _PARTS}


_PARTS = ("forward", "backward", "optimizer")


def rows(setting: Setting, measured: Measured, sent: dict[str, Traffic]) -> list[dict[str, Any]]:
    """One row for each speed and method: what was measured, beside what the model says.

    Args:
        setting: as measured.
        measured: by `measure`.
        sent: `traffic` of each method.
    """
    found = []
    for bits in setting.speeds:
        for name in setting.methods:
            model = predict(setting, measured, sent, name, bits)
            step = measured.median(name, bits)
            row = {"bits": bits, "method": name, "step": step, "model": model.step}
            row |= {"speed_up": measured.median(ADAMW, bits) / step}
            row |= {"model_speed_up": predict(setting, measured, sent, ADAMW, bits).step / model.step}
            # no measured step selects
            per_step = dataclasses.replace(sent[name], norms=0).sent(setting.engine, setting.workers)
            row |= {"bytes": measured.bytes[name][bits], "ring_bytes": ring_bytes(per_step, setting.workers, gloo=True)}
            base = ring_bytes(sent[ADAMW].sent(setting.engine, setting.workers), setting.workers, gloo=True)
            row["link_to_compute"] = base / bandwidth(measured, bits) / measured.alone(ADAMW).total
            found.append(row)
    return found


def predict(setting: Setting, measured: Measured, sent: dict[str, Traffic], name: str, bits: float) -> StepTime:
    """What the model says of a method's step on links of a speed: of a step that selects no rows."""
    link = Link(bandwidth(measured, bits), measured.latency, setting.workers, gloo=True)
    quiet = dataclasses.replace(sent[name], norms=0)
    if setting.engine == "ddp":
        return ddp_step(quiet, link, measured.alone(name))
    return fsdp2_step(quiet, link, measured.alone(name), overlap=False)


def bandwidth(measured: Measured, bits: float) -> float:
    """Bytes of messages per second that links of a speed carry: not more than the machine itself can."""
    return min(bits / 8 * PAYLOAD, measured.capacity)
