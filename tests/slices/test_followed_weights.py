"""Weights that are overwritten, averaged, swapped, cast or resized: the slice follows, or training stops."""

import pytest
import torch
from helpers import tiny_llama, trainer
from test_drift import NAME, X, assert_agree, driven, part_of, step, weights
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert import modules
from grass_hf.convert.conversion import grass_slices
from grass_hf.measure.estimate.simulate import enable_checkpointing
from grass_hf.slices import drift


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
    slice_ = part_of(model)
    assert torch.equal(slice_.active.to(dtype), expected.index_select(slice_.dim, slice_.index))
    optimizer.step()
    others = torch.ones(slice_.state.size, dtype=torch.bool).index_fill(0, slice_.index, False).nonzero().flatten()
    assert torch.equal(module.weight.index_select(slice_.dim, others), expected.index_select(slice_.dim, others))
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

    def count(slice_):
        compared.append(slice_.state.name)
        confirm(slice_)

    monkeypatch.setattr(drift, "confirm", count)
    for number in range(40):
        step(model, optimizer, number)
    assert sorted(set(compared)) == sorted(slice_.state.name for slice_ in grass_slices(model))
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
    monkeypatch.setattr(drift, "confirm", lambda slice_: (compared.append(slice_.state.name), confirm(slice_)))
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
        assert all(slice_.weight.grad is None and not slice_.weight.requires_grad for slice_ in grass_slices(model))
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
    slice_ = part_of(model)
    assert torch.equal(slice_.active, slice_.weight.index_select(slice_.dim, slice_.index)), "with all digits"


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
