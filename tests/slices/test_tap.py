"""The tap's slice gradient is autograd's through `W.index_copy(...)`: sides, dtypes, shapes, calls, checkpointing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grass_hf import GrassConfig, convert_to_grass
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops.row_norms import squared_norms
from grass_hf.slices.ops.tap import tap

pytestmark = pytest.mark.oldest

M, N, R = 10, 14, 4
INDEX = torch.tensor([1, 4, 5, 8])
SHAPES = {"1-D": (N,), "2-D": (6, N), "3-D": (2, 3, N)}


def tensors(shape, dtype=torch.float64):
    draws = torch.Generator().manual_seed(1)
    make = lambda *s: torch.randn(*s, generator=draws, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(*shape), make(M, N), make(M), make(*shape[:-1], M)


def along(vector, side):
    return vector[:, None] if side == "output" else vector


def tapped(x, weight, bias, active, side, rho=None, norms=None):
    return tap(F.linear(x, weight, bias), x, active, INDEX, side=side, multiplier=rho, norms=norms)


@pytest.mark.parametrize(
    "side, shape, bias, weighted",
    list(itertools.product(["output", "input"], SHAPES, [True, False], [True, False])),
)
def test_gradient_is_autograds_through_index_copy(side, shape, bias, weighted):
    x, weight, b, dy = tensors(SHAPES[shape])
    b = b.requires_grad_() if bias else None
    rho = torch.tensor([0.5, 2.0, 1.5, 1.0], dtype=torch.float64) if weighted else None
    dim = 0 if side == "output" else 1
    rows = weight.index_select(dim, INDEX)

    active = rows.clone().requires_grad_()
    x_ours = x.clone().requires_grad_()
    y = tapped(x_ours, weight, b, active, side, rho)
    y.backward(dy)
    ours = active.grad, x_ours.grad, b.grad.clone() if bias else None

    if bias:
        b.grad = None
    scaled = (rows if rho is None else rows / along(rho, side)).requires_grad_()
    full = weight.index_copy(dim, INDEX, scaled if rho is None else scaled * along(rho, side))
    x_auto = x.clone().requires_grad_()
    y_auto = F.linear(x_auto, full, b)
    y_auto.backward(dy)
    theirs = scaled.grad, x_auto.grad, b.grad if bias else None

    torch.testing.assert_close(y, y_auto, rtol=0, atol=1e-13)
    for mine, auto in zip(ours, theirs, strict=True):
        assert (mine is None) == (auto is None)
        if mine is not None:
            torch.testing.assert_close(mine, auto, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", ["output", "input"])
def test_norms_are_those_of_the_full_gradient_summed_over_micro_batches(side):
    _, weight, _, _ = tensors((6, N))
    active = weight.index_select(0 if side == "output" else 1, INDEX).requires_grad_()
    norms = torch.zeros(M if side == "output" else N, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros_like(norms)
    for seed in range(3):
        torch.manual_seed(seed)
        x, dy = torch.randn(5, N, dtype=torch.float64), torch.randn(5, M, dtype=torch.float64)
        tapped(x, weight, None, active, side, norms=norms).backward(dy)
        expected = expected + (dy.t() @ x).square().sum(dim=1 if side == "output" else 0)
    torch.testing.assert_close(norms.grad, expected)


@pytest.mark.parametrize("block", [1, 3, 10, 256])
def test_block_size_does_not_change_norms(block):
    a, b = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 14, dtype=torch.float64)
    torch.testing.assert_close(squared_norms(a, b, block), (a.t() @ b).square().sum(1))


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_and_single_precision_equal_autograds_rows(dtype, side):
    x, weight, _, dy = tensors((6, N), dtype)
    active = weight.index_select(0 if side == "output" else 1, INDEX).requires_grad_()
    tapped(x, weight, None, active, side).backward(dy)
    full = weight.clone().requires_grad_()
    F.linear(x, full).backward(dy)
    assert active.grad.dtype == dtype
    exact = (dy.double().t() @ x.double()).index_select(0 if side == "output" else 1, INDEX)
    torch.testing.assert_close(
        active.grad, full.grad.index_select(0 if side == "output" else 1, INDEX), rtol=0.02, atol=1e-2
    )
    torch.testing.assert_close(active.grad.double(), exact, rtol=0.02, atol=2e-2)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_equals_autograds_rows(side, backward_inside):
    x, weight, bias, dy = tensors((6, N), torch.float32)
    active = weight.index_select(0 if side == "output" else 1, INDEX).requires_grad_()
    full = weight.clone().requires_grad_()
    grads = []
    for leaf, forward in (
        (active, lambda: tapped(x, weight, bias, active, side)),
        (full, lambda: F.linear(x, full, bias)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward()
            assert y.dtype == torch.bfloat16
            if backward_inside:
                y.backward(dy.bfloat16())
        if not backward_inside:
            y.backward(dy.bfloat16())
        assert leaf.grad.dtype == torch.float32
        grads.append(leaf.grad)
    expected = grads[1].index_select(0 if side == "output" else 1, INDEX)
    torch.testing.assert_close(grads[0], expected, rtol=0.01, atol=0.01)


def model_of(side, observing=False, **options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh()).double()
    convert_to_grass(model, GrassConfig(density=0.5, side=side, **options))
    for slice_ in grass_slices(model):
        if observing:
            slice_.observe()
    return model


def gradients(model):
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return found + [slice_.norms.grad.clone() for slice_ in grass_slices(model) if slice_.norms is not None]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_gradient_checkpointing(side, observing, reentrant):
    x = torch.randn(4, 8, dtype=torch.float64)
    plain, saved = model_of(side, observing), model_of(side, observing)
    plain(x).square().sum().backward()
    checkpoint(saved, x.clone().requires_grad_(reentrant), use_reentrant=reentrant).square().sum().backward()
    for expected, found in zip(gradients(plain), gradients(saved), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_module_called_twice_adds_both_gradients(side):
    layer = nn.Linear(8, 8).double()
    model = nn.Sequential(layer)
    reference = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone()
    convert_to_grass(model, GrassConfig(rank=3, side=side))
    x = torch.randn(4, 8, dtype=torch.float64)
    model(torch.tanh(model(x))).square().sum().backward()
    F.linear(torch.tanh(F.linear(x, reference, bias)), reference, bias).square().sum().backward()
    expected = reference.grad.index_select(layer.weight_slice.dim, layer.weight_slice.index)
    torch.testing.assert_close(layer.weight_slice.active.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("observing", [False, True])
def test_frozen_inputs_and_in_place_use_of_the_output(side, observing):
    """x needs no gradient, and the model modifies y in place: the values are autograd's all the same."""
    model = model_of(side, observing)
    layer = model[0]
    x = torch.randn(4, 8, dtype=torch.float64)
    reference = layer.weight.detach().clone().requires_grad_()
    y = layer(x)
    y += 1.0  # models do this; a view made inside a custom function would refuse it
    (torch.relu_(y) ** 2).sum().backward()
    (torch.relu(F.linear(x, reference, layer.bias.detach()) + 1.0) ** 2).sum().backward()
    expected = reference.grad.index_select(layer.weight_slice.dim, layer.weight_slice.index)
    torch.testing.assert_close(layer.weight_slice.active.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_module_called_twice_adds_the_norms_of_each_call(side):
    """[Note: norms as a gradient]: squared norms of the single contributions, not of their sum."""
    layer = nn.Linear(8, 8, bias=False).double()
    reference = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    convert_to_grass(model, GrassConfig(rank=3, side=side))
    slice_ = layer.weight_slice
    slice_.observe()
    xs = torch.randn(2, 4, 8, dtype=torch.float64)
    (layer(xs[0]).sin().sum() + layer(xs[1]).sin().sum()).backward()
    expected = torch.zeros(8, dtype=torch.float64)
    for x in xs:
        full = F.linear(x, reference).cos().t() @ x  # dL/dy = cos(y)
        expected += full.square().sum(dim=-1 if side == "output" else -2)
    torch.testing.assert_close(slice_.end_observation(), expected)


@pytest.mark.parametrize("side", ["output", "input"])
def test_multipliers_reach_the_slice_and_not_the_norms(side):
    """Scores are those of G, whatever rho the rows of the current slice carry."""
    x, weight, _, dy = tensors((6, N))
    active = weight.index_select(0 if side == "output" else 1, INDEX).requires_grad_()
    norms = torch.zeros(M if side == "output" else N, dtype=torch.float64, requires_grad=True)
    rho = torch.tensor([0.5, 2.0, 1.5, 3.0], dtype=torch.float64)
    tapped(x, weight, None, active, side, rho, norms).backward(dy)
    full = dy.t() @ x
    dim = 0 if side == "output" else 1
    torch.testing.assert_close(norms.grad, full.square().sum(dim=1 - dim))
    torch.testing.assert_close(active.grad, full.index_select(dim, INDEX) * along(rho, side))


@pytest.mark.parametrize("side", ["output", "input"])
def test_slice_more_precise_than_its_weight(side):
    """A float32 slice with multipliers over a bfloat16 weight, as with-replacement rules make it."""
    x, weight, _, dy = tensors((6, N), torch.bfloat16)
    dim = 0 if side == "output" else 1
    active = weight.index_select(dim, INDEX).float().requires_grad_()
    rho = torch.tensor([0.5, 2.0, 1.5, 3.0])
    tapped(x, weight, None, active, side, rho).backward(dy)
    exact = (dy.double().t() @ x.double()).index_select(dim, INDEX) * along(rho, side)
    assert active.grad.dtype == torch.float32
    torch.testing.assert_close(active.grad.double(), exact, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_half_precision_gradients_do_not_overflow(dtype, side):
    """Squares are taken in float32: 300^2 is beyond float16."""
    x, weight, _, dy = tensors((6, N), dtype)
    dy = dy * 100
    active = weight.index_select(0 if side == "output" else 1, INDEX).requires_grad_()
    norms = torch.zeros(M if side == "output" else N, requires_grad=True)
    tapped(x, weight, None, active, side, norms=norms).backward(dy)
    exact = (dy.double().t() @ x.double()).square().sum(dim=1 if side == "output" else 0)
    assert norms.grad.dtype == torch.float32
    torch.testing.assert_close(norms.grad.double(), exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("x_dtype, dy_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_autocast_input_and_bias_gradients_are_untouched(side, backward_inside, x_dtype, dy_dtype):
    """dX and the bias gradient under autocast are bit for bit the ordinary layer's."""
    x, weight, bias, dy = tensors((6, N), torch.float32)
    found = []
    for ours in (True, False):
        leaf_x, leaf_b = x.to(x_dtype).requires_grad_(), bias.clone().requires_grad_()
        active = weight.index_select(0 if side == "output" else 1, INDEX).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if ours:
                y = tapped(leaf_x, weight, leaf_b, active, side)
            else:
                y = F.linear(leaf_x, weight, leaf_b)
            if backward_inside:
                y.backward(dy.to(dy_dtype))
        if not backward_inside:
            y.backward(dy.to(dy_dtype))
        found.append((y, leaf_x.grad, leaf_b.grad))
    for mine, plain in zip(*found, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["output", "input"])
def test_backward_inside_autocast_keeps_full_precision_gradients(side, dtype):
    """A layer that ran outside autocast keeps its precision when backward runs inside, as autograd's own do."""
    x, weight, _, dy = tensors((6, N), dtype)
    dim = 0 if side == "output" else 1
    active = weight.index_select(dim, INDEX).requires_grad_()
    norms = torch.zeros(weight.shape[dim], dtype=dtype, requires_grad=True)
    y = tapped(x, weight, None, active, side, norms=norms)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    full = dy.double().t() @ x.double()
    torch.testing.assert_close(active.grad.double(), full.index_select(dim, INDEX), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms.grad.double(), full.square().sum(dim=1 - dim), rtol=1e-5, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_gradients(context):
    model = model_of("input", observing=True)
    with context():
        assert not model(torch.randn(2, 8, dtype=torch.float64)).requires_grad
    assert model[0].weight_slice.norms.grad is None
