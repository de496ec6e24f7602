"""Weights that are edited between steps, and optimizers and averages that come back without them."""

import copy
import logging

import pytest
import torch
from helpers import tiny_llama
from readers import Routers, tokens

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices import parted

X = torch.arange(3, 15).view(2, 6)


def made():
    torch.manual_seed(0)
    model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25, update_interval=50))
    return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.5)


def step(model, optimizer):
    model(input_ids=X, labels=X).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_weight_that_is_clipped_every_step_decays_as_ever():
    """As a critic's of a WGAN; the rows outside a slice decay late, and not never."""
    model, optimizer = made()
    slices = list(grass_slices(model))
    for _ in range(4):
        step(model, optimizer)
        for slice_ in slices:
            slice_.weight.data.clamp_(-0.03, 0.03)
    steps = {slice_: 3 if slice_.state.phase == 0 else 4 for slice_ in slices}  # the first ones have settled
    assert all(slice_.state.owed == pytest.approx((1 - 1e-2 * 0.5) ** count) for slice_, count in steps.items())
    slice_ = slices[-1]
    waiting = torch.ones(slice_.state.size, dtype=torch.bool).index_fill(0, slice_.index, False).nonzero().flatten()
    before = slice_.weight.index_select(slice_.dim, waiting)
    optimizer.grass.settle()
    after = slice_.weight.index_select(slice_.dim, waiting)
    torch.testing.assert_close(after, before * (1 - 1e-2 * 0.5) ** 4)


def test_another_weight_owes_nothing():
    model, optimizer = made()
    step(model, optimizer)
    step(model, optimizer)
    slice_ = next(slice_ for slice_ in grass_slices(model) if slice_.state.owed < 1.0)
    slice_.weight.data.copy_(torch.randn(slice_.weight.shape))
    model(input_ids=X, labels=X)
    assert slice_.state.owed == 1.0


def test_a_copy_of_the_optimizer_alone_loads_nothing():
    model, optimizer = made()
    step(model, optimizer)
    with pytest.raises(RuntimeError, match="this AdamW is a copy, and the model whose slices it drives was not copied"):
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_copies_that_were_made_before_the_first_forward_free_what_is_read():
    def make():
        model = convert_to_grass(Routers(), GrassConfig(density=0.5, selection="uniform_nr"))
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2)

    runs = [make(), copy.deepcopy(make())]
    for model, optimizer in runs:
        for _ in range(3):
            model(tokens()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.inner["b"].weight in optimizer.state and model.inner["b"].weight.requires_grad
    (model, _), (other, _) = runs
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("first", ["optimizer", "model"])
def test_a_checkpoint_with_averaged_weights_is_resumed_from_these(first, caplog):
    model, optimizer = made()
    average = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step(model, optimizer)
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 0.5)
    parted._warn_of_other_weights.cache_clear()  # it is said once
    states = {"model": average, "optimizer": copy.deepcopy(optimizer.state_dict())}
    again = dict(zip(("model", "optimizer"), made(), strict=True))
    for name in sorted(states, reverse=first == "optimizer"):
        again[name].load_state_dict(states[name])
    with caplog.at_level(logging.WARNING, logger="grass_hf"):
        step(*again.values())
    assert ("was saved with other weights than those that are here" in caplog.text) == (first == "model")
    slice_ = next(grass_slices(again["model"]))
    kept = average[f"{slice_.state.name}.weight"]
    others = torch.ones(slice_.state.size, dtype=torch.bool).index_fill(0, slice_.index, False).nonzero().flatten()
    assert torch.equal(slice_.weight.index_select(slice_.dim, others), kept.index_select(slice_.dim, others))
    moved = slice_.weight.index_select(slice_.dim, slice_.index) - kept.index_select(slice_.dim, slice_.index)
    assert 0 < float(moved.abs().max()) < 0.03  # one step from the average
    restore_model(again["model"])
