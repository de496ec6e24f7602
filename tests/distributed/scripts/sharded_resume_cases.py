"""What FSDP2 must do with checkpoints; cases of sharded_cases.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from sharded_setup import SETTINGS, batch, full_state, llama, prepare, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices


def _resumed(full: bool):
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)
    model, optimizer, _ = prepare(True, target_modules="all-matrices")
    train(model, optimizer, range(4))
    state = copy.deepcopy(get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=full)))
    expected = train(model, optimizer, range(4, 9))
    again, its_optimizer, _ = prepare(True, target_modules="all-matrices")
    weights, moments = state
    set_state_dict(again, its_optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    assert its_optimizer.grass.step == 4
    assert train(again, its_optimizer, range(4, 9)) == expected
    ours, theirs = full_state(again), full_state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def resumes_from_sharded_state():
    _resumed(full=False)


def resumes_from_full_state():
    _resumed(full=True)


def goes_on_on_one_rank_and_comes_back():
    """FSDP2 state, gathered, continues in one ordinary process with the same rows; and the other way round."""
    ranks = dist.get_world_size()
    model, optimizer, _ = prepare(True, row_blocks=ranks)
    train(model, optimizer, range(4))
    options = StateDictOptions(full_state_dict=True)
    # copied as a file would: torch hands the counters of steps on by reference
    weights, moments = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    alone = llama()
    convert_to_grass(alone, GrassConfig(**SETTINGS, row_blocks=ranks))
    its_optimizer = grass_optimizer(alone, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    set_state_dict(alone, its_optimizer, model_state_dict=weights, optim_state_dict=moments)
    for ours, theirs in zip(grass_slices(alone), grass_slices(model), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.active, theirs.active.full_tensor())
        moment = optimizer.state[theirs.active]["exp_avg"].full_tensor()
        assert torch.equal(its_optimizer.state[ours.active]["exp_avg"], moment)
    back, back_optimizer, _ = prepare(True, row_blocks=ranks)
    weights, moments = copy.deepcopy(get_state_dict(alone, its_optimizer))
    set_state_dict(
        back,
        back_optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )
    expected = train(model, optimizer, range(4, 8))
    assert train(back, back_optimizer, range(4, 8)) == expected


def rows_that_do_not_fit_the_shards_start_anew():
    """State of rows chosen over the whole side, on one process: said, strided again, training goes on."""
    alone = llama()
    convert_to_grass(alone, GrassConfig(**SETTINGS))
    its_optimizer = grass_optimizer(alone, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for step in range(2):
        tokens = batch(step, ranks=0)
        alone(input_ids=tokens, labels=tokens).loss.backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    weights, moments = get_state_dict(alone, its_optimizer)
    model, optimizer, _ = prepare(True)
    said = []
    from grass_hf.optim import resume

    resume.logger.warning = lambda text, *values: said.append(text % values)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    assert any("start from evenly strided rows again" in text for text in said), said
    for slice_ in grass_slices(model):
        held = slice_.weight.full_tensor()[slice_.index]
        assert torch.equal(held, slice_.active.full_tensor())
    assert train(model, optimizer, range(2, 5))[-1] < 4.2
