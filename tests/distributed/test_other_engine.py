"""A checkpoint goes on on another engine and another number of ranks: the same rows, or a stated new start."""

import pytest
import torch
from forks import ranks
from jobs import ENGINES, HYBRID

ROWS = "density=0.5,update_interval=3,side=output,base=adamw_torch,score_by=sequence"
ALIGNED = ROWS + ",row_blocks=2"
KINDS = {"ddp": "plain", "full": "full", "sharded": "sharded"}
COLUMNS = ROWS.replace("output", "input") + ",target_modules=all-matrices"


def run(tmp_path, name, engine, count, resume=None, optim_args=ALIGNED, **options):
    """The outcome of `jobs.train`, and all that the ranks said."""
    file = tmp_path / f"{name}.pt"
    arguments = (str(file), str(tmp_path / name), count, resume, {"optim_args": optim_args, **options})
    engine, _, hybrid = engine.partition("-")
    environment = {**ENGINES[engine], **(HYBRID if hybrid else {})}
    said = ranks(count, "train", *arguments, environment=environment)
    return torch.load(file), "".join(said)


def assert_goes_on(resumed, whole, step, atol=1e-6):
    """From `step` on the same rows and losses, and the same weights at the end."""
    assert resumed["from"] == step
    for number in range(step, 8):
        same = [torch.equal(*pair) for pair in zip(resumed["rows"][number], whole["rows"][number], strict=True)]
        assert all(same), f"step {number}: other rows"
    ours, theirs = ([run["losses"][number] for number in range(step + 1, 9)] for run in (resumed, whole))
    assert ours == pytest.approx(theirs, abs=atol)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=10 * atol, msg=name)


def assert_pairs_go_on(tmp_path, pairs, optim_args):
    saving = sorted({saved for saved, _ in pairs})
    whole = {engine: run(tmp_path, engine, engine, 2, optim_args=optim_args)[0] for engine in saving}
    for engine in saving:
        assert_goes_on(whole[engine], whole[saving[0]], 0)
    for saved, runs in pairs:
        checkpoint = str(tmp_path / saved / "checkpoint-4")
        resumed, said = run(tmp_path, f"{saved}-{runs}", runs, 2, checkpoint, optim_args)
        assert_goes_on(resumed, whole[saved], 4)
        assert f"holds {KINDS[saved]} state and is resumed with {KINDS[runs]} state" in said
        assert "start from evenly strided" not in said


def test_ddp_and_shards_go_on_from_each_other(tmp_path):
    assert_pairs_go_on(tmp_path, [("ddp", "sharded"), ("sharded", "ddp")], ALIGNED)


@pytest.mark.dist
@pytest.mark.parametrize("optim_args", [ALIGNED, COLUMNS], ids=["rows", "columns"])
def test_every_engine_goes_on_from_every_other(tmp_path, optim_args):
    pairs = [(saved, runs) for saved in ENGINES for runs in ENGINES if saved != runs]
    assert_pairs_go_on(tmp_path, pairs, optim_args)


def test_from_shards_to_one_process_and_back(tmp_path):
    whole, _ = run(tmp_path, "sharded", "sharded", 2, save_steps=2)
    one, said = run(tmp_path, "one", "ddp", 1, str(tmp_path / "sharded" / "checkpoint-4"), save_steps=2)
    assert "was saved by 2 rank(s) and goes on on 1" in said
    assert_goes_on(one, whole, 4)
    back, said = run(tmp_path, "back", "sharded", 2, str(tmp_path / "one" / "checkpoint-6"), save_steps=2)
    assert "was saved by 1 rank(s) and goes on on 2" in said
    assert_goes_on(back, whole, 6)


def test_rows_that_do_not_fit_start_anew_and_it_is_said(tmp_path):
    """Chosen among all rows on one process, they do not lie evenly in two shards."""
    run(tmp_path, "one", "ddp", 1, optim_args=ROWS)
    resumed, said = run(tmp_path, "two", "sharded", 2, str(tmp_path / "one" / "checkpoint-4"), ROWS)
    assert "start from evenly strided rows again" in said and "row_blocks=2 before saving keeps them" in said
    assert "row_blocks=2 (was 1)" in said
    assert resumed["from"] == 4 and resumed["losses"][8] < resumed["losses"][1] - 0.5
    kept, said = run(tmp_path, "ddp", "ddp", 2, str(tmp_path / "one" / "checkpoint-4"), ROWS)
    assert "evenly strided" not in said and kept["from"] == 4
    assert_goes_on(kept, torch.load(tmp_path / "one.pt"), 4)


@pytest.mark.dist
@pytest.mark.parametrize("optim_args", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_hybrid_shards_train_as_ddp_and_resume(tmp_path, form, optim_args):
    """HSDP through accelerate (dp_replicate_size, dp_shard_size): rows by as many blocks as shards, not as ranks."""
    hybrid = f"{form}-hybrid"
    whole, _ = run(tmp_path, "whole", hybrid, 4, optim_args=optim_args)
    blocks = "" if optim_args == COLUMNS else ",row_blocks=2"
    same, _ = run(tmp_path, "ddp", "ddp", 4, optim_args=optim_args + blocks)
    assert_goes_on(whole, same, 0)
    resumed, _ = run(tmp_path, "resumed", hybrid, 4, str(tmp_path / "whole" / "checkpoint-4"), optim_args)
    assert_goes_on(resumed, whole, 4, atol=0)
    one, said = run(tmp_path, "one", "ddp", 1, str(tmp_path / "whole" / "checkpoint-4"), optim_args + blocks)
    assert "was saved by 4 rank(s) and goes on on 1" in said
    assert_goes_on(one, whole, 4)
    back, _ = run(tmp_path, "back", hybrid, 4, str(tmp_path / "ddp" / "checkpoint-4"), optim_args)
    assert_goes_on(back, same, 4)


@pytest.mark.dist
@pytest.mark.parametrize(
    "engines", [["sharded", "sharded", "ddp"], ["sharded", "ddp", "ddp"], ["full", "sharded", "full"]]
)
def test_from_eight_ranks_to_four_to_one(tmp_path, engines):
    optim_args = ROWS + ",row_blocks=8"
    whole, _ = run(tmp_path, "0", engines[0], 8, optim_args=optim_args, save_steps=2)
    start = str(tmp_path / "0" / "checkpoint-2")
    for number, (engine, count) in enumerate(zip(engines[1:], (4, 2 if engines[2] == "full" else 1), strict=True), 1):
        resumed, said = run(tmp_path, str(number), engine, count, start, optim_args, save_steps=2)
        assert_goes_on(resumed, whole, 2 * number)
        assert f"and goes on on {count}" in said and "evenly strided" not in said
        start = str(tmp_path / str(number) / f"checkpoint-{2 * number + 2}")
