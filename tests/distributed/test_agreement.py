"""A hang is never the answer: ranks that disagree stop with a sentence on every rank."""

import pytest
from disagree import ZERO_ENGINES
from forks import ranks
from jobs import ENGINES

CASES = [
    ("config", "ddp", ["disagree on conversion with Grass", "rank=8", "rank=6"]),
    ("config", "sharded", ["disagree on conversion with Grass", "rank=8", "rank=6"]),
    ("model", "ddp", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
    ("model", "full", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
    ("without", "ddp", ["rank 1 of 2 has not begun conversion with Grass within 5 s"]),
    ("loop", "ddp", ["disagree on the first step with Grass", "seed=0", "seed=1"]),
    ("loop_without", "ddp", ["rank 1 of 2 has not begun the first step with Grass within 5 s"]),
    ("loop", "zero2", ["disagree on deepspeed.initialize with Grass", "rank=4", "rank=5"]),
    ("without", "zero3", ["rank 1 of 2 has not begun conversion with Grass within 5 s"]),
]
MORE_CASES = [
    ("config", "zero2", ["disagree on conversion with Grass", "rank=8", "rank=6"]),
    ("config", "zero3", ["disagree on conversion with Grass", "rank=8", "rank=6"]),
    ("model", "zero2", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
    ("model", "zero3", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
    ("without", "zero1", ["rank 1 of 2 has not begun conversion with Grass within 5 s"]),
    ("without", "sharded", ["rank 1 of 2 has not begun conversion with Grass within 5 s"]),
    ("loop_without", "zero2", ["rank 1 of 2 has not begun deepspeed.initialize with Grass within 5 s"]),
    ("loop", "zero3", ["disagree on deepspeed.initialize with Grass", "rank=4", "rank=5"]),
]


@pytest.mark.parametrize(
    "case, engine, words", [*CASES, *(pytest.param(*c, marks=pytest.mark.dist) for c in MORE_CASES)]
)
def test_every_rank_says_why_it_stops(tmp_path, case, engine, words):
    said = ranks(2, "disagree.start", case, str(tmp_path), environment={**ENGINES, **ZERO_ENGINES}[engine], timeout=60)
    for rank, lines in enumerate(said):
        foreign = rank == 1 and "without" in case  # it runs none of our code, and ends because its peers have
        (sentence,) = [line for line in lines.splitlines() if line.startswith("ended: " if foreign else "stopped: ")]
        assert foreign or all(word in sentence for word in words), sentence
