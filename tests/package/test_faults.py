"""Jobs that are killed: half-written checkpoints are refused by name, complete ones resume exactly."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from forks import Ranks, ranks
from helpers import assert_same_weights, tiny_llama, trainer
from jobs import ENGINES, DieInSave
from launch import torchrun, well
from stress import DROPOUT, stress

from grass_hf import last_complete_checkpoint
from grass_hf.integrations.checkpoints import defect

# what a resumed run does not read
NOT_READ = {"training_args.bin", "generation_config.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A complete checkpoint of every kind."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder / "one", max_steps=4, save_strategy="steps", save_steps=2).train()
    for name in ("full", "sharded"):
        ranks(2, "train", str(folder / f"{name}.pt"), str(folder / name), 2, None, environment=ENGINES[name])
    large = trainer(folder / "shards", max_steps=4, save_strategy="steps", save_steps=4)
    save = large.model.save_pretrained
    large.model.save_pretrained = lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": "20KB"})
    large.train()
    return folder


@pytest.fixture(params=["one", "full", "sharded", "shards"])
def checkpoint(request, saved, tmp_path):
    return Path(shutil.copytree(saved / request.param / "checkpoint-4", tmp_path / "run" / "checkpoint-4"))


def files(checkpoint):
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in NOT_READ]


def test_a_whole_checkpoint_has_no_defect(checkpoint):
    assert defect(checkpoint) is None
    assert last_complete_checkpoint(checkpoint.parent) == str(checkpoint)
    assert len(files(checkpoint)) >= 6


def test_every_file_that_is_cut_off_is_named(checkpoint):
    for path in files(checkpoint):
        content = path.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - (2 if path.suffix == ".json" else 1)):  # a last newline
            path.write_bytes(content[:length])
            found = defect(checkpoint)
            assert found is not None and found.startswith(str(path)), (path.name, length, found)
            assert last_complete_checkpoint(checkpoint.parent) is None
        path.write_bytes(content)
    assert defect(checkpoint) is None


def test_every_file_that_is_missing_is_named(checkpoint):
    needless = {"config.json", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    if (checkpoint / "optimizer.bin").exists():
        needless.add("model.safetensors")  # FSDP resumes from its own
    for path in files(checkpoint):
        path.rename(checkpoint.parent / "aside")
        found = defect(checkpoint)
        assert found is None if path.name in needless else found.startswith(f"{path} is missing"), (path.name, found)
        (checkpoint.parent / "aside").rename(path)


def test_whatever_the_moment_of_the_kill_in_a_save(checkpoint):
    """The files before it whole, one cut off, none after it."""
    order = sorted(files(checkpoint), key=lambda path: path.stat().st_mtime_ns)
    contents = {path: path.read_bytes() for path in order}
    for path in order:
        path.unlink()
    for path in order[:-1]:
        path.write_bytes(contents[path][: len(contents[path]) // 2])
        assert defect(checkpoint) is not None
        path.write_bytes(contents[path])
        assert defect(checkpoint) is not None
    order[-1].write_bytes(contents[order[-1]])
    assert order[-1].name == "trainer_state.json" and defect(checkpoint) is None


def refusal(tmp_path, resume, folder="again"):
    """The sentence with which the Trainer stops, before it has loaded or written anything."""
    job = trainer(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        job.train(resume_from_checkpoint=resume)
    assert sorted(tmp_path.rglob("*")) == before
    assert_same_weights(job.model, tiny_llama())
    return str(error.value)


def test_the_trainer_refuses_by_name_and_says_what_to_resume_from(saved, tmp_path, caplog):
    run = Path(shutil.copytree(saved / "one", tmp_path / "run"))
    cut = run / "checkpoint-4" / "optimizer.pt"
    os.truncate(cut, cut.stat().st_size - 1)
    said = refusal(tmp_path, str(run / "checkpoint-4"))
    assert said.startswith(f"{cut} is truncated")
    assert said.endswith(f"resume from {run / 'checkpoint-2'}, the last complete one.")
    (run / "checkpoint-2" / "model.safetensors").unlink()
    said = refusal(tmp_path, str(run / "checkpoint-4"))
    assert said.endswith("no other is complete beside it, start anew.")
    said = refusal(tmp_path, True, "run")
    assert said.startswith(f"{cut} is truncated") and "no other checkpoint" in said
    assert "is no folder" in refusal(tmp_path, str(run / "checkpoint-9"))


def test_the_last_checkpoint_is_the_last_complete_one(saved, tmp_path, caplog):
    import logging

    logging.getLogger("grass_hf.integrations.checkpoints").addHandler(caplog.handler)
    run = Path(shutil.copytree(saved / "one", tmp_path / "run"))
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    job = trainer(run, max_steps=4, save_strategy="steps", save_steps=2)
    job.train(resume_from_checkpoint=True)
    assert f"resuming from {run / 'checkpoint-2'}, the last complete checkpoint" in caplog.text
    assert f"{run / 'checkpoint-4' / 'trainer_state.json'} is missing" in caplog.text
    whole = torch.load(saved / "one" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    ours = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert defect(run / "checkpoint-4") is None  # written anew
    for key, state in whole["state"].items():
        assert all(torch.equal(ours["state"][key][name], value) for name, value in state.items())


def test_saving_over_a_complete_checkpoint_makes_it_incomplete_first(saved, tmp_path, monkeypatch):
    run = Path(shutil.copytree(saved / "one", tmp_path / "run"))
    job = trainer(run, max_steps=4, save_strategy="steps", save_steps=2)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        job.train()
    assert "trainer_state.json is missing" in defect(run / "checkpoint-2")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_runs_without_grass_are_left_alone(saved, tmp_path):
    run = Path(shutil.copytree(saved / "one", tmp_path / "run"))
    (run / "checkpoint-4" / "scheduler.pt").unlink()  # the Trainer then starts the optimizer anew, silently
    job = trainer(run, optim="adamw_torch", optim_args=None, max_steps=5)
    job.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert job.state.global_step == 5


def test_deepspeeds_checkpoints_are_checked_and_resume_on_deepspeed_alone(saved, tmp_path):
    """Written as DeepSpeed lays its files out; its own are in test_zero.py."""
    checkpoint = Path(shutil.copytree(saved / "one" / "checkpoint-4", tmp_path / "run" / "checkpoint-4"))
    (checkpoint / "global_step4").mkdir()
    states = checkpoint / "global_step4" / "mp_rank_00_model_states.pt"
    (checkpoint / "optimizer.pt").rename(states)
    assert defect(checkpoint) == (
        f"{checkpoint / 'latest'} is missing, which is written last: the job was stopped while it saved"
    )
    (checkpoint / "latest").write_text("global_step4")
    assert defect(checkpoint) is None
    assert "was saved by DeepSpeed, and this run is without it" in refusal(tmp_path, str(checkpoint))
    os.truncate(states, 1000)
    assert defect(checkpoint).startswith(f"{states} is truncated")


@pytest.mark.parametrize("name, rank", [("optimizer.pt", 0), ("rng_state_1.pth", 1)])
def test_a_rank_killed_while_it_writes_a_file(tmp_path, name, rank):
    """Whichever rank it is, the checkpoint is not complete, and the last one that is resumes exactly."""
    whole, folder = tmp_path / "whole.pt", str(tmp_path / "run")
    ranks(2, "train", str(whole), str(tmp_path / "whole"), 2, None, {"save_steps": 2}, DROPOUT)
    job = Ranks(2, "train", "", folder, 2, None, {"save_steps": 2}, DROPOUT, (DieInSave(rank, 6, name),))
    while job.running():
        pass
    assert job.processes[rank].exitcode == -9
    job.end()
    assert (tmp_path / "run" / "checkpoint-6" / name).exists()
    found = defect(tmp_path / "run" / "checkpoint-6")
    assert "trainer_state.json is missing" in found
    assert last_complete_checkpoint(folder) == str(tmp_path / "run" / "checkpoint-4")
    file = tmp_path / "resumed.pt"
    said = ranks(2, "train", str(file), folder, 2, True, {"save_steps": 2}, DROPOUT)
    assert "the last complete checkpoint" in said[0]
    assert_same_outcome(torch.load(file), torch.load(whole), 4)


def assert_same_outcome(ours, theirs, step):
    assert ours["from"] == step
    assert ours["losses"] == theirs["losses"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], weight), name


@pytest.mark.dist
@pytest.mark.parametrize("engine", ENGINES)
def test_stress_in_short(tmp_path, engine):
    report = stress(3, engine, tmp_path, seed=1)
    assert report["kills"] == 3 and report["runs_equal"] >= 1


@pytest.mark.dist
def test_torchrun_restarts_and_resumes(tmp_path):
    """Two deaths, one in a save: the group starts again by itself, and the weights are those of an undisturbed run."""
    whole = tmp_path / "whole.pt"
    ranks(2, "train", str(whole), str(tmp_path / "whole"), 2, None, {"save_steps": 2}, DROPOUT)
    file = tmp_path / "restarted.pt"
    # else torch 2.13 keeps its store over restarts, and workers may connect to the addresses of dead ones
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    arguments = ("elastic.py", str(file), str(tmp_path / "run"))
    done = well(torchrun(2, *arguments, options=["--max-restarts=2"], **environment))
    assert [line for line in done.stdout.splitlines() if line.startswith("life")] == ["life 0", "life 1", "life 2"]
    assert_same_outcome(torch.load(file), torch.load(whole), 6)
