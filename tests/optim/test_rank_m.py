"""rank = m, through the compressed path, is the base optimizer: to 1e-12 in float64, to rounding in float32."""

import copy

import pytest
import torch
from helpers import assert_same_weights, plain_state, tiny_llama, trainer
from torch import nn

import grass_hf
from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices, is_converted

pytestmark = pytest.mark.oldest

PLAIN = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam_l2": (torch.optim.Adam, {"weight_decay": 0.1}),
    "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
    "rprop": (torch.optim.Rprop, {}),
}
TRAINER = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad", "lion_32bit"]


def assert_fully_compressed(model):
    layers = list(grass_slices(model))
    assert layers
    for layer in layers:
        assert layer.active.shape == layer.weight.shape and not layer.weight.requires_grad


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("base", PLAIN)
def test_plain_pytorch_float64(base, side):
    cls, settings = PLAIN[base]
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False)).double()
    theirs = copy.deepcopy(ours)
    convert_to_grass(ours, GrassConfig(density=1.0, update_interval=3, side=side))
    assert_fully_compressed(ours)
    optimizers = (
        grass_optimizer(ours, cls, lr=0.01, **settings),
        cls(theirs.parameters(), lr=0.01, **settings),
    )
    for step in range(12):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(x).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(ours, theirs, atol=1e-12)


def through_trainer(tmp_path, base, side, dtype):
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_steps": 7, "seed": 1}
    runs = []
    for optim, optim_args in (
        ("grass", f"density=1.0,update_interval=2,side={side},base={base}"),
        (base, None),
    ):
        run = trainer(tmp_path, tiny_llama().to(dtype), optim=optim, optim_args=optim_args, **settings)
        if optim == "grass":
            assert_fully_compressed(run.model)
        run.train()
        runs.append(run)
    norms = [run.state.log_history[0]["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > settings["max_grad_norm"]  # clipping had something to clip
    assert not is_converted(runs[1].model)  # the other side really is the ordinary Trainer
    return runs[0].model, runs[1].model


def distances(ours, theirs):
    """(name, |ours - theirs|, |theirs - start|) for every weight."""
    start, ours, theirs = plain_state(tiny_llama()), plain_state(ours), plain_state(theirs)
    assert start.keys() == ours.keys() == theirs.keys()
    return [(name, (ours[name] - theirs[name]).abs(), (theirs[name] - start[name]).abs()) for name in start]


@pytest.mark.parametrize("base", TRAINER)
def test_through_the_trainer_float32(tmp_path, base):
    """To rounding: the distance between the runs is measured against the distance that training moved."""
    if base.startswith("lion"):
        pytest.importorskip("bitsandbytes")
    for name, apart, moved in distances(*through_trainer(tmp_path, base, "output", torch.float32)):
        assert moved.norm() > 0, name
        if base.startswith("lion"):
            # its step is a sign: an element whose momentum is zero but for rounding may go the other way
            assert (apart > 1e-6).double().mean() < 1e-2, name
        else:
            assert apart.norm() <= 1e-4 * moved.norm(), name


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("base", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor"])
def test_through_the_trainer_float64(tmp_path, base, side):
    ours, theirs = through_trainer(tmp_path, base, side, torch.float64)
    assert_same_weights(ours, theirs, atol=1e-12)


def test_rank_m_is_not_reached_by_leaving_layers_ordinary():
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=1.0))
    assert all(type(slice_.owner).__name__ == "GrassLinear" for slice_ in grass_slices(model))
    assert len(list(grass_slices(model))) == 14
    assert grass_hf.GrassConfig(rank=32).rank_for(32) == 32
