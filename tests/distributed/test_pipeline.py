"""torch.distributed.pipelining: every stage is a model of its own, and together they are one process's run."""

import pytest
import torch
from forks import ranks
from pipelines import alone


def assert_is_the_run_of_one(tmp_path, count, schedule, engine, **settings):
    ranks(count, "pipelines.train", str(tmp_path), count, schedule, engine, settings)
    one, stages = alone(**settings), [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    assert stages[1]["losses"] == pytest.approx(one["losses"], abs=1e-12)
    assert one["losses"][-1] < one["losses"][0] - 0.1
    for number, stage in enumerate(stages):
        for ours, both in zip(stage["rows"], one["rows"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, both[number], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(stage["rows"][0], stage["rows"][-1], strict=True))
        assert stage["weights"].keys() == one["weights"][number].keys()
        for name, weight in one["weights"][number].items():
            torch.testing.assert_close(stage["weights"][name], weight, rtol=0, atol=1e-9, msg=name)


def test_two_stages_are_one_process(tmp_path):
    assert_is_the_run_of_one(tmp_path, 2, "gpipe", "none")


@pytest.mark.dist
@pytest.mark.parametrize(
    "count, schedule, engine, settings",
    [
        (2, "1f1b", "none", {"side": "input"}),
        (4, "gpipe", "fsdp", {"side": "input"}),
        (4, "1f1b", "fsdp", {"row_blocks": 2}),
    ],
)
def test_other_schedules_and_sharded_stages_are_one_process(tmp_path, count, schedule, engine, settings):
    assert_is_the_run_of_one(tmp_path, count, schedule, engine, **settings)


@pytest.mark.parametrize(
    "case, words",
    [
        ("unnamed", ["is stage {rank} of a pipeline", "replicas=mesh['dp'].get_group()", "or use FSDP2"]),
        ("zero_bubble", ["no norms of gradients were observed at optimizer step 0", "ScheduleGPipe or Schedule1F1B"]),
        ("traced", ["torch.export has traced", "give PipelineStage converted"]),
    ],
)
def test_what_cannot_be_told_apart_stops_with_a_sentence(case, words):
    for rank, said in enumerate(ranks(2, "pipelines.stop", case)):
        stopped = [line for line in said.splitlines() if line.startswith("stopped: ")]
        if case == "zero_bubble" and rank == 0:  # the first stage has no inputs' gradients to hurry for
            assert not stopped
            continue
        (sentence,) = stopped
        assert all(word.format(rank=rank) in sentence for word in words), sentence
        assert "same True" in said or case == "zero_bubble"
