"""Weights that a model reads without calling their modules: how their optimizer takes them over."""

import copy

import pytest
import torch
from forks import ranks
from readers import READERS, Reader, Routers, converted, modes, names, tokens
from torch import nn

from grass_hf import MuonAdamW, grass_optimizer, restore_model


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


@pytest.mark.parametrize(
    "base", [torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.RMSprop, MuonAdamW], ids=lambda c: c.__name__
)
def test_other_optimizers_train_it_too(base):
    runs = []
    for excluded in ([], ["inner.b"]):
        model = converted(Routers, exclude_modules=["inner.c", *excluded], stagger=1)
        optimizer = grass_optimizer(model, base, lr=0.05)
        for step in range(3):
            model(tokens(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.inner["b"].weight)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_a_weight_that_is_found_in_the_second_micro_batch_has_lost_nothing():
    class Later(Reader):
        later = False

        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(8, 8)  # never called, so that the model is looked at again

        def read(self, x):
            return Routers.read(self, x) if self.later else super().read(x)

    model = converted(Later)
    model(tokens()).backward()
    model.later = True
    with pytest.raises(RuntimeError, match="hold gradients of an earlier forward"):
        model(tokens())


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


def test_ranks_are_told_before_a_weight_changes():
    for said in ranks(2, "audit_jobs.stop"):
        lines = [line for line in said.splitlines() if "weight(s)" in line or "trained (" in line]
        expected = [(kind, engine) for kind in ("router", "tied") for engine in ("ddp", "fsdp")]
        for (kind, engine), first, second in zip(expected, lines[::2], lines[1::2], strict=True):
            name = {"router": "inner.b", "tied": "table"}[kind]
            assert first.startswith(f"{kind} {engine}") and "before any weight was changed" in first
            assert f"exclude_modules=['{name}']" in first
            assert second == f"{kind} {engine} trained ('{name}',)"


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
