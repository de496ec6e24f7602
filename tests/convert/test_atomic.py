"""A conversion, or a way back, that stops in the middle leaves the model as it was."""

import itertools

import pytest
import torch
from helpers import tiny_llama
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert import surgery
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices import slice
from grass_hf.slices.ops import int8

TOKENS = torch.arange(48).view(4, 12)


def tied(**options):
    return tiny_llama(tie_word_embeddings=True, num_hidden_layers=1, **options)


def mixtral():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, vocab_size=48, num_local_experts=4))


CASES = {
    "tied": (tied, {"target_modules": "all-matrices"}),
    "experts": (mixtral, {"selection": "multinomial_norm"}),
    "int8": (lambda: tied().bfloat16(), {"weight_dtype": "int8", "side": "output"}),
    "int8 of two": (tied, {"weight_dtype": "int8", "side": "output", "target_modules": ["up_proj", "o_proj"]}),
}


def with_gradients(make):
    model = make()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return model


def anatomy(model):
    """Everything about a model that surgery may touch: objects by identity, values by themselves."""
    found = {}
    for name, module in model.named_modules():
        members = {**vars(module), **module._parameters, **module._buffers, **module._modules}
        found[name] = (type(module), list(module._modules), {key: id(value) for key, value in members.items()})
    for name, param in model.named_parameters(remove_duplicate=False):
        grad = param.grad
        found[f"{name}="] = (param.requires_grad, type(param), id(grad), None if grad is None else grad.tolist())
        found[f"{name}:"] = (int8.dequantize(param) if int8.is_int8(param) else param).tolist()
    return found


class Stop(BaseException):
    """What a library of somebody else's raises, the allocator, or the user's Ctrl-C."""


def stops_at(call, original):
    """`original`, until its k-th call, which does its work and fails."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == call:
            raise Stop
        return result

    return wrapped


POINTS = {
    "slice": (slice.Slice, "__init__"),
    "attach": (surgery, "attach_slice"),
    "class": (surgery, "_set_class"),
    "quantise": (int8, "quantize"),
    "setattr": (nn.Module, "__setattr__"),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_that_stops_anywhere(case, point, monkeypatch):
    from grass_hf.convert import conversion

    make, settings = CASES[case]
    owner, name = POINTS[point]
    config, model = GrassConfig(density=0.5, **settings), with_gradients(make)
    before, reached = anatomy(model), 0
    while True:
        with monkeypatch.context() as patch:
            function = stops_at(reached + 1, getattr(owner, name))
            patch.setattr(owner, name, function)
            if name == "attach_slice":
                patch.setattr(conversion, name, function)
            try:
                convert_to_grass(model, config)
            except Stop:
                reached += 1 if point != "setattr" else 7  # every attribute of every slice: some of them
            else:
                break
        after = anatomy(model)
        assert after.keys() == before.keys(), f"{name} {reached}"
        for key, value in before.items():
            assert after[key] == value, f"{key} after {name} {reached}"
    assert (reached >= 2) == (point != "quantise" or "int8" in case)
    assert list(grass_slices(model))


@pytest.mark.parametrize("point", ["class", "setattr", "dequantise", "delattr"])
@pytest.mark.parametrize("case", CASES)
def test_a_way_back_that_stops_anywhere(case, point, monkeypatch):
    make, settings = CASES[case]
    model = convert_to_grass(make(), GrassConfig(density=0.5, **settings))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for slice_ in grass_slices(model):
        slice_.settle_decay()
        slice_.write_back()
    owner, name = {**POINTS, "dequantise": (int8, "dequantize"), "delattr": (nn.Module, "__delattr__")}[point]
    before, saved, reached = looks(model), model.state_dict(), 0
    while True:
        with monkeypatch.context() as patch:
            function = stops_at(reached + 1, getattr(owner, name))
            patch.setattr(owner, name, function)
            try:
                restore_model(model)
            except Stop:
                reached += 1
            else:
                break
        assert looks(model) == before, f"{name} {reached}"
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert (reached >= 2) == (point != "dequantise" or "int8" in case) or point == "setattr"
    assert repr(model) == repr(make())


def looks(model):
    """`anatomy` without the identity of what was made anew."""
    parts = [(name, type(m), sorted(vars(m)), sorted(m._modules)) for name, m in model.named_modules()]
    return parts, [(name, p.requires_grad, type(p)) for name, p in model.named_parameters()]


def test_flags_are_what_they_were():
    model = tied(num_key_value_heads=4)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    eight = model.model.layers[0].mlp.up_proj
    eight.weight = int8.quantize(eight.weight)
    model._ddp_params_and_buffers_to_ignore = ["a"]
    before = looks(model)
    convert_to_grass(model, GrassConfig(density=0.5, side="output", weight_dtype="int8"))
    assert model._ddp_params_and_buffers_to_ignore != ["a"]
    restore_model(model)
    assert looks(model) == before and model._ddp_params_and_buffers_to_ignore == ["a"]


def test_large_int8_weights_are_not_kept(monkeypatch, caplog):
    """Memory is what they are for: what was stored already comes back with the rounding of eight bits, and says so."""
    monkeypatch.setattr(surgery, "_KEPT", 0)
    model, plain = tied(), tied()
    function = stops_at(3, int8.quantize)
    monkeypatch.setattr(int8, "quantize", function)
    with pytest.raises(Stop):
        convert_to_grass(model, GrassConfig(density=0.5, side="output", weight_dtype="int8"))
    assert looks(model) == looks(plain) and "keeps its rounded values" in caplog.text
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01, msg=name)
    changed = sum(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert changed == 2
