"""A slice and its weight never part unnoticed: whatever moves one of them stops training, or the slice follows."""

import pytest
import torch
from helpers import tiny_llama, trainer
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert import modules
from grass_hf.convert.conversion import grass_slices
from grass_hf.measure.estimate.simulate import enable_checkpointing
from grass_hf.slices import drift

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
    return next(part for part in grass_slices(model) if part.state.name == name)


def assert_agree(model):
    for part in grass_slices(model):
        assert part.rank_part(part, False).agrees(), part.state.name


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
    targets = [f"{part.state.name}.weight" for part in grass_slices(model)]
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


def overwrite(how, module):
    value = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(5)).to(module.weight.dtype)
    if how == "copy_":
        with torch.no_grad():
            module.weight.copy_(value)
    elif how == "data copy_":
        module.weight.data.copy_(value)
    elif how == "data":
        module.weight.data = value
    elif how == "a part of data":
        module.weight.data[:, ::2] = 0.0
    elif how == "scaled":
        module.weight.data.mul_(0.5)
    elif how == "load_state_dict":
        module.load_state_dict({"weight": value})
    elif how == "assign":
        module.load_state_dict({"weight": value}, assign=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "how", ["copy_", "data copy_", "data", "a part of data", "scaled", "load_state_dict", "assign"]
)
def test_a_slice_follows_a_weight_that_is_overwritten(how, dtype):
    model = convert_to_grass(tiny_llama().to(dtype), GrassConfig(density=0.25, update_interval=50))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    for number in range(5):
        step(model, optimizer, number)
    module = model.get_submodule(NAME)
    overwrite(how, module)
    expected = module.weight.detach().clone()
    model(input_ids=X, labels=X).loss.backward()
    part = part_of(model)
    assert torch.equal(part.active.to(dtype), expected.index_select(part.dim, part.index))
    optimizer.step()
    others = torch.ones(part.state.size, dtype=torch.bool).index_fill(0, part.index, False).nonzero().flatten()
    assert torch.equal(module.weight.index_select(part.dim, others), expected.index_select(part.dim, others))
    assert not torch.equal(module.weight, expected)


@pytest.mark.parametrize("through_data", [False, True])
def test_averages_of_all_parameters(through_data):
    """Slices of other columns have been averaged: training stops, or goes on from the averaged weights."""
    model, optimizer = driven()
    ours = [param.detach().clone() for param in model.parameters()]
    for number in range(5):
        step(model, optimizer, number)
    with torch.no_grad():
        for param, old in zip(model.parameters(), ours, strict=True):
            (param.data if through_data else param).lerp_(old, 0.5)
    before = weights(model)
    if through_data:
        model(input_ids=X, labels=X).loss.backward()
        assert_agree(model)
    else:
        with pytest.raises(RuntimeError, match="hold different values: something moved them"):
            step(model, optimizer)
        restore_model(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_model_is_restored_to_the_average(average, buffers):
    model, optimizer = driven()
    plain = tiny_llama()
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=buffers)
    expected = AveragedModel(plain, multi_avg_fn=average, use_buffers=buffers)
    for number in range(7):
        step(model, optimizer, number)
        averaged.update_parameters(model)
        plain.load_state_dict(weights(model))
        expected.update_parameters(plain)
    if buffers and average:  # numbers of rows are rounded down to one that is there already
        with pytest.raises(ValueError, match=r"no set of rows any more|convert the model again"):
            grass_optimizer(averaged.module, torch.optim.AdamW, lr=1e-2)
    restore_model(averaged.module)
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(averaged.module.state_dict()[name], value, rtol=0, atol=1e-6)


def test_weights_that_are_swapped_for_an_evaluation_come_back():
    model, optimizer = driven()
    straight, its_optimizer = driven()
    for number in range(5):
        step(model, optimizer, number)
        step(straight, its_optimizer, number)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.data.mul_(0.5)
    model.eval()
    with torch.no_grad():
        model(input_ids=X)
    model.train()
    for param, old in zip(model.parameters(), before, strict=True):
        param.data.copy_(old)
    for number in range(5, 9):
        assert step(model, optimizer, number) == step(straight, its_optimizer, number)


