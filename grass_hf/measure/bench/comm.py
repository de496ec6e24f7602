"""``grass-hf bench comm``: bytes that an optimizer step sends, counted in running processes, beside the expectation.

N processes train over gloo on this machine; a dispatch mode sees every message. The first steps are not counted (DDP
rearranges its buckets after the first). Counted are a step that selects rows and one that does not; over an
interval of K steps

    bytes = ((K - 1) ordinary + selecting) / K

which must be what `grass_hf.measure.estimate.traffic` expects from shapes alone.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...config.settings import GrassConfig
from ..estimate.traffic import KINDS
from .ranks import Ranks


@dataclass(frozen=True)
class Counted:
    """Bytes that one rank's step starts messages of, by kind.

    Attributes:
        ordinary: of a step that does not select.
        selecting: of one that does; the same for AdamW.
        messages: number of messages of an ordinary step.
    """

    ordinary: dict[str, int]
    selecting: dict[str, int]
    messages: int

    def average(self, interval: int) -> dict[str, float]:
        """Bytes of an average step, by kind."""
        return {kind: ((interval - 1) * self.ordinary[kind] + self.selecting[kind]) / interval for kind in KINDS}


def placed(config: GrassConfig, engine: str, ranks: int, dtype: str) -> GrassConfig:
    """Settings of Grass as an engine wants them: FSDP2 chooses rows by blocks, one a shard, and has one dtype."""
    if engine != "fsdp2":
        return config
    return dataclasses.replace(config, row_blocks=ranks, slice_dtype=dtype)


def measure(
    model: dict[str, Any], config: GrassConfig, engines: list[str], ranks: int, dtype: str, batch: int, sequence: int
) -> Iterator[tuple[str, str, Counted]]:
    """Count for every engine and method; yields (engine, method, what was counted).

    Args:
        model: config of a causal language model, as a dict.
        config: settings of Grass.
        engines: "ddp", "fsdp2".
        ranks: number of processes.
        dtype: of the weights.
        batch, sequence: sequences of a rank's step, and their tokens.
    """
    shape: dict[str, Any] = {"model": model, "dtype": dtype, "batch": batch, "sequence": sequence}
    with Ranks(ranks) as running:
        joined = running.ask("join", each=[{"rank": rank} for rank in range(ranks)], ranks=ranks, **local())
        if joined != [ranks] * ranks:
            raise RuntimeError(
                f"{ranks} processes were started, and they see {joined} of each other: another program answers on "
                "their port, perhaps; run the command again."
            )
        for engine in engines:
            # all layers select at every other step: one step of each kind is enough
            often = dataclasses.replace(placed(config, engine, ranks, dtype), update_interval=2, stagger=1)
            for method, grass in (("adamw", None), ("grass", often.to_dict())):
                running.ask("make", name=method, engine=engine, grass=grass, **shape)
                steps = [running.ask("count", name=method, number=number) for number in range(4)]
                running.ask("drop", name=method)
                selecting, ordinary = (_same_on_all(found) for found in steps[2:])
                yield engine, method, Counted(_by_kind(ordinary), _by_kind(selecting), len(ordinary))


def local() -> dict[str, Any]:
    """How ranks on this machine find each other: the loopback interface and a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"address": "127.0.0.1", "port": probe.getsockname()[1], "interface": "lo", "timeout": 300}


def _same_on_all(found: list[list]) -> list:
    """What every rank counted.

    Raises:
        RuntimeError: ranks counted different messages, which no collective allows.
    """
    if any(own != found[0] for own in found):
        counts = [len(own) for own in found]
        raise RuntimeError(
            f"ranks counted different messages in one step, {counts} of them: a rank must have failed; what it said "
            "stands above, run the command again."
        )
    return found[0]


def _by_kind(messages: list) -> dict[str, int]:
    total = Counter(dict.fromkeys(KINDS, 0))
    for kind, size in messages:
        total[kind] += size
    return dict(total)
