"""Experts with a forward of their own: each kind of product is found and tapped, and what is not understood is left."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from helpers import check_resumes
from matrix_cases import build, case
from torch import nn
from torch.utils.checkpoint import checkpoint

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops import row_norms
from grass_hf.slices.ops.products import Layout, layouts
from grass_hf.slices.ops.rows import put_rows, take_rows

E, M, N, T = 4, 12, 8, 24


class Experts(nn.Module):
    def __init__(self, *shape, dtype=torch.float64):
        super().__init__()
        self.num_experts = E
        draws = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=draws).to(dtype))


class Looped(Experts):
    """As JetMoE's: (E, M, N), one product per expert."""

    def __init__(self, **kwargs):
        super().__init__(E, M, N, **kwargs)

    def forward(self, inputs, expert_size):
        return torch.cat([F.linear(x, w) for x, w in zip(inputs.split(expert_size), self.weight, strict=True)])


class Turned(Experts):
    """(E, N, M), by the operator."""

    def __init__(self, **kwargs):
        super().__init__(E, N, M, **kwargs)

    def forward(self, inputs, expert_size):
        return torch.cat([x @ self.weight[e] for e, x in enumerate(inputs.split(expert_size))])


class Batched(Experts):
    """As Llama 4's: (E, N, M), one product for all."""

    def __init__(self, **kwargs):
        super().__init__(E, N, M, **kwargs)

    def forward(self, inputs):
        return torch.bmm(inputs.view(E, -1, N), self.weight).view(-1, M)


class BatchedTurned(Experts):
    """As Inkling's: (E, M, N), turned, the same tokens for all."""

    def __init__(self, **kwargs):
        super().__init__(E, M, N, **kwargs)

    def forward(self, inputs):
        x = inputs.unsqueeze(0).expand(E, -1, -1)
        return torch.bmm(x, self.weight.transpose(1, 2)).sum(0)


class Flat(Experts):
    """As DBRX's: (E M, N), a view per expert."""

    def __init__(self, **kwargs):
        super().__init__(E * M, N, **kwargs)

    def forward(self, inputs, expert_size):
        views = self.weight.view(E, M, N)
        return torch.cat([x.matmul(views[e].T) for e, x in enumerate(inputs.split(expert_size))])


class FlatBatched(nn.Linear):
    """As DeepSeek V4's: a linear layer of E groups."""

    def __init__(self, dtype=torch.float64):
        super().__init__(N, E * M, bias=False, dtype=dtype)
        self.n_groups = E

    def forward(self, x):
        w = self.weight.view(self.n_groups, -1, N).transpose(1, 2)
        return torch.bmm(x.reshape(-1, self.n_groups, N).transpose(0, 1), w).transpose(0, 1).reshape(-1, M)


KINDS = [Looped, Turned, Batched, BatchedTurned, Flat, FlatBatched]


def inputs_of(module, dtype=torch.float64):
    x = torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    # one expert has no tokens
    return (x, [10, 0, 9, 5]) if isinstance(module, Looped | Turned | Flat) else (x,)


def loss_of(module, inputs):
    return module(*inputs).sin().sum()


def converted(module, side="output", density=0.25, **settings):
    model = nn.ModuleDict({"experts": copy.deepcopy(module), "other": nn.Linear(2, 2)})
    convert_to_grass(model, GrassConfig(density=density, side=side, target_modules=["experts"], **settings))
    return model


def test_the_layout_of_each_kind():
    found = {cls.__name__: layouts(cls())["weight"] for cls in KINDS}
    assert found == {
        "Looped": Layout(E, M, False),
        "Turned": Layout(E, N, True),
        "Batched": Layout(E, N, True),
        "BatchedTurned": Layout(E, M, False),
        "Flat": Layout(E, M, False),
        "FlatBatched": Layout(E, M, False),
    }


