"""Averages of parameters by hand, as people write them, put in place for an evaluation: right, or one sentence."""

import copy
import logging

import pytest
import torch
from test_drift import X, driven, step

from grass_hf.convert.conversion import grass_slices


class Average:
    """An average of parameters: all of them, or those with requires_grad while others are copied (diffusers' way)."""

    def __init__(self, parameters, only_trained):
        self.shadow = [param.detach().clone() for param in parameters]
        self.only_trained = only_trained

    @torch.no_grad()
    def update(self, parameters):
        for shadow, param in zip(self.shadow, parameters, strict=True):
            if param.requires_grad or not self.only_trained:
                shadow.sub_(0.3 * (shadow - param))
            else:
                shadow.copy_(param)

    @torch.no_grad()
    def put(self, parameters, through_data):
        for shadow, param in zip(self.shadow, list(parameters), strict=True):
            (param.data if through_data else param).copy_(shadow)


def trained(average_of, steps=7):
    """A model, its optimizer, and an average of it."""
    model, optimizer = driven(update_interval=2)
    average = average_of(model)
    for number in range(steps):
        step(model, optimizer, number)
        average.update(model.parameters())
    return model, optimizer, average


def logits(model):
    model.eval()
    with torch.no_grad():
        found = model(input_ids=X).logits
    model.train()
    return found


@pytest.mark.parametrize("through_data", [False, True])
def test_an_average_that_copies_what_is_frozen_is_not_evaluated(through_data, caplog):
    model, optimizer, average = trained(lambda model: Average(model.parameters(), True))
    before = [param.detach().clone() for param in model.parameters()]
    average.put(model.parameters(), through_data)
    with pytest.raises(RuntimeError, match=r"or copies those without requires_grad.*average model\.state_dict\(\)"):
        logits(model)
    with caplog.at_level(logging.WARNING, logger="grass_hf"):
        model.state_dict()
    assert "what is evaluated and saved is not what the slice holds" in caplog.text
    with torch.no_grad():
        for param, old in zip(model.parameters(), before, strict=True):
            param.copy_(old)
    model.train()
    step(model, optimizer, 7)


@pytest.mark.parametrize("through_data", [False, True])
def test_an_average_of_all_parameters_is_evaluated_and_comes_back(through_data):
    model, optimizer, average = trained(lambda model: Average(model.parameters(), False))
    straight, its_optimizer, _ = trained(lambda model: Average(model.parameters(), False))
    before = [param.detach().clone() for param in model.parameters()]
    expected = logits_of(average.shadow, model)
    average.put(model.parameters(), through_data)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        for param, old in zip(model.parameters(), before, strict=True):
            (param.data if through_data else param).copy_(old)
    for number in range(7, 10):
        assert step(model, optimizer, number) == step(straight, its_optimizer, number)


def logits_of(values, like):
    """Of a plain model with these parameters of a converted one."""
    from helpers import tiny_llama

    names = dict(zip((name for name, _ in like.named_parameters()), values, strict=True))
    plain = tiny_llama()
    plain.load_state_dict({name: names[name] for name, _ in plain.named_parameters()}, strict=False)
    return logits(plain)


def test_an_average_of_a_state_dict_is_evaluated_in_a_copy_and_in_place():
    """As timm's ModelEmaV2 keeps it."""
    model, optimizer = driven(update_interval=2)
    kept = copy.deepcopy(model)
    for number in range(7):
        step(model, optimizer, number)
        for ours, theirs in zip(kept.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(0.7 * ours + 0.3 * theirs)
    shadow = [param for _, param in kept.named_parameters()]
    expected = logits_of(shadow, kept)
    assert torch.equal(logits(kept), expected)
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(kept.state_dict())
    assert torch.equal(logits(model), expected)
    model.load_state_dict(before)
    for value, name in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(value, before[name])


def test_a_weight_that_is_clipped_is_evaluated():
    model, optimizer = driven(update_interval=2)
    for number in range(5):
        step(model, optimizer, number)
        for slice_ in grass_slices(model):
            slice_.weight.data.clamp_(-0.05, 0.05)
        logits(model)
