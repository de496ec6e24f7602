"""The alpha-beta model: closed forms, limits, and the steps that were measured on rate-limited links."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from grass_hf import GrassConfig
from grass_hf.measure.bench.net import ADAMW, Measured, Setting, rows
from grass_hf.measure.estimate.network_model import MEASURED_ERROR, Compute, Link, buckets, ddp_step, fsdp2_step
from grass_hf.measure.estimate.traffic import Sent, Traffic, traffic

FREE = Link(math.inf, 0.0, 8)


def test_collectives_are_the_closed_forms():
    link = Link(bandwidth=1e9, latency=1e-5, ranks=8)
    assert link.seconds("all_reduce", 8e8) == pytest.approx(2 * 7 * (1e-5 + 0.1))
    assert link.seconds("all_gather", 8e8) == link.seconds("reduce_scatter", 8e8) == pytest.approx(7 * (1e-5 + 0.1))
    assert link.seconds("broadcast", 8e8) == pytest.approx(3 * (1e-5 + 0.8))
    tree = dataclasses.replace(link, tree=True)
    assert tree.seconds("all_reduce", 8e8) == pytest.approx(2 * 3e-5 + 2 * 0.7)
    assert dataclasses.replace(link, gloo=True).seconds("reduce_scatter", 8e8) == link.seconds("all_reduce", 8e8)
    assert dataclasses.replace(link, ranks=1).seconds("all_reduce", 8e8) == 0.0
    assert link.seconds("all_reduce", 0) == 0.0


def uniform(count: int, size: int) -> Traffic:
    """So many layers of a matrix each, and no root."""
    parts = (Sent(str(n), (((size,), 1),), (((size,), 1),), forward=1, gradient=1) for n in range(count))
    return Traffic("adamw", tuple(parts), 0, 0, 1)


def test_ddp_by_hand():
    """Four buckets of 8 s around the ring of a slow link, ready after 3, 4, 5 and 6 s of a step of 6 s."""
    sent, compute = uniform(4, 2**20), Compute(2.0, 4.0, 0.5)
    assert buckets(sent, 2**20) == [(2**20, 0.25), (2**20, 0.5), (2**20, 0.75), (2**20, 1.0)]
    slow, fast = (Link(2 * 7 / 8 * 2**20 / seconds, 0.0, 8) for seconds in (8.0, 0.25))
    timed = ddp_step(sent, slow, compute, bucket=2**20)
    assert (timed.compute, timed.communication, timed.step) == pytest.approx((6.5, 32.0, 3.0 + 32.0 + 0.5))
    # a fast link is done a quarter of a second after the last bucket is ready
    assert ddp_step(sent, fast, compute, bucket=2**20).step == pytest.approx(6.0 + 0.25 + 0.5)


def test_ddp_buckets_are_closed_when_they_are_full():
    sent = uniform(5, 2**20)
    assert [size / 2**20 for size, _ in buckets(sent, 2 * 2**20)] == [1, 2, 2]
    assert [size / 2**20 for size, _ in buckets(sent)] == [1, 4]


def test_fsdp2_by_hand():
    """Two layers, and a root that holds nothing: gathers of 1 s, scatters of 1 s, forward 2 s a layer, backward 4 s."""
    sent, compute = uniform(2, 800), Compute(4.0, 8.0, 0.5)
    timed = fsdp2_step(sent, Link(7 / 8 * 800, 0.0, 8), compute)
    # gather | layer 0 while layer 1 is gathered | layer 1 | its backward: nothing to wait for | scatter after the last
    assert timed.communication == pytest.approx(4 + 2)
    assert timed.step == pytest.approx(1 + 4 + 8 + 1 + 0.5)
    assert fsdp2_step(sent, Link(7 / 8 * 800, 0.0, 8), compute, overlap=False).step == pytest.approx(12.5 + 6)
    # gathers of 10 s: backward of layer 1, 40 s, waits until it is gathered again, at 30 s
    timed = fsdp2_step(sent, Link(7 / 80 * 800, 0.0, 8), Compute(2.0, 80.0, 0.5))
    assert timed.step == pytest.approx(30 + 40 + 40 + 10 + 0.5)


@pytest.mark.parametrize("engine, step", [("ddp", ddp_step), ("fsdp2", fsdp2_step)])
@pytest.mark.parametrize("config", [None, GrassConfig(rank=8, update_interval=7)], ids=["adamw", "grass"])
def test_limits(engine, step, config):
    sent, compute = traffic(tiny_llama(), config, engine), Compute.of(0.3)
    assert compute.total == pytest.approx(0.3)
    assert step(sent, FREE, compute).step == pytest.approx(0.3)
    before = math.inf
    for bandwidth in (1e3, 1e5, 1e6, 1e7, 1e9):
        timed = step(sent, Link(bandwidth, 1e-5, 8), compute)
        assert max(timed.compute, timed.communication) <= timed.step <= timed.compute + timed.communication + 1e-12
        assert timed.step <= before
        before = timed.step
        nothing = step(sent, Link(bandwidth, 1e-5, 8), Compute.of(0.0))
        assert nothing.step == pytest.approx(nothing.communication)
    # where compute does not matter, time is the bytes' around the ring
    kinds = sent.sent(engine, 8)
    slow = step(sent, Link(1.0, 0.0, 8), compute).communication
    ring = 7 / 8 * (2 * kinds["all_reduce"] + kinds["reduce_scatter"] + kinds["all_gather"]) + 3 * kinds["broadcast"]
    assert slow == pytest.approx(ring)


def test_grass_is_never_predicted_slower():
    """With the same compute, under DDP; under FSDP2 it gathers its slices too, and may lose what it does not win."""
    for bandwidth in (1e4, 1e6, 1e8):
        link, compute = Link(bandwidth, 1e-6, 8), Compute.of(0.01)
        times = [ddp_step(traffic(tiny_llama(), c), link, compute).step for c in (None, GrassConfig(rank=8))]
        assert times[1] <= times[0]


DATA = Path(__file__).parent / "data"
# Largest error of the model's steps and of its speed-ups, as docs/communication.md states them.
ERRORS = {
    "bench_net_ddp.json": (0.15, 0.05),
    "bench_net_ddp_long.json": (0.07, 0.05),
    "bench_net_fsdp2.json": (0.16, 0.13),
}


def measured_rows(file: str) -> list[dict]:
    """The rows of a run that was filed, with the model's part computed anew."""
    filed = json.loads((DATA / file).read_text())
    setting = Setting(**{**filed["setting"], "speeds": tuple(filed["setting"]["speeds"])})
    found = {name: filed[name] for name in ("compute", "losses", "latency", "capacity")}
    for name in ("seconds", "bytes"):
        found[name] = {method: {float(k): v for k, v in by.items()} for method, by in filed[name].items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**setting.model))
    configs = {name: grass and GrassConfig.from_dict(grass) for name, grass in setting.methods.items()}
    return rows(setting, Measured(**found), {name: traffic(model, c, setting.engine) for name, c in configs.items()})


