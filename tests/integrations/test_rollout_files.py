"""Synchronisations as files: in order, complete and of the same run, or refused by name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from test_weight_delta import Run

from grass_hf import WeightDelta
from grass_hf.cli.adapters import run_delta_apply
from grass_hf.integrations.rollouts.files import SyncWriter, read_folder
from grass_hf.integrations.rollouts.replica import Replica
from grass_hf.slices.ops.bits import as_bits


class Written(Run):
    """A trainer that writes its synchronisations, and a replica that starts with other weights."""

    def __init__(self, folder, *args, **settings):
        super().__init__(*args, **settings)
        self.folder = folder / "sync"
        self.writer = SyncWriter(self.delta, self.folder)
        self.replica = {name: torch.zeros_like(tensor) for name, tensor in self.model.state_dict().items()}
        self.reader = Replica(self.folder)

    def write(self, steps=1, **how):
        self.step(steps)
        return self.writer.write(**how)


def test_a_replica_follows_files(tmp_path):
    run = Written(tmp_path, weight_decay=0.0, target_modules="all-matrices")
    sizes = []
    for steps in (1, 1, 3, 1):
        run.write(steps)
        sizes.append(run.writer.nbytes)
        assert run.reader.catch_up(run.replica) == 1
        run.check()
    assert [files[0].is_anchor for files in read_folder(run.folder)] == [True, False, False, False]
    assert run.reader.sequence == 4 and run.reader.step == 6
    assert sizes[3] < sizes[0]
    assert not list(run.folder.glob(".*")), "no partial file is left"


def test_a_new_replica_begins_with_the_newest_anchor(tmp_path):
    run = Written(tmp_path)
    for full in (False, False, True, False):
        run.write(full=full)
    assert run.reader.catch_up(run.replica) == 2
    run.check()
    assert Replica(tmp_path).catch_up(run.replica) == 0


def test_columns_take_fewer_bytes_where_most_elements_changed(tmp_path):
    run = Written(tmp_path, weight_decay=0.0, lr=1e-2, dtype=torch.float32)
    run.write()
    run.write()
    [last] = read_folder(run.folder)[-1]
    assert {patch.kind for patch in last.patches()} == {"columns", "run"}
    run.reader.catch_up(run.replica)
    run.check()


@pytest.mark.parametrize("fault", ["gone", "damaged", "cut", "swapped", "other model"])
def test_what_is_refused(tmp_path, fault):
    run = Written(tmp_path, weight_decay=0.0)
    run.write()
    run.reader.catch_up(run.replica)
    paths = [run.write() for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in run.replica.items()}
    replica, named = run.replica, paths[0].name
    if fault == "gone":
        paths[0].unlink()
        named = paths[1].name
    elif fault == "damaged":
        content = bytearray(paths[0].read_bytes())
        content[-3] ^= 1
        paths[0].write_bytes(content)
    elif fault == "cut":
        paths[0].write_bytes(paths[0].read_bytes()[:-5])
    elif fault == "swapped":
        one, two = (path.read_bytes() for path in paths)
        paths[0].write_bytes(two), paths[1].write_bytes(one)
    else:
        replica = {name: tensor.float() for name, tensor in run.replica.items()}
        before = {name: tensor.clone() for name, tensor in replica.items()}
    with pytest.raises(ValueError, match=named):
        run.reader.catch_up(replica)
    for name, tensor in replica.items():
        assert torch.equal(as_bits(tensor), as_bits(before[name])), "nothing was written"


def test_a_trainer_that_resumes_goes_on_or_writes_an_anchor(tmp_path):
    run = Written(tmp_path)
    run.write()
    model, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    saved = {name: tensor.clone() for name, tensor in model.items()}
    for ahead in (False, True):  # with the replica where the state was saved, and ahead of it
        fresh = Written(tmp_path)
        fresh.delta.close()
        fresh.model.load_state_dict(saved)
        fresh.optimizer.load_state_dict(optimizer)
        fresh.delta = WeightDelta(fresh.model, fresh.optimizer)
        fresh.writer = SyncWriter(fresh.delta, fresh.folder)
        fresh.write()
        assert read_folder(run.folder)[-1][0].is_anchor is ahead
        run.reader.catch_up(fresh.replica)
        run.replica = fresh.replica
        if not ahead:
            fresh.replica = dict(fresh.replica)
    fresh.check()


def test_delta_apply_reads_a_folder(tmp_path):
    run = Written(tmp_path, lambda: tiny_llama(tie_word_embeddings=True))
    run.model.save_pretrained(tmp_path / "base")
    run.write()
    run.write(4)
    run_delta_apply(str(tmp_path / "base"), str(run.folder), output=tmp_path / "out", back=False, overwrite=False)
    loaded = type(run.model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    run.replica = loaded.state_dict()
    run.check()
    with pytest.raises(ValueError, match="lead forward only"):
        run_delta_apply(str(tmp_path / "base"), str(run.folder), output=tmp_path / "b", back=True, overwrite=False)
    command = [sys.executable, "-m", "grass_hf", "delta", "apply", "--help"]
    assert "synchronisations" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    monkeypatch.chdir(tmp_path)
    held = {}
    exec(page.split("```python")[1].split("```")[0], held)
    for name, tensor in held["model"].state_dict().items():
        assert torch.equal(held["engine"].state_dict()[name], tensor), name
