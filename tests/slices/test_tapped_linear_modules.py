"""Product and tap as one node where a module is shared, hooked, called twice, or a part of a module of torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_tapped_linear import M, N, batch, layer, run
from torch import nn

from grass_hf import GrassConfig, convert_to_grass
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops import tapped_linear
from grass_hf.slices.slice import Slice

SIDES = ["output", "input"]
IDS = torch.tensor([[1, 5, 5, 0], [7, 2, 1, 3]])


@pytest.fixture
def calls(monkeypatch):
    """One entry for each product that was one node with its tap."""
    found = []
    real = tapped_linear.tapped_linear
    monkeypatch.setattr("grass_hf.slices.slice.tapped_linear", lambda *a, **k: found.append(k["side"]) or real(*a, **k))
    return found


def converted(plain, side):
    config = GrassConfig(density=0.5, side=side, selection="uniform_nr", target_modules="all-matrices")
    return convert_to_grass(copy.deepcopy(plain), config)


def assert_gradients_of(plain, ours, *args, **options):
    """Slices have the rows (columns) of the plain gradients, other parameters all of them."""
    for model in (plain, ours):
        model(*args, **options).double().square().sum().backward()
    weights = dict(plain.named_parameters())
    for slice_ in grass_slices(ours):
        full = weights[f"{slice_.state.name}.weight"].grad
        own = slice_.active.grad
        torch.testing.assert_close(own, full.index_select(slice_.dim, slice_.index), msg=slice_.state.name)
    for name, param in ours.named_parameters():
        if param.requires_grad and not name.endswith(".active"):
            torch.testing.assert_close(param.grad, weights[name].grad, msg=name)


class Tied(nn.Module):
    """A table that is looked up, multiplied with as a head, and multiplied with the other way round."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(1)
        modules = {"table": nn.Embedding(M, N), "head": nn.Linear(N, M), "gate": nn.Linear(N, M, bias=False)}
        self.parts = nn.ModuleDict({first: modules.pop(first), **modules})
        for part in self.parts.values():
            part.weight = self.parts[first].weight
        self.double()

    def forward(self, ids):
        x = self.parts["table"](ids)
        return self.parts["head"](x) * torch.sigmoid(self.parts["gate"](x))


@pytest.mark.parametrize("first", ["table", "head", "gate"])
@pytest.mark.parametrize("side", SIDES)
def test_a_weight_of_several_modules_gets_the_gradients_of_all(side, first, calls):
    plain = Tied(first)
    ours = converted(plain, side)
    assert len(list(grass_slices(ours))) == 1
    ours(IDS)  # the first forward is looked at
    calls.clear()
    assert_gradients_of(plain, ours, IDS)
    slice_ = next(grass_slices(ours))
    # feature columns, whatever the config's side is, and whatever the embedding calls it
    assert calls == ["input"] * 2 and slice_.dim == -1


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.inner = nn.Linear(N, N, dtype=torch.float64)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x))) + self.inner(x)


@pytest.mark.parametrize("side", SIDES)
def test_a_module_that_is_called_several_times_in_one_forward(side, calls):
    plain = Twice()
    assert_gradients_of(plain, converted(plain, side), batch((2, 3, N)).detach())
    assert calls == [side] * 3


def scaled_input(module, args):
    return (args[0] * 2,)


def scaled_output(module, args, output):
    return output.relu()


def scaled_gradient(module, grad_input, grad_output):
    return tuple(None if grad is None else grad * 3 for grad in grad_input)


def scaled_before(module, grad_output):
    return tuple(grad * 0.5 for grad in grad_output)


HOOKS = {
    "forward pre": lambda module: module.register_forward_pre_hook(scaled_input),
    "forward": lambda module: module.register_forward_hook(scaled_output),
    "full backward": lambda module: module.register_full_backward_hook(scaled_gradient),
    "full backward pre": lambda module: module.register_full_backward_pre_hook(scaled_before),
}


@pytest.mark.parametrize("hooks", [[name] for name in HOOKS] + [list(HOOKS)], ids=lambda hooks: "+".join(hooks))
@pytest.mark.parametrize("side", SIDES)
def test_hooks_see_and_change_what_they_do_without(side, hooks, calls, monkeypatch):
    model, plain = layer(side), nn.Linear(N, M, dtype=torch.float64)
    slice_ = next(grass_slices(model))
    plain.load_state_dict(model[0].state_dict())
    for name in hooks:
        HOOKS[name](model[0]), HOOKS[name](plain)
    x = batch((2, 3, N))
    ours = run(model, x)
    assert calls
    monkeypatch.setattr(Slice, "linear", lambda *_: None)
    theirs = run(model, x)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    x.grad = None
    plain(x).square().sum().backward()
    assert torch.equal(ours["x"], x.grad) and torch.equal(ours["0.bias"], plain.bias.grad)
    torch.testing.assert_close(ours["slice"], plain.weight.grad.index_select(slice_.dim, slice_.index))


@pytest.mark.parametrize("side", SIDES)
def test_attention_of_torchs_own_is_left_alone_and_what_stands_beside_it_is_tapped(side, calls):
    torch.manual_seed(4)
    plain = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    ours = converted(plain, side)
    assert {slice_.state.name for slice_ in grass_slices(ours)} == {"linear1", "linear2"}
    x = torch.randn(2, 5, 16)
    assert_gradients_of(plain, ours, x)
    assert calls == [side] * 2
    plain.eval(), ours.eval()
    with torch.no_grad():  # torch's fast path, which reads weights
        assert torch.equal(ours(x), plain(x))


def test_a_fast_path_under_gradients_is_none_of_the_modules_own():
    """Whoever multiplies by the attention's weights himself gets their gradients: they are ordinary parameters."""
    torch.manual_seed(4)
    plain = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    ours = converted(plain, "input")
    for model in (plain, ours):
        F.linear(torch.ones(1, 16), model.self_attn.out_proj.weight).sum().backward()
    assert torch.equal(ours.self_attn.out_proj.weight.grad, plain.self_attn.out_proj.weight.grad)
