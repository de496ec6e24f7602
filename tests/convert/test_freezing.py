"""Weights that are frozen after the conversion: their slices are frozen with them, and trained again with them."""

import copy
import logging

import pytest
import torch
from helpers import tiny_llama

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model

NAME = "model.layers.0.mlp.up_proj"
X = torch.arange(3, 15).view(2, 6)


def by_flag(model, flag):
    model.get_submodule(NAME).weight.requires_grad = flag


def by_method(model, flag):
    model.get_submodule(NAME).weight.requires_grad_(flag)


def by_name(model, flag):
    for name, param in model.named_parameters():
        if name == f"{NAME}.weight":
            param.requires_grad = flag


def train(model, optimizer, steps):
    for _ in range(steps):
        model(input_ids=X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def made():
    torch.manual_seed(0)
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.25, update_interval=3))
    return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("freeze", [by_flag, by_method, by_name])
@pytest.mark.parametrize("before", [0, 2])
def test_a_weight_that_is_frozen_does_not_move_until_it_is_thawed(freeze, before, caplog):
    model, optimizer = made()
    train(model, optimizer, before)
    owed = model.get_submodule(NAME).weight_slice.state.owed
    with caplog.at_level(logging.WARNING, logger="grass_hf"):
        freeze(model, False)
    assert "model.layers.*.mlp.up_proj is not trained from now on" in caplog.text
    frozen, others = model.get_submodule(NAME), model.get_submodule(NAME.replace("up", "down"))
    old, other, slice_ = frozen.weight.detach().clone(), others.weight.detach().clone(), frozen.weight_slice
    slice_.state.owed = 1.0  # what steps before owed it is due
    train(model, optimizer, 4)
    assert torch.equal(frozen.weight, old) and slice_.active.grad is None and slice_.state.owed == 1.0
    assert not torch.equal(others.weight, other) and (owed < 1.0) == (before > 0)
    kept = restore_model(copy.deepcopy(model)).get_submodule(NAME).weight
    assert torch.equal(kept, old) and not kept.requires_grad
    with caplog.at_level(logging.WARNING, logger="grass_hf"):
        freeze(model, True)
    assert "model.layers.*.mlp.up_proj is trained again" in caplog.text
    train(model, optimizer, 1)
    assert not torch.equal(frozen.weight, old) and not frozen.weight.requires_grad


def test_a_model_that_is_frozen_but_for_one_layer_trains_it_alone(caplog):
    model, optimizer = made()
    model.requires_grad_(False)
    model.get_submodule(NAME).requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{NAME}.weight"}


def test_a_copy_that_is_frozen_whole_says_nothing_and_an_optimizer_over_it_refuses(caplog):
    model, _ = made()
    reference = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, logger="grass_hf"):
        for param in reference.parameters():
            param.requires_grad = False
    assert "not trained from now on" not in caplog.text
    by_flag(model, True)
    reference = copy.deepcopy(model)
    by_flag(reference, False)
    with pytest.raises(ValueError, match=f"{NAME} was frozen after the conversion, and its slice with it"):
        grass_optimizer(reference, torch.optim.AdamW, lr=1e-2)
