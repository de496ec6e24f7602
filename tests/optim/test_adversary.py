"""What is done to a converted model and Grass cannot follow stops in a sentence; what it can follow is right."""

import pytest
import torch
from helpers import tiny_llama, trainer
from torch import nn
from torch.func import functional_call, grad, vmap

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

X = torch.arange(48).view(4, 12)


def converted(**options):
    settings = {"density": 1.0, "scale": 1.0, "target_modules": "all-matrices", "update_interval": 3}
    return convert_to_grass(tiny_llama(), GrassConfig(**{**settings, **options}))


def step(model, optimizer, between=lambda: None):
    model(input_ids=X, labels=X).loss.backward()
    between()
    optimizer.step()
    optimizer.zero_grad()


def small(grass=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    return convert_to_grass(model, GrassConfig(density=0.5, target_modules="all-matrices")) if grass else model


@pytest.mark.parametrize("wanted", ["inputs", "parameters"])
def test_gradients_of_gradients_stop_and_create_graph_alone_does_not(wanted):
    model, x = small(), torch.randn(4, 8, requires_grad=True)
    of = [x] if wanted == "inputs" else [slice_.active for slice_ in grass_slices(model)]
    loss = model(x).sum()  # linear: the gradient of the inputs depends on nothing but the weights
    found = torch.autograd.grad(loss, of, create_graph=True)
    plain = small(grass=False)
    expected = torch.autograd.grad(plain(x).sum(), x)[0]
    assert wanted != "inputs" or torch.equal(found[0], expected)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"depends on gradients of the model .*create_graph=True"):
        sum(each.square().sum() for each in found).backward()


def test_transforms_of_torch_func_stop_and_run_without_gradients():
    model, x = small(), torch.randn(4, 8)
    slices = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for transformed in (
        lambda: vmap(model)(x),
        lambda: grad(lambda params: functional_call(model, params, (x,)).sum())(slices),
        lambda: torch.func.jvp(model, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"torch.func .* runs this model"):
            transformed()
    model.eval()
    with torch.no_grad():
        assert torch.allclose(vmap(model)(x), model(x))
        several = {name: torch.stack([param, param]) for name, param in model.named_parameters()}
        assert vmap(lambda params: functional_call(model, params, (x,)))(several).shape == (2, 4, 8)


@pytest.mark.parametrize("way", ["data", "in place", "loaded"])
def test_a_weight_that_is_edited_between_backward_and_step(way):
    found = []
    for grass in (True, False):
        model = converted() if grass else tiny_llama()
        make = grass_optimizer if grass else lambda model, cls, **options: cls(model.parameters(), **options)
        optimizer = make(model, torch.optim.SGD, lr=0.1)

        @torch.no_grad()
        def edit(model=model):
            if way == "loaded":
                model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
                return
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    (module.weight.data if way == "data" else module.weight).mul_(0.5)

        for _ in range(4):
            step(model, optimizer, edit)
        found.append(model.state_dict())
    assert all(torch.allclose(found[0][name], value, atol=1e-6) for name, value in found[1].items())


@pytest.mark.parametrize("before", [True, False])
def test_what_all_parameters_undergo_is_no_drift_in_half_precision(before):
    model = convert_to_grass(tiny_llama().bfloat16(), GrassConfig(density=0.25))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)

    @torch.no_grad()
    def decay():
        for param in model.parameters():
            param.mul_(0.99)

    for _ in range(5):
        step(model, optimizer, decay if before else lambda: None)
        if not before:
            decay()
    assert all(slice_.active.dtype == torch.float32 for slice_ in grass_slices(model))


def test_a_weight_that_is_edited_after_the_last_step_survives_the_end():
    model = converted(density=0.25)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    step(model, optimizer)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.fill_(0.5)
    optimizer.grass.settle()
    assert bool((weight == 0.5).all())


@torch.no_grad()
def test_an_average_of_what_is_trained_is_not_evaluated_and_saved_without_a_word(caplog):
    model = converted(density=0.25)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    trained = [param for param in model.parameters() if param.requires_grad]
    average = [param.detach().clone() for param in trained]
    with torch.enable_grad():
        step(model, optimizer)
    model.state_dict()
    assert not caplog.records
    for param, mean in zip(trained, average, strict=True):
        param.data.copy_(mean)
    model.state_dict()
    assert "what is evaluated and saved is not what the slice holds" in caplog.text
    model.eval()
    with pytest.raises(RuntimeError, match=r"average model\.state_dict"):
        model(input_ids=X)


def test_an_evaluation_of_what_is_trained_compares_once(monkeypatch):
    from grass_hf.slices import evaluated

    model = converted(density=0.25)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    compared = []
    monkeypatch.setattr(evaluated, "agree", lambda slice_, record: compared.append(slice_) or True)
    step(model, optimizer)
    assert not compared
    model.eval()
    with torch.no_grad():
        model(input_ids=X)
        model(input_ids=X)
    assert len(compared) == len(list(grass_slices(model)))


class FirstGroup(torch.optim.Optimizer):
    """Steps over its first group of parameters."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                param.sub_(param.grad, alpha=self.param_groups[0]["lr"])


def test_an_optimizer_that_steps_over_its_first_group_stops():
    model = converted(density=0.25)
    optimizer = grass_optimizer(model, FirstGroup, lr=0.1)
    with pytest.raises(RuntimeError, match="moved none of the 16 slices that have gradients"):
        step(model, optimizer)


def test_a_step_at_a_rate_of_zero_moves_nothing_and_does_not_stop():
    model = converted(density=0.25)
    optimizer = grass_optimizer(model, FirstGroup, lr=0.0)
    step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    with pytest.raises(RuntimeError, match="moved none"):
        step(model, optimizer)


def test_a_layer_that_is_frozen_after_the_conversion_is_a_sentence():
    model = converted(density=0.25)
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj was frozen after the conversion"):
        grass_optimizer(model, torch.optim.AdamW, lr=1e-2)


def test_multipliers_are_no_drift():
    model = converted(density=0.25, selection="multinomial_norm", update_interval=2)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    for number in range(8):
        step(model, optimizer)
        if number == 4:
            model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
        with torch.no_grad():
            model.eval()(input_ids=X)
        model.train()


def test_a_step_that_is_compiled():
    found = []
    for compiled in (False, True):
        model = converted(density=0.25)
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
        take = lambda optimizer=optimizer: optimizer.step()  # noqa: E731
        take = torch.compile(take, backend="eager") if compiled else take
        for _ in range(5):
            model(input_ids=X, labels=X).loss.backward()
            take()
            optimizer.zero_grad()
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_zero_redundancy_optimizer_is_refused():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer steps on each rank over some parameters only"):
        grass_optimizer(converted(), ZeroRedundancyOptimizer, lr=1e-2)


def test_a_trainer_that_is_given_another_model_converts_it(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.model = run.model_wrapped = tiny_llama()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert all(
        not torch.equal(slice_.weight, before[f"{slice_.state.name}.weight"]) for slice_ in grass_slices(run.model)
    )
