"""Weights that a model reads without calling their modules: found in the first forward, and trained in full."""

import copy
import io
import logging
import pickle

import pytest
import torch
from forks import ranks
from readers import READERS, Calls, Noisy, Reader, Routers, TiedHead, tokens
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert import grass_slices
from grass_hf.freeing import READ
from grass_hf.optim_args import parse_optim_args

SETTINGS = {"density": 0.5, "update_interval": 2, "target_modules": "all-matrices", "exclude_modules": ["inner.c"]}


def converted(kind, **settings):
    return convert_to_grass(kind(), GrassConfig(**{**SETTINGS, **settings}))


def names(model):
    return {part.state.name for part in grass_slices(model)}


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def modes():
    return torch.utils._python_dispatch._get_current_dispatch_mode_stack()


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
    for part in grass_slices(ours):
        full = weights[f"{part.state.name}.weight"].grad.index_select(part.dim, part.index)
        torch.testing.assert_close(part.active.grad, full)
    assert not hooks(ours) and not modes()


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("kind", READERS)
def test_the_run_is_that_of_a_model_from_which_the_weight_was_excluded(kind, made):
    """Bit for bit, with masks, running means, decay and a schedule; the optimizer made before the first forward too."""
    runs = {}
    for excluded in (False, True):
        # with turns (stagger) the layers that are left would have others
        excludes = ["inner.c", *(kind.behind if excluded else ())]
        model = converted(kind, exclude_modules=excludes, stagger=1)
        if made == "after" and not excluded:
            state = torch.get_rng_state()
            buffers = copy.deepcopy(dict(model.named_buffers()))
            model(tokens())
            torch.set_rng_state(state)
            model.load_state_dict({k: v for k, v in buffers.items() if "slice" not in k}, strict=False)
        optimizer = grass_optimizer(model, torch.optim.SGD, lr=0.3, weight_decay=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        groups = len(optimizer.param_groups)
        torch.manual_seed(1)
        losses = []
        for step in range(5):
            loss = model(tokens(step))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert len(optimizer.param_groups) == groups
        runs[excluded] = losses, restore_model(model).state_dict()
    assert runs[False][0] == runs[True][0]
    for name, value in runs[False][1].items():
        assert torch.equal(value, runs[True][1][name]), name


def test_looking_is_no_use():
    model = converted(Calls)
    model(tokens()).backward()
    assert "inner.b" in names(model) and not hooks(model)
    assert READ not in model.grass.left_out.values()


def test_it_is_told_once_and_stands_with_the_reasons(caplog):
    model = converted(Routers)
    with caplog.at_level(logging.WARNING, "grass_hf.freeing"):
        for _ in range(2):
            model(tokens())
    assert [record.getMessage() for record in caplog.records if "inner.b" in record.getMessage()]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_weight_has_an_ordinary_parameters_rate_and_decay(scale):
    model = converted(Routers, scale=scale)
    grouped = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = grass_optimizer(model, torch.optim.AdamW, params=grouped, lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    model(tokens()).backward()
    optimizer.step()
    held = [group for group in optimizer.param_groups if any(p is model.inner["b"].weight for p in group["params"])]
    assert len(held) == 1
    assert held[0]["lr"] == pytest.approx(0.005) and held[0]["weight_decay"] == pytest.approx(0.1)
    assert model.inner["b"].weight in optimizer.state


def test_a_weight_without_a_group_for_it_stops_the_run_before_anything_has_changed():
    model = converted(Routers, scale=0.5, exclude_modules=None)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.0, params=[
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() == 1]},
    ])  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"no parameter group .* exclude_modules=\['inner.b'\] \(in optim_args"):
        model(tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "inner.b" in names(model) and optimizer.grass.slices and not modes()


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


class Raises(Routers):
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
    model(tokens()).backward()
    assert "inner.b" not in names(model) and not modes() and not hooks(model)


def test_weights_made_trainable_after_the_conversion_are_named():
    model = converted(Reader)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"table, inner.a, inner.b, head.*requires_grad_"):
        model(tokens())


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


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["router", "tied"])
def test_ranks_are_told_before_a_weight_changes(kind, engine):
    name = {"router": "inner.b", "tied": "table"}[kind]
    for said in ranks(2, "audit_jobs.stop", kind, engine):
        first, second = [line for line in said.splitlines() if "weight(s)" in line or "trained [" in line]
        assert f"exclude_modules=['{name}']" in first and "before any weight was changed" in first
        assert second == f"trained ['{name}']"


@pytest.mark.parametrize("clipped", [False, True])
def test_a_weight_that_stays_among_slices_is_resumed_there(clipped):
    """Where no ordinary group has its settings: the weight takes its slice's place, and the groups stay in number."""

    def start():
        model = converted(Routers, exclude_modules=None)
        parts = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parts if p.dim() > 1], "weight_decay": 0.1}]
        groups.append({"params": [p for p in parts if p.dim() == 1], "weight_decay": 0.0})
        return model, grass_optimizer(model, torch.optim.AdamW, params=groups, lr=0.01)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            model(tokens(seed)).backward()
            if clipped:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = start()
    steps(whole, optimizer, range(3))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    steps(whole, optimizer, range(3, 6))
    again, other = start()
    again.load_state_dict({key: value for key, value in saved[0].items() if "slice" not in key}, strict=False)
    other.load_state_dict(saved[1])
    steps(again, other, range(3, 6))
    assert [len(group["params"]) for group in other.param_groups] == [len(g["params"]) for g in optimizer.param_groups]
    assert not torch.equal(again.inner["b"].weight, Routers().inner["b"].weight)
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