def test_a_slice_that_is_swapped_for_an_evaluation_and_does_not_come_back():
    model, optimizer = driven()
    for number in range(5):
        step(model, optimizer, number)
    part_of(model).active.data.zero_()  # leaves no mark
    model.eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="what is evaluated and saved is not what the slice holds"):
        model(input_ids=X)
    model.train()
    with pytest.raises(RuntimeError, match="hold different values"):
        step(model, optimizer, 5)


def test_values_are_compared_now_and_then_only(monkeypatch):
    model, optimizer = driven()
    compared, confirm = [], drift.confirm

    def count(part):
        compared.append(part.state.name)
        confirm(part)

    monkeypatch.setattr(drift, "confirm", count)
    for number in range(40):
        step(model, optimizer, number)
    assert sorted(set(compared)) == sorted(part.state.name for part in grass_slices(model))
    assert compared.count(NAME) == len([1, 2, 4, 8, 16, 32])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_no_evaluation(monkeypatch, reentrant):
    model, optimizer = driven()
    if reentrant:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    else:
        enable_checkpointing(model)
    model.train()
    compared, confirm = [], drift.confirm
    monkeypatch.setattr(drift, "confirm", lambda part: (compared.append(part.state.name), confirm(part)))
    for number in range(5):
        step(model, optimizer, number)
    assert compared.count(NAME) <= len([1, 2, 4, 8])


@pytest.mark.parametrize("name", ["parametrization", "weight norm", "pruning"])
def test_a_parametrization_after_the_conversion_stops(name):
    model, optimizer = driven()
    module = model.get_submodule(NAME)
    if name == "parametrization":
        parametrizations.orthogonal(module)
    elif name == "weight norm":
        torch.nn.utils.weight_norm(module)
    else:
        prune.random_unstructured(module, "weight", 0.5)
    with pytest.raises(RuntimeError, match=f"weight of {NAME} is no plain parameter any more"):
        step(model, optimizer)


def test_a_weight_that_is_unfrozen_is_frozen_again(caplog):
    model, optimizer = driven()
    straight, its_optimizer = driven()
    modules._warn_of_unfreezing.cache_clear()
    for number in range(4):
        model.requires_grad_(True)
        model(input_ids=X, labels=X).loss.backward()
        assert all(part.weight.grad is None and not part.weight.requires_grad for part in grass_slices(model))
        model.zero_grad()
        assert step(model, optimizer, number) == step(straight, its_optimizer, number)
    assert caplog.text.count("were made trainable after the conversion") == 1


def test_casting_after_the_conversion_is_followed(caplog):
    model, optimizer = driven()
    model.to(torch.bfloat16)
    drift._warn_of_cast.cache_clear()
    step(model, optimizer)
    assert "Cast the model first" in caplog.text
    assert_agree(model)
    model = convert_to_grass(tiny_llama().to(torch.bfloat16), GrassConfig(density=0.25))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    model.to(torch.float32)
    step(model, optimizer)
    part = part_of(model)
    assert torch.equal(part.active, part.weight.index_select(part.dim, part.index)), "with all digits"


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_embeddings(tmp_path, tied):
    job = trainer(tmp_path, tiny_llama(tie_word_embeddings=tied), optim_args="density=0.25,target_modules=all-matrices")
    job.model.resize_token_embeddings(56)
    with pytest.raises(RuntimeError, match=r"resized after the conversion\. Resize before"):
        job.train()
    model = tiny_llama(tie_word_embeddings=tied)
    job = trainer(tmp_path, model, optim_args="density=0.25,target_modules=all-matrices")
    job.train()
    model.resize_token_embeddings(56)
    expected = weights(model)
    restore_model(model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    assert model(input_ids=torch.full((1, 2), 55)).logits.shape[-1] == 56


def test_in_a_compiled_model_the_step_looks():
    model, optimizer = driven()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number in range(3):
        step(compiled, optimizer, number)
    with torch.no_grad():
        part_of(model).active.add_(1.0)
    before = weights(model)
    with pytest.raises(RuntimeError, match=f"the slice of {NAME} was changed and its weight was not"):
        step(compiled, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
