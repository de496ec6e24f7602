"""A hang is never the answer: ranks that disagree stop with a sentence on every rank."""

import pytest
from forks import ranks
from jobs import ENGINES


@pytest.mark.parametrize(
    "case, engine, words",
    [
        ("config", "ddp", ["disagree on conversion with Grass", "rank=8", "rank=6"]),
        ("config", "sharded", ["disagree on conversion with Grass", "rank=8", "rank=6"]),
        ("model", "ddp", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
        ("model", "full", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
        ("without", "ddp", ["rank 1 of 2 has not begun conversion with Grass within 5 s"]),
        ("loop", "ddp", ["disagree on the first step with Grass", "seed=0", "seed=1"]),
        ("loop_without", "ddp", ["rank 1 of 2 has not begun the first step with Grass within 5 s"]),
    ],
)
def test_every_rank_says_why_it_stops(tmp_path, case, engine, words):
    said = ranks(2, "disagree.start", case, str(tmp_path), environment=ENGINES[engine])
    for rank, lines in enumerate(said):
        stopped = [line for line in lines.splitlines() if line.startswith("stopped: ")]
        if rank == 1 and "without" in case:  # it does not take part, and so cannot know
            assert all("rank 1 trains without Grass" in line for line in stopped)
            continue
        (sentence,) = stopped
        assert all(word in sentence for word in words), sentence