@pytest.mark.parametrize("file", ERRORS)
def test_measured_steps_are_predicted(file):
    """Compute, latency and capacity were measured in the same run; no measured step went into the model."""
    steps, speed_ups = ERRORS[file]
    for row in measured_rows(file):
        # the links' counters, headers included, against the bytes around the ring
        assert 1.0 < row["bytes"] / row["ring_bytes"] < 1.01, row
        if "fsdp2" in file and row["bits"] > 800e6:
            continue  # a third of the step is missing there: docs/communication.md
        assert row["model"] == pytest.approx(row["step"], rel=steps), row
        assert row["model_speed_up"] == pytest.approx(row["speed_up"], rel=speed_ups), row


@pytest.mark.parametrize("engine", MEASURED_ERROR)
def test_the_error_that_is_stated_is_the_error(engine):
    files = [file for file in ERRORS if engine in file]
    errors = [row["model"] / row["step"] - 1 for file in files for row in measured_rows(file)]
    assert (min(errors), max(errors)) == pytest.approx(MEASURED_ERROR[engine], abs=0.005)


def test_measured_speed_ups():
    """At least twice as fast where the network decides, and never slower."""
    found = [row for row in measured_rows("bench_net_ddp.json") if row["method"] != ADAMW]
    assert all(row["speed_up"] > 1.2 for row in found)
    assert all(row["speed_up"] > 2.3 for row in found if row["link_to_compute"] > 5)
