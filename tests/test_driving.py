"""An optimizer drives slices by its class: copies drive theirs, and closures are followed by the checks."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_llama
from torch.optim.lr_scheduler import LambdaLR

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer
from grass_hf.convert import grass_slices
from grass_hf.driving import plain_class

BASES = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "muon": MuonAdamW}


def make(base="adamw", **options):
    config = GrassConfig(**{"density": 0.25, "update_interval": 3, "stagger": 1, **options})
    model = convert_to_grass(tiny_llama(), config)
    return model, grass_optimizer(model, BASES[base], lr=1e-2, weight_decay=0.1)


def batch(number):
    tokens = torch.randint(48, (4, 12), generator=torch.Generator().manual_seed(number))
    return {"input_ids": tokens, "labels": tokens}


def train(model, optimizer, numbers):
    losses = []
    for number in numbers:
        loss = model(**batch(number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def by_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "torch.save": by_torch,
    "optimizer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
    "pickled, optimizer first": lambda pair: by_pickle(pair[::-1])[::-1],
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_train_on_as_the_original_does(how, base):
    model, optimizer = make(base)
    train(model, optimizer, range(5))
    other, its_optimizer = COPIES[how]((model, optimizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = train(other, its_optimizer, range(5, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "untouched"
    assert theirs == train(model, optimizer, range(5, 12))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert isinstance(its_optimizer, BASES[base]) and its_optimizer.grass.step == 12


def test_a_copy_in_mid_accumulation_begins_without_gradients():
    model, optimizer = make()
    train(model, optimizer, range(3))  # the next step observes
    model(**batch(3)).loss.backward()
    other, its_optimizer = copy.deepcopy((model, optimizer))
    other.zero_grad()
    model.zero_grad()
    assert train(other, its_optimizer, range(4, 9)) == train(model, optimizer, range(4, 9))


def test_a_copy_of_the_optimizer_alone_refuses_to_step():
    model, optimizer = make()
    train(model, optimizer, range(2))
    alone = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="this AdamW is a copy, and the model whose slices it drives was not"):
        alone.step()
    model(**batch(2)).loss.backward()
    with pytest.raises(RuntimeError, match="is a copy"):
        pickle.loads(pickle.dumps(optimizer)).step()
    shallow = copy.copy(optimizer)
    with pytest.raises(RuntimeError, match="is a copy"):
        shallow.step()
    optimizer.zero_grad()
    train(model, optimizer, range(2))


def test_a_copy_of_the_model_alone_gets_an_optimizer_of_its_own():
    model, optimizer = make()
    train(model, optimizer, range(2))
    other = copy.deepcopy(model)
    plain = torch.optim.AdamW([param for param in other.parameters() if param.requires_grad], lr=1e-2)
    with pytest.raises(RuntimeError, match=r"holds the slice of .* and does not drive it"):
        train(other, plain, range(2))
    other.zero_grad()
    before = other.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    train(other, grass_optimizer(other, torch.optim.SGD, lr=0.1), range(2))
    assert not torch.equal(before, other.state_dict()["model.layers.0.mlp.down_proj.weight"])


def test_a_part_of_a_model_is_copied_without_the_rest():
    model, _ = make()
    layer = copy.deepcopy(model.model.layers[0])
    held = pickle.dumps(layer)
    assert len(held) < len(pickle.dumps(model)) / 1.5


def test_an_instance_carries_no_wrapped_methods():
    _, optimizer = make()
    assert not {"step", "zero_grad", "state_dict", "load_state_dict"} & vars(optimizer).keys()
    assert plain_class(optimizer) is torch.optim.AdamW and isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "GrassAdamW" and type(optimizer).__module__ == torch.optim.AdamW.__module__
    assert type(make()[1]) is type(optimizer), "made once"


def test_hooks_of_torch_run_once():
    model, optimizer = make()
    runs = []
    optimizer.register_step_pre_hook(lambda *_: runs.append("before"))
    optimizer.register_step_post_hook(lambda *_: runs.append("after"))
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    train(model, optimizer, range(1))
    scheduler.step()
    assert runs == ["before", "after"] and optimizer.param_groups[0]["lr"] == pytest.approx(0.009)
    copied = copy.deepcopy((model, optimizer))
    train(*copied, range(1))
    assert runs == ["before", "after"], "hooks are not copied, as torch has it"


# -- closures


def with_closure(model, optimizer, numbers, spoil=None, outside=False):
    losses = []
    for number in numbers:

        def closure(number=number):
            if not outside:
                optimizer.zero_grad()
            loss = model(**batch(number)).loss * (float("nan") if number == spoil else 1.0)
            loss.backward()
            return loss

        if outside:
            optimizer.zero_grad()
        losses.append(optimizer.step(closure).item())
    return losses


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("outside", [False, True])
def test_a_closure_trains_as_a_loop_does(resident, outside):
    model, optimizer = make(resident=resident)
    straight, its_optimizer = make(resident=resident)
    assert with_closure(model, optimizer, range(8), outside=outside) == train(straight, its_optimizer, range(8))
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("outside", [False, True])
def test_a_gradient_of_a_closure_that_is_not_finite_stops_before_a_weight_changes(resident, outside):
    model, optimizer = make(resident=resident)
    with_closure(model, optimizer, range(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="not finite at optimizer step 2, and training stopped before any"):
        with_closure(model, optimizer, range(2, 4), spoil=2, outside=outside)
    for name, value in before.items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, equal_nan=True)


def test_a_closure_whose_gradients_miss_the_slices_stops():
    model, optimizer = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def closure():
        optimizer.zero_grad()
        loss = model.model.embed_tokens(batch(0)["input_ids"]).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no Grass layer received a gradient"):
        optimizer.step(closure=closure)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_norms_of_a_closure_choose_the_next_rows():
    model, optimizer = make(selection="top_r")
    before = [part.index.clone() for part in grass_slices(model)]
    with_closure(model, optimizer, range(2))
    assert any(not torch.equal(part.index, old) for part, old in zip(grass_slices(model), before, strict=True))


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
    weights = {id(part.weight) for part in grass_slices(other)}
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
    assert all(part.norms is None or part.norms.grad is None for part in grass_slices(model))
    assert train(model, wrapped, range(5)) == train(straight, its_optimizer, range(5))
    assert "grass" in wrapped.state_dict()["param_groups"][-1]
