"""Optimizer state that is resumed with all its digits, also where it has more of them than its parameter."""

import pytest
import torch
from test_resume_other import flat, saved
from torch import nn
from transformers.optimization import Adafactor

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

FIXED_RATE = {"scale_parameter": False, "relative_step": False}


@pytest.mark.parametrize(
    "cls, settings, dtype",
    [
        (Adafactor, FIXED_RATE, torch.bfloat16),
        (torch.optim.NAdam, {}, torch.bfloat16),
        (torch.optim.NAdam, {}, torch.float64),
        (torch.optim.ASGD, {}, torch.bfloat16),
    ],
)
def test_state_keeps_the_digits_that_plain_torch_drops(cls, settings, dtype):
    """It casts all of it to the parameters' dtype, also what the optimizer keeps in float32."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).to(dtype)
        convert_to_grass(model, GrassConfig(update_interval=3, slice_dtype=str(dtype).removeprefix("torch.")))
        return model, grass_optimizer(model, cls, lr=1e-2, **settings)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            tokens = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(tokens).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    train(model, optimizer, 0, 4)
    weights, state = saved(model, optimizer)
    state_of_one = optimizer.state[next(grass_slices(model)).active]
    assert torch.float32 in {value.dtype for value in state_of_one.values() if isinstance(value, torch.Tensor)}
    again, its_optimizer = build()
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    for first, last in ((4, 4), (4, 12)):
        train(model, optimizer, first, last)
        train(again, its_optimizer, first, last)
        assert flat(its_optimizer.state_dict()) == flat(optimizer.state_dict())
        assert flat(again.state_dict()) == flat(model.state_dict())
