"""What sending weights to a rollout engine costs: Grass, which knows its delta, beside AdamW and a byte comparison.

Two trainers of the same model take the same steps in turn. AdamW keeps float32 weights, of which the engine gets the
bfloat16 values; what changed is found as the projects do that send sparse patches: a copy of all bfloat16 weights, and
a comparison of the whole model after every step. Grass trains bfloat16 weights and float32 slices, and `WeightDelta`
says what changed; its time is what the comparisons add to the write-back of the slices, and the reading of the patches.
An element costs its value and an int32 index in both.

GRPO-like updates: the gradient that GRPO's first pass over a batch has, sum of advantage x log-probability, the
advantages normalised within groups of sequences. Which tokens these are of changes nothing here: they are random.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...config.settings import GrassConfig
from ...convert.conversion import convert_to_grass
from ...convert.record import grass_slices
from ...optim.factory import grass_optimizer
from ...optim.weight_delta import WeightDelta
from ...slices.changes import Changes, changes_of
from ...slices.ops.bits import as_bits
from ...slices.part import Part

GROUP = 4


@dataclass
class Found:
    """What one way of finding the delta came to.

    Attributes:
        name: "grass" or "adamw".
        elements: sent, by step.
        nbytes: sent, by step.
        seconds: to find them, by step.
        memory: bytes that are kept to find them.
        weights: elements of the model.
        bounded: whether no call sent more than the columns in slices and the ordinary parameters hold.
    """

    name: str
    weights: int
    elements: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    bounded: bool = True

    def row(self) -> dict[str, float | str | bool]:
        """Means over the steps, and the median of the times."""
        return {
            "method": self.name,
            "elements": statistics.mean(self.elements) / self.weights,
            "payload": statistics.mean(self.nbytes) / (2 * self.weights),
            "largest_payload": max(self.nbytes) / (2 * self.weights),
            "seconds": statistics.median(self.seconds),
            "memory_per_weight": self.memory / self.weights,
            "bounded": self.bounded,
        }


def compare(
    make: Callable[[], nn.Module],
    batches: Callable[[int], Tensor],
    *,
    lr: float,
    grpo: bool,
    steps: int,
    config: GrassConfig,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Found]:
    """Train both side by side, and synchronise after every step.

    Args:
        make: gives the float32 model.
        batches: token ids (b, t) of a step.
        lr: of both.
        grpo: GRPO-like updates; else next-token prediction.
        steps: of each.
        config: of Grass.
        progress: told what goes on.
    """
    dense, sparse = make().train(), make().to(torch.bfloat16).train()
    count = sum(param.numel() for param in sparse.parameters())
    adamw, grass = Found("adamw", count), Found("grass", count)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=lr, weight_decay=0.0)
    comparison = ByteComparison(dense)
    adamw.memory = comparison.nbytes
    convert_to_grass(sparse, config)
    slices = grass_optimizer(sparse, lr=lr, weight_decay=0.0)
    delta = WeightDelta(sparse, slices)
    clock = _Clock([changes_of(slice_) for slice_ in grass_slices(sparse)])
    for step in range(steps):
        ids = batches(step)
        _loss(dense, ids, grpo, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds, patches = comparison.find()
        adamw.seconds.append(seconds)
        _count(adamw, [*patches])
        _loss(sparse, ids, grpo, step).backward()
        clock.seconds = 0.0
        slices.step()
        clock.write_again()
        slices.zero_grad()
        grass.memory = max(grass.memory, _tracker_bytes(delta))
        begun = time.perf_counter()
        packets = list(delta.patches())
        grass.seconds.append(clock.seconds + time.perf_counter() - begun)
        _count(grass, packets)
        sync = delta.last
        grass.bounded &= sync is not None and sync.elements <= sync.bound
        progress(f"step {step + 1} of {steps}: {adamw.elements[-1]} and {grass.elements[-1]} elements")
    delta.close()
    return [adamw, grass]


class ByteComparison:
    """Finds changed elements of bfloat16 weights by comparing all of them with a copy.

    Args:
        model: float32; the bfloat16 values of its weights are what an engine has.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.copies = {name: param.detach().bfloat16() for name, param in model.named_parameters()}

    @property
    def nbytes(self) -> int:
        """Of the copy."""
        return sum(copy.nbytes for copy in self.copies.values())

    def find(self) -> tuple[float, list[tuple[str, Tensor, Tensor]]]:
        """Seconds, not counting the conversion to bfloat16, and the patches."""
        now = {name: param.detach().bfloat16() for name, param in self.model.named_parameters()}
        patches, begun = [], time.perf_counter()
        for name, values in now.items():
            flat, copy = values.view(-1), self.copies[name].view(-1)
            indices = (as_bits(flat) != as_bits(copy)).nonzero().squeeze(1)
            if indices.numel():
                patches.append((name, indices.int(), flat[indices]))
                copy[indices] = patches[-1][2]
        return time.perf_counter() - begun, patches


class _Clock:
    """Adds up what following costs where slices are written back: all writes of a step with a note of what they change,
    less the same writes without one, in the same order after them, when no weight is in the caches any more."""

    def __init__(self, followed: list[Changes]):
        self.seconds = 0.0
        self._again: list[tuple[Changes, int, Part, Tensor, str | None]] = []
        for changes in followed:
            vars(changes)["put"] = self._timed(changes)

    def _timed(self, changes: Changes) -> Callable:
        put = changes.put

        def timed(held: Part, rows: Tensor, seed: str | None) -> None:
            begun = time.perf_counter()
            put(held, rows, seed)
            self.seconds += time.perf_counter() - begun
            self._again.append((changes, held.index._version, held, rows, seed))

        return timed

    @torch.no_grad()
    def write_again(self) -> None:
        """After a step. Columns that a selection has replaced are not written again: their writes count in full."""
        for changes, version, held, rows, seed in self._again:
            if held.index._version == version:
                begun = time.perf_counter()
                held.put(rows, seed)
                self.seconds -= time.perf_counter() - begun
                changes.take_mark()
        self._again = []


def _tracker_bytes(delta: WeightDelta) -> int:
    entries = [entry for slice_ in grass_slices(delta.model) for entry in changes_of(slice_).entries]
    return delta.copied_bytes + sum(
        entry.columns.nbytes + (0 if entry.elements is None else entry.elements.nbytes) for entry in entries
    )


def _count(found: Found, patches: list[tuple[str, Tensor | None, Tensor]]) -> None:
    found.elements.append(sum(values.numel() for _, _, values in patches))
    found.nbytes.append(
        sum(values.nbytes + (0 if indices is None else indices.nbytes) for _, indices, values in patches)
    )


def _loss(model: nn.Module, ids: Tensor, grpo: bool, step: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    if not grpo:
        return losses.mean()
    rewards = torch.rand(ids.shape[0] // GROUP, GROUP, generator=torch.Generator().manual_seed(step))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return (advantages.flatten() * losses).mean()
