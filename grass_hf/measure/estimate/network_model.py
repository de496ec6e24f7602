"""How long a training step takes on a network: an alpha-beta model of collectives, and what hides behind compute.

A link sends B bytes per second in each direction and takes α seconds per hop. A collective of S bytes among N ranks:

    all-reduce                    2 h α + 2 (N-1)/N S/B        h = N-1 hops around a ring,
    all-gather, reduce-scatter      h α +   (N-1)/N S/B        or ceil(log2 N) down a tree
    broadcast                     ceil(log2 N) (α + S/B)

B is what the slowest link of the ring carries. Reductions' own arithmetic is left out. Messages go one after the other.

DDP. Gradients become ready over the backward pass, from the model's end to its beginning, in step with its products.
Bucket j is sent when it is full and bucket j-1 has been sent; then the optimizer steps:

    sent_j = max(sent_{j-1}, ready_j) + t(bucket_j)

FSDP2. Units are gathered one ahead of compute, in forward and again, in reverse order, in backward; a unit's
gradients are scattered when its backward is done, after the gather of the next. All of it shares one link. Without
overlap (gloo on the CPU, for which FSDP2 waits) the step is the sum of all messages and all compute.

Compute without a network is given. A third of its products is forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .traffic import Traffic

# Of a weight's three products one is forward's.
FORWARD = 1 / 3
# torch's DistributedDataParallel: a small first bucket, so that sending starts early.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
# The model's steps over the measured ones, minus 1: the lowest and the highest by engine, on the points that
# docs/communication.md lists. tests/measure/test_network.py computes them again.
MEASURED_ERROR = {"ddp": (-0.14, -0.015), "fsdp2": (-0.35, -0.045)}


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Attributes:
        bandwidth: B, bytes per second in each direction.
        latency: α, seconds per hop.
        ranks: N.
        tree: whether latency counts ceil(log2 N) hops instead of a ring's N - 1; libraries choose trees for many ranks.
        gloo: whether a reduce-scatter costs what an all-reduce does, of which every rank then keeps its part.
    """

    bandwidth: float
    latency: float
    ranks: int
    tree: bool = False
    gloo: bool = False

    def seconds(self, kind: str, nbytes: float) -> float:
        """Time of one collective of so many bytes: all_reduce, all_gather, reduce_scatter or broadcast."""
        if self.ranks == 1 or not nbytes:
            return 0.0
        levels = math.ceil(math.log2(self.ranks))
        if kind == "broadcast":
            return levels * (self.latency + nbytes / self.bandwidth)
        once = (levels if self.tree else self.ranks - 1) * self.latency
        once += (self.ranks - 1) / self.ranks * nbytes / self.bandwidth
        twice = kind == "all_reduce" or (self.gloo and kind == "reduce_scatter")
        return 2 * once if twice else once


@dataclass(frozen=True)
class Compute:
    """Seconds of a step without a network.

    Attributes:
        forward, backward, optimizer: its parts.
    """

    forward: float
    backward: float
    optimizer: float = 0.0

    @classmethod
    def of(cls, seconds: float) -> Compute:
        """A step of so many seconds, split as products are; the optimizer counts as backward's."""
        return cls(FORWARD * seconds, (1 - FORWARD) * seconds)

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True)
class StepTime:
    """What a step takes, in seconds.

    Attributes:
        compute: without a network.
        communication: all messages one after the other, hidden or not.
        step: the whole.
    """

    compute: float
    communication: float
    step: float


def ddp_step(sent: Traffic, link: Link, compute: Compute, bucket: int = BUCKET) -> StepTime:
    """A step under DDP.

    Args:
        sent: `traffic` of the method for "ddp".
        link: the network.
        compute: of the method.
        bucket: bytes of a bucket of gradients, DDP's ``bucket_cap_mb``.
    """
    before = link.seconds("broadcast", sent.buffers)
    after = link.seconds("all_reduce", sent.norms) / sent.interval
    started = last = before + compute.forward
    communication = before + after
    for nbytes, share in buckets(sent, bucket):
        seconds = link.seconds("all_reduce", nbytes)
        last = max(last, started + share * compute.backward) + seconds
        communication += seconds
    step = max(last, started + compute.backward) + compute.optimizer + after
    return StepTime(compute.total, communication, step)


def buckets(sent: Traffic, bucket: int = BUCKET) -> list[tuple[int, float]]:
    """Bytes of each of DDP's buckets, closed when it is full, and the share of backward that is done by then."""
    products = sum(part.forward + part.gradient for part in sent.parts) or 1
    found, size, done, limit = [], 0, 0, min(FIRST_BUCKET, bucket)
    for part in reversed(sent.parts):
        size += part.gradient_bytes()
        done += part.forward + part.gradient
        if size >= limit:
            found.append((size, done / products))
            size, limit = 0, bucket
    return [*found, (size, 1.0)] if size else found


def fsdp2_step(sent: Traffic, link: Link, compute: Compute, overlap: bool = True) -> StepTime:
    """A step under FSDP2 that gathers layers again in backward.

    Args:
        sent: `traffic` of the method for "fsdp2".
        link: the network.
        compute: of the method.
        overlap: whether messages travel while there is compute.
    """
    units = sent.units()
    products = [sum(part.forward for part in unit) for unit in units]
    shares = [own / (sum(products) or 1) for own in products]
    gathers = [link.seconds("all_gather", sum(p.weight_bytes(link.ranks) for p in unit)) for unit in units]
    scatters = [link.seconds("reduce_scatter", sum(p.gradient_bytes(link.ranks) for p in unit)) for unit in units]
    after = link.seconds("all_reduce", sent.norms) / sent.interval
    communication = 2 * sum(gathers) - gathers[0] + sum(scatters) + after  # the root, units[0], is gathered once
    if not overlap:
        return StepTime(compute.total, communication, compute.total + communication)

    sent_by = began = computed = 0.0  # the link is free; the last piece of compute began, and ended
    for gather, share in zip(gathers, shares, strict=True):
        sent_by = max(sent_by, began) + gather
        began = max(computed, sent_by)
        computed = began + share * compute.forward
    scatter = 0.0
    for number in reversed(range(len(units))):
        gathered = 0.0
        if number:
            sent_by = gathered = max(sent_by, began) + gathers[number]
        if scatter:
            sent_by = max(sent_by, computed) + scatter
        began = max(computed, gathered)
        computed = began + shares[number] * compute.backward
        scatter = scatters[number]
    step = max(computed, max(sent_by, computed) + scatter) + compute.optimizer + after
    return StepTime(compute.total, communication, step)