@pytest.mark.parametrize("observing", [False, True], ids=["", "observing"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("rule", ["top_r", "multinomial_norm"])
@pytest.mark.parametrize("cls", KINDS)
def test_gradients_are_autograds(cls, rule, side, observing):
    plain = cls()
    inputs = inputs_of(plain)
    x = inputs[0].requires_grad_()
    loss_of(plain, inputs).backward()
    expected, dx, x.grad = plain.weight.grad, x.grad, None
    model = converted(plain, side, selection=rule)
    slice_ = next(grass_slices(model))
    if rule == "multinomial_norm":
        slice_.rho.copy_(torch.rand(slice_.rho.shape, generator=torch.Generator().manual_seed(3)))
    if observing:
        slice_.observe()
    assert torch.equal(model["experts"](*inputs), plain(*inputs))
    loss_of(model["experts"], inputs).backward()
    torch.testing.assert_close(x.grad, dx, rtol=0, atol=1e-13)
    rows = take_rows(expected, slice_.index, slice_.dim)
    if slice_.rho is not None:
        rows = rows * slice_.rho.unsqueeze(-1 if slice_.dim == -2 else -2)
    torch.testing.assert_close(slice_.active.grad, rows, rtol=0, atol=1e-12)
    assert slice_.active.numel() == plain.weight.numel() // 4 and slice_.weight.grad is None
    if observing:
        norms = expected.square().sum(-1 if slice_.dim == -2 else -2)
        torch.testing.assert_close(slice_.norms.grad, norms, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("cls", [Looped, Batched, Flat, FlatBatched])
def test_steps_move_the_selected_rows_as_plain_steps_do(cls, side):
    plain = cls()
    model = converted(plain, side, update_interval=2)
    inputs, optimizer = inputs_of(plain), grass_optimizer(model, torch.optim.SGD, lr=0.01)
    slice_, seen = next(grass_slices(model)), set()
    for _ in range(6):
        theirs = copy.deepcopy(plain)
        theirs.weight.data.copy_(slice_.weight)
        loss_of(theirs, inputs).backward()
        with torch.no_grad():
            rows = take_rows(theirs.weight - 0.01 * theirs.weight.grad, slice_.index, slice_.dim)
            put_rows(theirs.weight, slice_.index, rows, slice_.dim)
            expected = theirs.weight
        loss_of(model["experts"], inputs).backward()
        seen.add(tuple(slice_.index.flatten().tolist()))
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(slice_.weight, expected, rtol=0, atol=1e-13)
    assert len(seen) > 1  # other rows were chosen on the way
    assert type(restore_model(model)["experts"]) is cls


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cls", [Looped, Batched, Flat])
def test_checkpointing_autocast_and_copies(cls, reentrant):
    model = converted(cls(dtype=torch.float32))
    x, *rest = inputs_of(model["experts"], torch.float32)
    x.requires_grad_()
    results = []
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = checkpoint(copied["experts"], x, *rest, use_reentrant=reentrant)
            assert out.dtype == torch.bfloat16
        out.float().sin().sum().backward()
        results.append(next(grass_slices(copied)).active.grad)
        assert results[-1].dtype == torch.float32 and results[-1].any()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("cls", KINDS)
def test_no_tensor_of_full_size_in_backward(monkeypatch, cls, side):
    monkeypatch.setattr(row_norms.squared_norms, "__defaults__", (4,))
    monkeypatch.setitem(globals(), "M", 26)
    monkeypatch.setitem(globals(), "N", 22)
    model = converted(cls(), side, update_interval=2, stagger=1)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
    slice_ = next(grass_slices(model))
    x, *rest = inputs_of(model["experts"])
    x, rest = x[:12], [[5, 0, 4, 3]] if rest else []
    forbidden = {E * M * N, M * N}
    for number in range(3):
        assert (slice_.norms is not None) == (number % 2 == 0)
        loss = loss_of(model["experts"], (x, *rest))
        mode = Allocations()
        mode.weights = frozenset([slice_.weight.untyped_storage().data_ptr()])
        with mode:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        assert not mode.sizes & forbidden


def test_input_side_keeps_only_selected_columns_for_backward():
    def saved(side):
        model, kept = converted(Batched(), side, selection="uniform_nr"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model["experts"](*inputs_of(model["experts"]))
        return {t.numel() for t in kept if t.is_floating_point()}

    assert T * N in saved("output") and T * N // 4 not in saved("output")
    assert T * N not in saved("input") and T * N // 4 in saved("input")


class Odd(Looped):
    """Reads its weight beside the products."""

    def forward(self, inputs, expert_size):
        return super().forward(inputs, expert_size) * self.weight.square().mean()


class Parts(Looped):
    """Multiplies with halves of the matrices."""

    def forward(self, inputs, expert_size):
        low, high = self.weight.chunk(2, dim=1)
        triples = zip(inputs.split(expert_size), low, high, strict=True)
        return torch.cat([torch.cat([x @ a.T, x @ b.T], 1) for x, a, b in triples])


class Cast(Looped):
    """Multiplies with a copy."""

    def forward(self, inputs, expert_size):
        pairs = zip(inputs.split(expert_size), self.weight, strict=True)
        return torch.cat([F.linear(x.float(), w.float()) for x, w in pairs])


@pytest.mark.parametrize("cls", [Odd, Parts, Cast])
def test_a_forward_that_is_not_understood_is_left_in_full(cls):
    assert layouts(cls()) == {}
    model = nn.ModuleDict({"experts": cls(), "other": nn.Linear(8, 8)})
    convert_to_grass(model, GrassConfig(density=0.25, target_modules="all-linear"))
    assert [slice_.state.name for slice_ in grass_slices(model)] == ["other"]
    assert model["experts"].weight.requires_grad and type(model["experts"]) is cls


class Sometimes(Looped):
    """Reads its weight in training only."""

    def forward(self, inputs, expert_size):
        y = super().forward(inputs, expert_size)
        return y + self.weight.sum() if torch.is_grad_enabled() else y


def test_a_use_that_the_trial_did_not_see_stops_the_forward():
    model = converted(Sometimes())
    with pytest.raises(RuntimeError, match=r"Sometimes uses a weight in another way.*exclude_modules=\['experts'\]"):
        model["experts"](*inputs_of(model["experts"]))


def test_a_conversion_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)

    class Noisy(Looped):
        def forward(self, inputs, expert_size):
            return super().forward(inputs + torch.rand_like(inputs), expert_size)

    model = nn.ModuleDict({"experts": Noisy()})
    torch.manual_seed(0)
    convert_to_grass(model, GrassConfig(density=0.25))
    assert len(list(grass_slices(model))) == 1
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["llama4_text:Llama4ForCausalLM", "dbrx:DbrxForCausalLM"])
def test_resumes_bit_for_bit(name):
    def run(model, optimizer, numbers):
        losses = []
        for number in numbers:
            ids = torch.randint(3, 48, (2, 16), generator=torch.Generator().manual_seed(number))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def start():
        model = convert_to_grass(build(case(name)).eval(), GrassConfig(density=0.25, update_interval=3))
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2)

    check_resumes(start, run)
