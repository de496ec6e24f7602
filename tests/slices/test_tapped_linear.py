"""Product and tap as one node: to the bit what `F.linear` and a tap beside it give, whatever is done to the tensors."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from grass_hf import GrassConfig, convert_to_grass
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops import tapped_linear
from grass_hf.slices.slice import Slice

M, N = 12, 10


def layer(side, bias=True, dtype=torch.float64, **settings):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(N, M, bias=bias, dtype=dtype))
    settings = {"density": 0.5, "selection": "uniform_nr", **settings}
    return convert_to_grass(model, GrassConfig(side=side, **settings))


def batch(shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(5)).requires_grad_()


def run(model, x, after=lambda y: y.square().sum(), context=nullcontext):
    """The output, and the gradients of the input, of the bias and of the slice."""
    for param in [x, *model.parameters()]:
        param.grad = None
    with context():
        y = model(x)
        after(y).backward()
    slice_ = next(grass_slices(model))
    found = {"y": y.detach().clone(), "x": x.grad, "slice": slice_.active.grad}
    return found | {name: param.grad for name, param in model.named_parameters() if name.endswith("bias")}


def assert_alike(model, x, monkeypatch, **options):
    calls = []
    real = tapped_linear.tapped_linear
    with monkeypatch.context() as patch:
        patch.setattr("grass_hf.slices.slice.tapped_linear", lambda *a, **k: calls.append(1) or real(*a, **k))
        ours = run(model, x, **options)
        patch.setattr(Slice, "linear", lambda *_: None)
        theirs = run(model, x, **options)
    assert calls, "the short way was not taken"
    for name, value in theirs.items():
        assert (value is None and ours[name] is None) or torch.equal(ours[name], value), name


SHAPES = {"1-D": (N,), "2-D": (6, N), "3-D": (2, 3, N), "4-D": (2, 2, 3, N), "no tokens": (0, N)}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["output", "input"])
def test_it_is_the_product_and_the_tap(side, shape, bias, monkeypatch):
    assert_alike(layer(side, bias), batch(SHAPES[shape]), monkeypatch)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(side, dtype, monkeypatch):
    assert_alike(layer(side, dtype=dtype), batch((4, 7, N), dtype), monkeypatch)


@pytest.mark.parametrize("side", ["output", "input"])
def test_multipliers(side, monkeypatch):
    assert_alike(layer(side, selection="uniform"), batch((6, N)), monkeypatch)


def strided(x):
    return x.mT.contiguous().mT


VIEWS = {"transposed": strided, "expanded": lambda x: x[:1].expand(4, *x.shape[1:]), "every other": lambda x: x[::2]}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("side", ["output", "input"])
def test_memory_that_is_not_contiguous(side, view, monkeypatch):
    class Viewed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(VIEWS[view](x))

    model = Viewed(layer(side))
    assert_alike(model, batch((6, N)), monkeypatch, after=lambda y: strided(y).exp().sum())
    assert_alike(model, batch((6, N)), monkeypatch, after=lambda y: y.sum())  # dY is one number, expanded


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", ["2-D", "3-D"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_outputs_that_are_changed_in_place(side, shape, bias, monkeypatch):
    assert_alike(layer(side, bias), batch(SHAPES[shape]), monkeypatch, after=lambda y: y.add_(1).relu_().square().sum())


@pytest.mark.parametrize("side", ["output", "input"])
def test_inputs_that_want_no_gradient(side, monkeypatch):
    assert_alike(layer(side), batch((6, N)).detach(), monkeypatch)


@pytest.mark.parametrize("inside", [False, True], ids=["", "backward inside"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_autocast(side, inside, monkeypatch):
    model, x = layer(side, dtype=torch.float32), batch((4, 7, N), torch.float32)

    def after(y):
        return y.float().square().sum()

    if inside:
        assert_alike(model, x, monkeypatch, after=after, context=lambda: torch.autocast("cpu", torch.bfloat16))
        return

    class Autocast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    assert_alike(Autocast(model), x, monkeypatch, after=after)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("side", ["output", "input"])
def test_checkpointing_and_saved_tensors_elsewhere(side, reentrant, monkeypatch):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model = layer(side)
    assert_alike(Checkpointed(model), batch((6, N)), monkeypatch)
    assert_alike(model, batch((6, N)), monkeypatch, context=lambda: torch.autograd.graph.save_on_cpu())


@pytest.mark.parametrize("side", ["output", "input"])
def test_an_input_that_is_changed_before_backward_is_noticed_as_without_grass(side):
    """Where columns were taken in forward the slice has no need of the input; of the weight's own it is autograd's."""
    model, x = layer(side), batch((6, N))
    inner = x * 1.0
    y = model(inner)
    inner.mul_(2)
    if side == "output":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        expected = torch.ones(6, M, dtype=torch.float64).T @ x.detach()[:, next(grass_slices(model)).index]
        y.sum().backward()
        assert torch.allclose(next(grass_slices(model)).active.grad, expected)


class Projections(nn.Module):
    """Three layers that read one input, or what became of it in between."""

    def __init__(self, between):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(N, M, dtype=torch.float64) for _ in range(3))
        self.between = between

    def forward(self, x):
        h = x * 1.0
        q = self.q(h)
        with torch.no_grad():
            h_again = self.between(h)
        return q + self.k(h_again if h_again is not None else h) + self.v(h)


BETWEEN = {
    "nothing": lambda h: None,
    "another of its shape": lambda h: h + 1.0,
    "a view of it": lambda h: h.flip(0),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("side", ["output", "input"])
def test_columns_that_are_shared_are_of_the_right_input(side, between):
    torch.manual_seed(1)
    plain = Projections(BETWEEN[between])
    model = convert_to_grass(copy.deepcopy(plain), GrassConfig(density=0.5, side=side, selection="uniform_nr"))
    for seed in (0, 1):
        x = torch.randn(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for each in (plain, model):
            each.zero_grad()
            each(x.clone().requires_grad_()).square().sum().backward()
        for slice_ in grass_slices(model):
            full = plain.get_submodule(slice_.state.name.removesuffix(".weight")).weight.grad
            taken = full.index_select(slice_.dim, slice_.index)
            assert torch.allclose(slice_.active.grad, taken, rtol=1e-12, atol=0), slice_.state.name


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(N, M)))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(Doubled(N, M)), parametrized], ids=["subclass", "parametrized"])
def test_what_is_not_a_plain_linear_layer_keeps_its_own_forward(make):
    torch.manual_seed(2)
    plain = make()
    model = copy.deepcopy(plain)
    try:
        convert_to_grass(model, GrassConfig(density=1.0))
    except ValueError:
        return  # it is no target, so its weight is trained in full
    x = torch.randn(4, N)
    assert torch.equal(model(x), plain(x))
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    slice_ = next(grass_slices(model))
    own = plain[0].weight.grad.index_select(slice_.dim, slice_.index)
    assert torch.allclose(slice_.active.grad, own, rtol=1e-5)


def test_gradients_of_gradients_stop():
    model, x = layer("input"), batch((6, N))
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="slice"):
        grad.square().sum().backward()


def test_two_backward_passes_of_one_graph():
    model, x = layer("input"), batch((6, N))
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    slice_ = next(grass_slices(model))
    once = slice_.active.grad.clone()
    loss.backward()
    assert torch.equal(slice_.active.grad, 2 * once)
