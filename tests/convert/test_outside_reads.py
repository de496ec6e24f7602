"""Losses of one's own that read weights outside the model's forward: they stop before the first step."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from readers import Calls, Kernel, Product, Reader, tokens
from torch.utils.checkpoint import checkpoint

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.audit import outside
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.frozen_weight import FrozenWeight, show_operations

SETTINGS = {"density": 0.5, "target_modules": "all-matrices", "selection": "uniform_nr"}
NOTHING = torch._C._disabled_torch_function_impl


@pytest.fixture(autouse=True)
def no_others(monkeypatch):
    """Models of other tests may wait for their first step."""
    monkeypatch.setattr(outside, "_waiting", weakref.WeakSet())
    show_operations(None)


class Tied(Calls):
    def __init__(self):
        super().__init__()
        self.head.weight = self.table.weight


def hidden(model):
    return model.body(model.table(tokens()))


def weight(model, name="inner.b"):
    return model.get_submodule(name).weight


def converted(kind=Calls, **settings):
    gc.collect()  # models of tests that failed wait for a first step still
    model = convert_to_grass(kind(), GrassConfig(**{**SETTINGS, **settings}))
    return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2)


def all_weights(model):
    return [module.weight for module in model.modules() if hasattr(module, "weight")]


PENALTIES = {
    "square": lambda w: w.square().sum(),
    "operator": lambda w: 1e-4 * (w * w).sum(),
    "power of the right": lambda w: (2**w).sum(),
    "matmul": lambda w: (w.T @ w - torch.eye(w.shape[1])).norm(),
    "norm": torch.linalg.norm,
    "einsum": lambda w: torch.einsum("ij,ij->", w, w),
    "stack": lambda w: torch.stack([w, w]).abs().sum(),
    "cast": lambda w: w.float().abs().sum(),
    "rows": lambda w: sum(row.norm() for row in w),
    "a part": lambda w: w[:2].pow(2).sum(),
    "unchanged": lambda w: w.contiguous().to(torch.float32).abs().sum(),
    "functional": lambda w: F.mse_loss(w, torch.zeros_like(w)),
    "in place into the graph": lambda w: (torch.zeros_like(w).requires_grad_() * 1).add_(w).abs().sum(),
    "checkpoint": lambda w: checkpoint(lambda v: v.square().sum(), w, use_reentrant=False),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_a_weight_stops_with_a_remedy_that_works(penalty):
    model, optimizer = converted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"reads the weights of inner\.b without .* exclude_modules=\['inner\.b'\]"):
        (model(tokens()) + PENALTIES[penalty](weight(model))).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model, optimizer = converted(exclude_modules=["inner.b"])
    (model(tokens()) + PENALTIES[penalty](weight(model))).backward()
    optimizer.step()


FUSED = {
    "product": lambda model: F.linear(hidden(model), weight(model, "head")).logsumexp(-1).mean(),
    "function": lambda model: Product.apply(hidden(model), weight(model, "head")).logsumexp(-1).mean(),
    "kernel": lambda model: Kernel.apply(hidden(model), weight(model, "head")).mean(),
}


@pytest.mark.parametrize("kind", [Calls, Tied])
@pytest.mark.parametrize("loss", FUSED)
def test_a_fused_loss_over_a_head_stops(kind, loss):
    model, _ = converted(kind)
    name = "head" if kind is Calls else "table"
    with pytest.raises(RuntimeError, match=rf"reads the weights of {name} without .* exclude_modules=\['{name}'\]"):
        FUSED[loss](model).backward()


@pytest.mark.parametrize("first", [False, True])
def test_all_that_are_read_are_named_at_once(first):
    model, _ = converted()
    if not first:
        model(tokens()).backward()  # a micro-batch before
    with pytest.raises(
        RuntimeError, match=r"of table, inner\.a, inner\.b, inner\.c, head without .* all that is compr"
    ):
        (1e-4 * sum(each.square().sum() for each in all_weights(model)) + model(tokens())).backward()


def test_the_penalty_that_it_proposes_is_right():
    """Over the parameters with requires_grad: what a slice gets is what its weight would."""
    plain, (ours, _) = Calls(), converted()
    (plain(tokens()) + sum(param.square().sum() for param in plain.parameters())).backward()
    (ours(tokens()) + sum(param.square().sum() for param in ours.parameters() if param.requires_grad)).backward()
    for slice_ in grass_slices(ours):
        full = weight(plain, slice_.state.name).grad
        torch.testing.assert_close(slice_.active.grad, full.index_select(slice_.dim, slice_.index))


def looks(model):
    """What people do with weights and want no gradient of."""
    for each in all_weights(model):
        assert float(each.norm()) > 0 and each.shape and each.detach().numpy().any() and each.tolist()
        assert "Parameter" in repr(each) and each.is_leaf and each.data_ptr() and len(each)
        torch.zeros_like(each).add_(1.0)
        each.data.mean()
    with torch.no_grad():
        metric = F.linear(hidden(model), weight(model, "head")).logsumexp(-1).mean()
        metric = metric + Product.apply(hidden(model), weight(model, "head")).mean()
        weight(model).mul_(1.0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.save(model.state_dict(), io.BytesIO())
    assert torch.equal(weight(copies[0]), weight(model)) and float(metric)
    assert weight(model).to(torch.float32) is weight(model) is weight(model).contiguous()
    weight(model).mul_(1.0)
    tied = torch.nn.Linear(16, 16, bias=False)
    tied.weight = weight(model)
    return model(tokens()) + 0.0 * (weight(model).detach() * 2).sum()


@pytest.mark.parametrize("looked", [False, True])
def test_looking_is_let_alone_and_nothing_is_left_after_the_first_step(looked):
    model, optimizer = converted()
    assert FrozenWeight.__torch_function__ is not NOTHING
    (looks(model) if looked else model(tokens())).backward()
    optimizer.step()
    assert FrozenWeight.__torch_function__ is NOTHING
    model(tokens()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_in_checkpoints_are_the_models_own(reentrant):
    model, optimizer = converted()
    x = model.table(tokens())
    model.head(checkpoint(model.body, x, use_reentrant=reentrant)).square().sum().backward()
    assert all(slice_.active.grad is not None for slice_ in grass_slices(model))
    optimizer.step()


def test_a_copy_is_looked_at_and_a_restored_model_is_not():
    model = copy.deepcopy(converted()[0])
    model(tokens())
    with pytest.raises(RuntimeError, match=r"reads the weights of inner\.b"):
        weight(model).square().sum().backward()
    del model
    model, _ = converted()
    restore_model(model)
    assert model not in outside._waiting
    (model(tokens()) + weight(model).square().sum()).backward()
    assert weight(model).grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_compiled_once_and_its_loss_is_looked_at(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model, optimizer = converted(Reader, update_interval=100)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with pytest.raises(RuntimeError, match=r"reads the weights of inner\.b"):
        (compiled(tokens()) + weight(model).square().sum()).backward()
    for _ in range(2):
        compiled(tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1 and FrozenWeight.__torch_function__ is NOTHING


def test_a_compiled_forward_may_read_data():
    torch._dynamo.reset()
    plain, (ours, _) = Calls(), converted()
    assert torch.compile(ours, backend="eager", fullgraph=True)(tokens()) == plain(tokens())
