"""`WeightDelta` with two ranks: one speaks under DDP and ZeRO-1, each for its shard under FSDP2 and ZeRO-3."""

import pytest
from launch import torchrun

CASES = ["ddp", "fsdp2", "fsdp2_rows", "zero1", "zero3", "fsdp2_resumes", "zero_resumes", "one_rank_sends_for_all"]


@pytest.fixture(scope="module")
def two_ranks():
    """Every case in one start of two processes."""
    return torchrun(2, "delta_cases.py", "2", *CASES)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_two_ranks(two_ranks, case):
    assert f"ok {case}" in two_ranks.stdout, f"{two_ranks.stdout[-500:]}\n{two_ranks.stderr}"
