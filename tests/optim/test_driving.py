"""An optimizer drives slices by its class: copies drive theirs, and closures are followed by the checks."""

import copy
import io
import pickle

import pytest
import torch
from helpers import tiny_llama
from torch.optim.lr_scheduler import LambdaLR

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim.driving import plain_class

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
    before = [slice_.index.clone() for slice_ in grass_slices(model)]
    with_closure(model, optimizer, range(2))
    assert any(not torch.equal(slice_.index, old) for slice_, old in zip(grass_slices(model), before, strict=True))
