"""A slice and its weight never part unnoticed: whatever moves one of them stops training, or the slice follows."""

import pytest
import torch
from helpers import tiny_llama
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices

X = torch.arange(12).repeat(4, 1)
NAME = "model.layers.0.mlp.down_proj"


def converted(**options):
    return convert_to_grass(tiny_llama(), GrassConfig(**{"density": 0.25, "update_interval": 3, **options}))


def driven(**options):
    model = converted(**options)
    return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2)


def step(model, optimizer, seed=0):
    tokens = torch.randint(48, (4, 12), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(".active")}


def part_of(model, name=NAME):
    return next(slice_ for slice_ in grass_slices(model) if slice_.state.name == name)


def assert_agree(model):
    for slice_ in grass_slices(model):
        assert slice_.rank_part(slice_, False).agrees(), slice_.state.name


class ThroughData(torch.optim.Optimizer):
    """Moves parameters through ``.data``, as optimizers of old do; no version counter tells of it."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.add_(param.grad.data, alpha=-group["lr"])


class NoOptimizer:
    """The same, and torch has never heard of it."""

    def __init__(self, params, lr=1e-2):
        self.params, self.lr = list(params), lr

    step = ThroughData.step
    param_groups = property(lambda self: [{"params": self.params, "lr": self.lr}])

    def zero_grad(self):
        for param in self.params:
            param.grad = None


PLAIN = {
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, foreach=False),
    "data": ThroughData,
    "unknown": NoOptimizer,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_an_optimizer_that_nobody_told_of_the_slices_stops(kind):
    model = converted(target_modules="all-matrices")
    optimizer = PLAIN[kind]([param for param in model.parameters() if param.requires_grad])
    before = weights(model)
    targets = [f"{slice_.state.name}.weight" for slice_ in grass_slices(model)]
    with pytest.raises(RuntimeError, match="grass_optimizer"):
        for number in range(2):
            step(model, optimizer, number)
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in targets)
    if kind not in ("unknown",):  # torch lets us look before its first step
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_optimizer_made_before_the_conversion_stops():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    convert_to_grass(model, GrassConfig(density=0.25))
    before = weights(model)
    with pytest.raises(RuntimeError, match="made before the conversion and holds the whole weight of"):
        step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_optimizers_of_other_models_are_left_alone():
    driven()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 3)).sum().backward()
    before = other.weight.clone()
    optimizer.step()
    assert not torch.equal(other.weight, before)


def test_the_old_optimizer_stops_after_restore_model():
    model, optimizer = driven()
    step(model, optimizer)
    restore_model(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match="restore_model has taken off LlamaForCausalLM"):
        step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    convert_to_grass(model, GrassConfig(density=0.25))
    with pytest.raises(RuntimeError, match="restore_model has taken off"):
        step(model, optimizer)


def test_one_optimizer_drives_a_model():
    model, first = driven()
    step(model, first)
    with pytest.raises(ValueError, match="replace=True"):
        grass_optimizer(model, torch.optim.SGD, lr=1e-2)
    step(model, first)
    second = grass_optimizer(model, torch.optim.SGD, lr=1e-2, replace=True)
    with pytest.raises(RuntimeError, match="another optimizer has taken over the slices of LlamaForCausalLM"):
        step(model, first)
    model.zero_grad()
    before = weights(model)
    step(model, second)
    assert not torch.equal(weights(model)[f"{NAME}.weight"], before[f"{NAME}.weight"])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: a second gradient at perturbed parameters."""

    def __init__(self, params, through_data=False, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.through_data, self.inner = through_data, torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def first_step(self):
        self.old = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        for param in self.old:
            (param.data if self.through_data else param).add_(param.grad, alpha=0.5)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for param, value in self.old.items():
            param.data.copy_(value)
        self.inner.step()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("by_closure", [False, True])
def test_an_optimizer_that_moves_parameters_itself_stops(through_data, by_closure):
    model = converted()
    optimizer = grass_optimizer(model, SAM, lr=0.1, through_data=through_data)
    before = weights(model)[f"{NAME}.weight"]

    def closure():
        loss = model(input_ids=X, labels=X).loss
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"moves? parameters|moved them|holds the slice of"):
        for _ in range(3):
            closure()
            if by_closure:
                optimizer.step(closure)
            else:
                optimizer.first_step()
                closure()
                optimizer.second_step()
    assert torch.equal(weights(model)[f"{NAME}.weight"], before)
