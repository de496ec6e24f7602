"""Weights that a model reads without calling their modules: found in the first forward, and trained in full."""

import copy
import io
import logging
import pickle

import pytest
import torch
from model_matrix import build
from readers import READERS, SETTINGS, Calls, Noisy, Reader, Routers, TiedHead, converted, hooks, modes, names, tokens
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.convert.audit.freeing import READ
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops.rows import take_rows


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", READERS)
def test_what_is_read_is_trained_in_full_with_the_plain_gradient(kind, training):
    plain, ours = kind().train(training), converted(kind, density=1.0).train(training)
    for model in (plain, ours):
        torch.manual_seed(1)
        model(tokens()).backward()
    assert {name for name, reason in ours.grass.left_out.items() if reason == READ} == set(kind.behind)
    weights = dict(plain.named_parameters())
    for name in kind.behind:
        assert torch.equal(ours.get_submodule(name).weight.grad, weights[f"{name}.weight"].grad)
    assert names(ours) and not names(ours) & set(kind.behind)
    for slice_ in grass_slices(ours):
        full = weights[f"{slice_.state.name}.weight"].grad.index_select(slice_.dim, slice_.index)
        torch.testing.assert_close(slice_.active.grad, full)
    assert not hooks(ours) and not modes()


def test_experts_that_are_read_directly_are_freed_one_by_one():
    def make():
        model = build("mixtral")
        block = model.model.layers[0].mlp
        block.register_forward_hook(lambda m, args, y: y + m.experts.down_proj.square().mean())
        return model

    plain, ours = make(), convert_to_grass(make(), GrassConfig(density=1.0))
    ids = torch.arange(3, 15).view(2, 6)
    for model in (plain, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    experts, expected = ours.model.layers[0].mlp.experts, plain.model.layers[0].mlp.experts
    name = "model.layers.0.mlp.experts.down_proj"
    assert [key for key, reason in ours.grass.left_out.items() if reason == READ] == [name]
    torch.testing.assert_close(experts.down_proj.grad, expected.down_proj.grad)
    slice_ = experts.gate_up_proj_slice
    torch.testing.assert_close(slice_.active.grad, take_rows(expected.gate_up_proj.grad, slice_.index, slice_.dim))


def test_looking_is_no_use():
    model = converted(Calls)
    model(tokens()).backward()
    assert "inner.b" in names(model) and not hooks(model)
    assert READ not in model.grass.left_out.values()


def test_it_is_told_once_and_stands_with_the_reasons(caplog):
    model = converted(Routers)
    with caplog.at_level(logging.WARNING, "grass_hf.convert.audit.freeing"):
        for _ in range(2):
            model(tokens())
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("grass_hf")]
    assert "inner.b" in said


class Object:
    pass


class TakesAnObject(Noisy):
    def forward(self, ids, cache=None):
        return super().forward(ids)


@pytest.mark.parametrize("already", [None, ["inner.c"], r"inner\.c"], ids=str)
def test_an_input_that_may_have_changed_is_answered_with_a_remedy_that_works(already):
    model = converted(TakesAnObject, exclude_modules=already)
    compressed = names(model)
    with pytest.raises(RuntimeError, match="taken a Object") as error:
        model(tokens(), cache=Object())
    assert not modes()
    written = str(error.value).partition("exclude_modules=")[2]
    for remedy in (
        eval(written.partition(" (in optim_args")[0]),
        parse_optim_args(f"exclude_modules={written.partition('optim_args: exclude_modules=')[2].removesuffix(').')}")
        .config.exclude_modules,
    ):  # fmt: skip
        again = converted(TakesAnObject, exclude_modules=remedy)
        again(tokens(), cache=Object()).backward()
        assert names(again) == compressed - {"inner.b"}


@pytest.mark.parametrize(
    "batch", [{"ids": tokens()}, {"ids": [tokens()]}, {"ids": ({"x": tokens()},)}], ids=["0", "1", "2"]
)
def test_lists_and_mappings_are_given_to_the_second_forward_as_they_were(batch):
    class TakesApart(Routers):
        def forward(self, ids):
            while not isinstance(ids, torch.Tensor):
                ids = ids.pop("x") if isinstance(ids, dict) else ids[0] if isinstance(ids, tuple) else ids.pop()
            ids.masked_fill_(ids == ids[0, 0], 1)
            return super().forward(ids)

    batch = copy.deepcopy(batch)
    model = converted(TakesApart)
    model(**batch).backward()
    assert "inner.b" not in names(model)


def test_nothing_else_left_to_compress_is_a_sentence():
    model = convert_to_grass(Routers(), GrassConfig(target_modules=["inner.b"]))
    with pytest.raises(RuntimeError, match="nothing else would be compressed"):
        model(tokens())


class Raises(Noisy):
    error: BaseException | None = None

    def read(self, x):
        if self.error is not None:
            raise self.error
        return super().read(x)


@pytest.mark.parametrize("error", [ZeroDivisionError("the user's own"), KeyboardInterrupt("stop")], ids=str)
def test_a_forward_that_raises_leaves_nothing_behind(error):
    model = converted(Raises)
    model.error = error
    with pytest.raises(type(error), match=str(error)) as caught:
        model(tokens())
    assert caught.traceback[-1].name == "read" and caught.value.__context__ is None
    model.error = None
    losses = []
    for other in (model, converted(Raises)):
        torch.manual_seed(1)
        losses.append(other(tokens()))
    losses[0].backward()
    # nothing of the first call was taken up by the second, its random state say
    assert losses[0] == losses[1]
    assert "inner.b" not in names(model) and not modes() and not hooks(model)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_is_looked_at_for_itself(way):
    model = converted(TiedHead)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    copied(tokens()).backward()
    assert "table" not in names(copied) and "table" in names(model)
    assert copied.table.weight.grad is not None and model.table.weight.grad is None
    assert not hooks(copied) and hooks(model)
    model(tokens()).backward()
    assert "table" not in names(model)


def test_evaluation_is_not_looked_at_and_a_restored_model_has_no_hooks():
    model = converted(Routers)
    with torch.no_grad():
        model(tokens())
    assert hooks(model) and "inner.b" in names(model)
    restore_model(model)
    assert not hooks(model)


def test_a_part_that_is_called_by_itself_is_looked_at():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Routers()

    model = convert_to_grass(Outer(), GrassConfig(**{**SETTINGS, "exclude_modules": None}))
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=0.1)
    before = model.inner.inner["b"].weight.clone()
    model.inner(tokens()).backward()
    optimizer.step()
    assert not torch.equal(model.inner.inner["b"].weight, before) and not hooks(model)


def test_a_model_that_gets_another_forward_is_looked_at_again():
    model = converted(Reader)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=0.1)
    for step in range(6):
        model(tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            model.inner["b"].forward, model.__class__ = model.inner["b"].forward, Reader
            model.read = Routers.read.__get__(model)
            model.forward = model.forward
    assert "inner.b" not in names(model) and model.inner["b"].weight in optimizer.state


@pytest.mark.parametrize("kind", [Reader, Routers])
def test_a_compiled_model_is_compiled_once_and_has_the_neighbours_rule(kind):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = converted(kind, update_interval=100, selection="uniform_nr", exclude_modules=None)
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=0.1)
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(tokens()).backward()
        if kind is Routers:
            with pytest.raises(RuntimeError, match=r"inner.b\. .* exclude_modules=\['inner.b'\]"):
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1
