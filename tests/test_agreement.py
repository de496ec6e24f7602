"""A hang is never the answer: ranks that disagree stop with a sentence on every rank."""

import pytest
from launch import torchrun


@pytest.mark.parametrize(
    "case, words",
    [
        ("config", ["disagree on conversion with Grass", "rank=8", "rank=7"]),
        ("model", ["disagree on conversion with Grass", "model.layers.1.self_attn.q_proj"]),
        ("without", ["rank 1 of 2 has not begun conversion with Grass within 5 s"]),
        ("loop", ["disagree on the first step with Grass", "seed=0", "seed=1"]),
    ],
)
def test_every_rank_says_why_it_stops(tmp_path, case, words):
    done = torchrun(2, "disagree.py", case, str(tmp_path), timeout=120)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line[:1].isdigit())
    assert said.keys() == {"0", "1"}, done.stdout + done.stderr[-2000:]
    for word in words:
        assert word in said["0"]
        if case != "without":
            assert word in said["1"]
