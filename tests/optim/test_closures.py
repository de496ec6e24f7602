"""What Lightning, skorch, accelerate and schedulers do to an optimizer: closures, wrappers, parameters, rates."""

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_llama
from test_driving import batch, make, train
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices


class Behind(torch.nn.Module):
    """Reads a weight without calling its module, which the first forward finds out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read, self.last = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.last((self.called(x).tanh() @ self.read.weight.T).tanh())


def test_a_closure_that_frees_a_weight_and_changes_rates_keeps_both():
    """The first forward runs within the step; what is done to the groups there is not undone by the warm-up."""
    settings = {"density": 0.25, "update_interval": 2, "stagger": 1, "scale": 0.5, "scale_warmup": 3}
    runs = []
    for inside in (False, True):
        model = convert_to_grass(Behind(), GrassConfig(**settings))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
        losses = []
        for number in range(6):

            def closure(number=number, model=model, optimizer=optimizer):
                loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(number))).square().mean()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.9
                optimizer.zero_grad()
                loss.backward()
                return loss

            losses.append((optimizer.step(closure) if inside else closure()).item())
            if not inside:
                optimizer.step()
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == [pytest.approx(1e-2 * 0.9 ** (number + 1)), pytest.approx(5e-3 * 0.9 ** (number + 1))]
        assert any(param is model.read.weight for param in optimizer.param_groups[0]["params"]), "trained in full"
        runs.append(losses)
    assert runs[0] == runs[1]


def test_accelerates_optimizer_takes_a_closure():
    model, optimizer = make()
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    straight, its_optimizer = make()
    assert with_closure_of(wrapped, model) == train(straight, its_optimizer, range(8))
    with pytest.raises(FloatingPointError, match="not finite at optimizer step 8"):
        with_closure_of(wrapped, model, spoil=True)


def with_closure_of(optimizer, model, spoil=False):
    losses = []
    for number in range(8):

        def closure(number=number):
            loss = model(**batch(number)).loss * (float("nan") if spoil else 1.0)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
    return losses


def test_a_scaler_refuses_a_closure_and_skips_steps_that_overflow():
    model, optimizer = make(selection="top_r")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for factor in (float("inf"), 1.0):
        if factor == 1.0:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        scaler.scale(model(**batch(0)).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.grass.step == 1
    straight, its_optimizer = make(selection="top_r")
    train(straight, its_optimizer, range(1))
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_all_parameters_of_a_model_may_be_given(named):
    """As skorch does, and most scripts: frozen weights are left out, and names stay with their parameters."""
    model, optimizer = make()
    other = convert_to_grass(tiny_llama(), model.grass.config)
    params = other.named_parameters() if named else other.parameters()
    its_optimizer = grass_optimizer(other, torch.optim.AdamW, params=params, lr=1e-2, weight_decay=0.1)
    assert train(other, its_optimizer, range(4)) == train(model, optimizer, range(4))
    weights = {id(slice_.weight) for slice_ in grass_slices(other)}
    for group in its_optimizer.param_groups:
        assert weights.isdisjoint(map(id, group["params"]))
        if named:
            own = {id(param): name for name, param in other.named_parameters()}
            assert group["param_names"] == [own[id(param)] for param in group["params"]]


class Imitation:
    """As the wrappers of Lightning and Fabric: of the class of the optimizer in it, and with nothing of its own."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitated", (Imitation, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_what_imitates_the_optimizer_counts_as_it():
    model, optimizer = make(selection="top_r")
    straight, its_optimizer = make(selection="top_r")
    wrapped = Imitation(optimizer)
    (model(**batch(9)).loss * 100).backward()
    wrapped.zero_grad(set_to_none=False)
    assert all(slice_.norms is None or slice_.norms.grad is None for slice_ in grass_slices(model))
    assert train(model, wrapped, range(5)) == train(straight, its_optimizer, range(5))
    assert "grass" in wrapped.state_dict()["param_groups"][-1]


SCHEDULES = {
    "one cycle": lambda optimizer, rate: OneCycleLR(optimizer, rate, total_steps=20),
    "cyclic": lambda optimizer, rate: CyclicLR(optimizer, rate, [1.0] * 2, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_with_one_rate_for_all_groups_does_not_undo_scale(name):
    model, optimizer = make(scale=0.5)
    SCHEDULES[name](optimizer, 0.02)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"scale=0.5 was to make theirs .*max_lr=\[group\['lr'\]"):
        train(model, optimizer, range(1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model, optimizer = make(scale=0.5)
    schedule = SCHEDULES[name](optimizer, [group["lr"] for group in optimizer.param_groups])
    for number in range(3):
        train(model, optimizer, [number])
        schedule.step()
    model, optimizer = make()
    SCHEDULES[name](optimizer, 0.02)
    train(model, optimizer, range(1))


def test_equal_rates_that_are_meant_train():
    model, optimizer = make(scale=0.5)
    LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    train(model, optimizer, range(3))
    model = convert_to_grass(tiny_llama(), model.grass.config)
    slices = [slice_.active for slice_ in grass_slices(model)]
    held = {id(param) for param in slices}
    rest = [param for param in model.parameters() if param.requires_grad and id(param) not in held]
    params = [{"params": slices, "lr": 1e-2}, {"params": rest, "lr": 5e-3}]
    train(model, grass_optimizer(model, torch.optim.AdamW, params=params), range(2))
