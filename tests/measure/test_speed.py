"""What `grass-hf bench speed` counts: which steps select or project, and which do not."""

import dataclasses
from collections import Counter
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grass_hf import MuonAdamW
from grass_hf.measure.bench import host, speed
from grass_hf.optim.driving import plain_class

THREADS = torch.get_num_threads()
SMALL = {"layers": 1, "hidden": 64, "vocabulary": 64, "batch": 1, "sequence": 8, "rank": 16, "rounds": 3}
# What is called when a method selects or projects anew: the owner of a function, and its name.
CALLED = {
    "grass": (import_module("grass_hf.optim.reselection"), "_rows"),
    "galore": (import_module("galore_torch.galore_projector").GaLoreProjector, "get_orthogonal_matrix"),
    "apollo": (import_module("apollo_torch.random_projector").GradientProjector, "get_orthogonal_matrix"),
}


@pytest.mark.parametrize("method", CALLED)
def test_only_the_first_step_and_the_one_after_all_rounds_select_or_project(method, monkeypatch):
    calls, (owner, name) = [], CALLED[method]
    original = getattr(owner, name)

    def counted(*args, **more):
        calls.append(name)
        return original(*args, **more)

    monkeypatch.setattr(owner, name, counted)
    setting = speed.Setting(**SMALL)
    run, before, found = speed._Run(method, setting, torch.float32, "cpu"), 0, []
    for number in range(setting.gap + 2):
        run.step()
        if len(calls) > before:
            found.append(number)
        before = len(calls)
    assert found == [0, setting.gap]


def test_methods_take_turns_and_every_round_is_counted():
    setting = speed.Setting(**SMALL, methods=("adamw", "grass", "lora"))
    *numbers, timing = speed.measure(setting, torch.float32, "cpu")
    assert numbers == list(range(1, setting.gap + 1))
    assert {method: len(times) for method, times in timing.seconds.items()} == dict.fromkeys(setting.methods, 3)
    assert set(timing.reselecting) == {"grass"} and not timing.peaks


@pytest.mark.parametrize("base, cls", [("adamw_torch_fused", torch.optim.AdamW), ("muon", MuonAdamW)])
def test_grass_runs_over_the_base_that_is_named(base, cls):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    _, optimizer = speed._make_ready("grass", model, speed.Setting(**SMALL, base=base))
    assert plain_class(optimizer) is cls and optimizer.defaults["fused"] and optimizer.defaults["lr"] == 1e-4


@pytest.mark.parametrize("count", range(2, 8))
def test_each_method_comes_after_each_other_one_equally_often(count):
    methods = tuple("abcdefgh"[:count])
    orders = speed.orders(methods)
    assert all(sorted(order) == list(methods) for order in orders)
    after = Counter(pair for order in orders for pair in pairwise(order))
    assert set(after.values()) == {2} and len(after) == count * (count - 1)


def test_small_steps_are_timed_and_counted_case_by_case(monkeypatch):
    small = dataclasses.replace(host._SETTING, layers=1)
    monkeypatch.setattr(host, "_SETTING", small)
    *numbers, found = host.measure(2, torch.float32, "cpu")
    assert numbers[-1] == 2 and list(found) == list(host.CASES)
    assert all(len(each.seconds) == 2 for each in found.values())
    counts = {name: each.operations for name, each in found.items()}
    # Grass launches the products of the frozen limit and its slices' own, and what it observes with when it does
    assert counts["frozen"] < counts["grass"] < counts["grass, observing"]
    assert counts["grass"] != counts["grass, output side"] and counts["grass"] < counts["lora"]
    assert torch.get_num_threads() == THREADS
