"""Estimates of one rank of several, against real runs of two ranks and against sums of sizes; `bench memory`."""

import dataclasses
import json

import pytest
import torch
from helpers import tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode

from grass_hf import GrassConfig, estimate_memory
from grass_hf.measure.bench import memory as bench
from grass_hf.measure.bench.memory import Case, Comparison
from grass_hf.measure.estimate.zero_sizes import BUCKET_ELEMENTS

SMALL = Case("", hidden=128, layers=3, vocabulary=300, sequence=48, ranks=2, dtype="bfloat16")
CASES = {
    "FSDP2, all matrices": dataclasses.replace(SMALL, grass={"target_modules": "all-matrices"}),
    "FSDP2, columns": dataclasses.replace(SMALL, dtype="float32", checkpointing=True, grass={"side": "input"}),
    "DDP, float32 slices": dataclasses.replace(SMALL, engine="ddp"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_real_ranks_hold_what_is_estimated(case):
    estimate = bench.estimate(case)
    assert estimate.peak == pytest.approx(bench.launch(case, "counted", "cpu"), rel=0.001)
    whole = bench.estimate(dataclasses.replace(case, ranks=1)).step
    held = {"ddp": whole.weights, "fsdp2": whole.weights / 2}[case.engine]
    assert estimate.step.weights == pytest.approx(held, rel=0.01)
    assert estimate.step.communication > 0 == whole.communication


def test_the_counter_sees_memory_and_nothing_else():
    counter = bench.PlainCounter()
    with counter:
        held = torch.zeros(100)
        with FakeTensorMode():
            torch.zeros(1000)
        torch.zeros(1000, device="meta")
    assert counter.peak == held.nbytes


def test_many_ranks_are_simulated_as_two_are():
    def rank(count, engine, **options):
        return estimate_memory(
            tiny_llama, GrassConfig(rank=16), world_size=count, engine=engine, sequence=16, **options
        )

    two, many = rank(2, "fsdp2").step, rank(16, "fsdp2").step
    assert many.optimizer_state < two.optimizer_state / 6
    assert many.weights < two.weights / 6
    assert rank(100, "ddp").step.total == rank(2, "ddp").step.total > rank(1, "ddp").step.total
    full = rank(2, "ddp", method="adamw").step
    trained = sum(p.nbytes for p in tiny_llama().parameters())
    assert full.communication == trained  # DDP's buckets
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "stage, dtype, size", [(1, "bfloat16", 2), (2, "bfloat16", 2), (3, "bfloat16", 2), (3, "float32", 4)]
)
def test_zero_is_what_its_partitions_sum_to(stage, dtype, size):
    """DeepSpeed's own arithmetic, for AdamW over everything: see grass_hf/measure/estimate/zero_sizes.py."""
    found = estimate_memory(tiny_llama, method="adamw", dtype=dtype, sequence=16, world_size=4, engine=f"zero{stage}")
    elements = sum(p.numel() for p in tiny_llama().parameters())
    own = -(-elements // 4)
    master = 0 if stage == 3 and size == 4 else 4
    assert found.computed and found.observing is None
    assert found.step.optimizer_state == own * (8 + master)
    assert found.step.gradients == size * (elements if stage == 1 else own)
    assert found.step.weights == pytest.approx(size * (own if stage == 3 else elements), rel=0.01)
    gathered = elements if stage == 3 else 0
    assert found.step.communication == size * (BUCKET_ELEMENTS + gathered)
    one = estimate_memory(tiny_llama, method="adamw", dtype=dtype, sequence=16).step
    assert found.step.activations + found.step.logits >= one.activations + one.logits


def test_zero_splits_what_grass_trains():
    def rank(stage):
        return estimate_memory(tiny_llama, GrassConfig(rank=16), sequence=16, world_size=4, engine=f"zero{stage}").step

    one = estimate_memory(tiny_llama, GrassConfig(rank=16), sequence=16).step
    assert rank(1).weights == one.weights and rank(1).slices == one.slices
    assert rank(3).weights == -(-one.weights // 4)
    assert rank(2).gradients == pytest.approx(rank(1).gradients / 4, abs=4)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"world_size": 0}, "world_size=0 is not a positive whole number"),
        ({"world_size": 2, "engine": "fsdp3"}, "did you mean fsdp2"),
        ({"world_size": 2, "engine": "fsdp2", "method": "galore"}, "is not estimated under fsdp2"),
        ({"world_size": 2, "engine": "fsdp2", "config": GrassConfig(rank=8, resident=False)}, "does not go with fsdp2"),
    ],
)
def test_mistakes_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimate_memory(tiny_llama, sequence=16, **options)


def test_a_process_of_several_is_told_to_estimate_before(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"estimate before torch\.distributed is initialised"):
        estimate_memory(tiny_llama, sequence=16, world_size=2)


def test_command_shows_one_rank(command, tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    words = ["--sequence", "16", "--world-size", "2", "--engine", "fsdp2", "--json", tmp_path / "row.json"]
    code, out, err = command("estimate", tmp_path, *words)
    assert code == 0, err
    assert "one of 2 ranks under fsdp2" in " ".join(out.split()) and "communication" in out  # the title may wrap
    assert json.loads((tmp_path / "row.json").read_text())["setting"]["engine"] == "fsdp2"


def test_bench_compares_three_figures(command, monkeypatch, tmp_path):
    asked = []

    def compare(case, device):
        asked.append((case.name, device))
        return Comparison(case, 1000, 1005, 1040 if len(asked) < 3 else 1060)

    monkeypatch.setattr(bench, "compare", compare)
    file = tmp_path / "rows.jsonl"
    code, out, err = command("bench", "memory", "--cases", "1,6", "--device", "cpu", "--json", file)
    assert code == 0 and "-3.85%" in out and "-0.498%" in out, err
    assert asked == [(bench.CASES[0].name, "cpu"), (bench.CASES[5].name, "cpu")]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["resident"] for row in rows] == [1040, 1040] and rows[1]["case"]["ranks"] == 2
    code, _, err = command("bench", "memory", "--cases", "2", "--device", "cpu")
    assert code == 2 and "off by more than 1% of the counted or 5% of the resident bytes" in err.replace("\n", " ")


@pytest.mark.parametrize("cases", ["7", "x", "1;2"])
def test_bench_refuses_with_a_sentence(command, cases):
    code, _, err = command("bench", "memory", "--cases", cases)
    assert code == 2 and f"--cases '{cases}' names no cases: give numbers of 1 to 6" in err


@pytest.mark.slow
def test_bench_holds_on_this_machine(command):
    """One case with gigabytes of nothing else; resident memory is noisy beside other work."""
    code, out, err = command("bench", "memory", "--cases", "4", "--device", "cpu")
    assert code == 0, out + err
