"""What ZeRO must do with checkpoints; cases of zero_cases.py."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from helpers import tiny_llama
from zero_setup import train, weights, zero

import grass_hf  # noqa: F401  (before DeepSpeed, which it teaches)
from grass_hf.convert.conversion import grass_slices


def resumes_exactly():
    for stage in (1, 2, 3):
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        settings = {"selection": "multinomial_norm", "target_modules": "all-matrices"}
        more = [{"bfloat16": True, "gradients": "fp32"}] if stage == 1 else []
        for options in ({}, {"bfloat16": True}, *more):

            def build(dtype=torch.bfloat16 if options else torch.float32):
                return tiny_llama().to(dtype)

            engine = zero(stage, options, build=build, **settings)
            train(engine, range(5))
            # weights that slices train are frozen: adapters are saved without frozen ones
            engine.save_checkpoint(folder[0], client_state={"mine": 7}, exclude_frozen_parameters=not options)
            expected = train(engine, range(5, 9))
            again = zero(stage, options, build=build, **settings)
            _, client_state = again.load_checkpoint(folder[0])
            assert client_state["mine"] == 7 and again.optimizer.grass.step == 5
            assert train(again, range(5, 9)) == expected
            ours, theirs = weights(again.module), weights(engine.module)
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
            for a, b in zip(grass_slices(again.module), grass_slices(engine.module), strict=True):
                assert torch.equal(a.index, b.index) and a.state.owed == b.state.owed
                assert torch.equal(a.state.trained, b.state.trained)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])


def incomplete_checkpoints_are_refused():
    """By name, on every rank, before anything is read."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    engine = zero(2)
    train(engine, range(2))
    engine.save_checkpoint(folder[0])
    before = weights(engine.module)
    files = [*sorted(Path(folder[0]).rglob("*.pt")), Path(folder[0]) / "latest"]
    assert len(files) == dist.get_world_size() + 2
    for file in files:
        for keep in (None, 0.5):
            dist.barrier()
            content = file.read_bytes()
            dist.barrier()
            if dist.get_rank() == 0:
                file.unlink()
                if keep and file.suffix:
                    file.write_bytes(content[: int(keep * len(content))])
            dist.barrier()
            try:
                engine.load_checkpoint(folder[0])
            except ValueError as error:
                assert file.name in str(error), error
                assert ("truncated" if keep and file.suffix else "missing") in str(error), error
            else:
                raise AssertionError(file)
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(content)
    type(engine).save_checkpoint(engine, folder[0], tag="without")
    try:
        engine.load_checkpoint(folder[0], tag="without")
    except ValueError as error:
        assert "was not written by a Grass run" in str(error)
    else:
        raise AssertionError("loaded what Grass did not write")
    assert all(torch.equal(value, before[name]) for name, value in weights(engine.module).items())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def another_base_is_refused():
    """And other settings of it, before DeepSpeed has loaded anything."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    for stage in (1, 2, 3):
        engine = zero(stage)
        train(engine, range(2))
        engine.save_checkpoint(folder[0], tag=f"stage{stage}")
        for words, given in (
            ("is that of torch.optim.adamw.AdamW, and this run has torch.optim.sgd.SGD", {"base": torch.optim.SGD}),
            ("resuming with betas=(0.9, 0.95)", {"arguments": {"betas": (0.9, 0.95)}}),
        ):
            other = zero(stage, **given)
            before = weights(other.module)
            masters = [flat.values.clone() for flat in other.optimizer.grass._place.values()]
            try:
                other.load_checkpoint(folder[0], tag=f"stage{stage}")
            except ValueError as error:
                assert words in str(error), error
            else:
                raise AssertionError(given)
            assert all(torch.equal(value, before[name]) for name, value in weights(other.module).items())
            after = [flat.values for flat in other.optimizer.grass._place.values()]
            assert all(map(torch.equal, masters, after)) and other.optimizer.grass.step == 0
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
