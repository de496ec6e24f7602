"""The package trains by Algorithm 1: it and the naive reference walk the same trajectory, in float64.

Thirty steps over several reselections, for every selection rule, both sides, AdamW and SGD with momentum, with and
without weight decay, accumulation over 1 and 4 micro-batches, and every state policy.
"""

import copy
import itertools

import pytest
import torch
from reference import NaiveGrass, Rows
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.config.settings import SELECTIONS
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim import rate_warmup
from grass_hf.slices.ops.selection import generator, needs_scores, select

STEPS, INTERVAL, DENSITY = 30, 7, 0.25
SHAPES = ((12, 20), (16, 12), (8, 16))


class Net(nn.Module):
    """Three non-square matrices and their biases."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=m != 16) for m, n in SHAPES)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def rate(step):
    return 0.02 * (1 - step / (2 * STEPS))


def micro_losses(step, count):
    """`count` loss functions whose sum is the step's loss."""
    draws = torch.Generator().manual_seed(step)
    losses = []
    for _ in range(count):
        x = torch.randn(6, SHAPES[0][1], generator=draws)
        target = torch.randn(6, SHAPES[-1][0], generator=draws)
        losses.append(lambda model, x=x, target=target: (model(x) - target).square().mean() / count)
    return losses


def choose_as(config):
    """The run's own draws, given the naive run's scores; one entry per draw."""
    last = {}  # of every target: its rows now, and the turn that each of its rows was last trained in

    def stale(step, name, scores):
        rank, size = config.rank_for(len(scores)), len(scores)
        now, turns = last.setdefault(name, ([j * size // rank for j in range(rank)], {}))
        turns |= dict.fromkeys(now, step // INTERVAL)
        norms = [float(s) ** 0.5 * (1 + step // INTERVAL - turns.get(row, -1)) for row, s in enumerate(scores)]
        drawn = select("multinomial_norm_nr", torch.tensor(norms) ** 2, size, rank, generator(config.seed, step, name))
        last[name] = (drawn.index.tolist(), turns)
        return Rows(drawn.index, torch.ones(rank))

    def choose(step, name, scores):
        if config.selection == "multinomial_stale_nr":
            return stale(step, name.removesuffix(".weight"), scores)
        rank = config.rank_for(len(scores))
        if config.selection == "cycle":
            # by hand: the turns of one permutation, over its end to its beginning
            rows = torch.randperm(len(scores), generator=generator(config.seed, -1, name.removesuffix(".weight")))
            turn = [rows[place % len(rows)] for place in range(step // INTERVAL * rank, (step // INTERVAL + 1) * rank)]
            return Rows(torch.stack(turn).sort().values, torch.ones(rank))
        draws = generator(config.seed, step, name.removesuffix(".weight"))
        chosen = select(config.selection, scores, len(scores), rank, draws)
        rows = chosen.index[: chosen.count]
        if chosen.rho is None:
            return Rows(rows, torch.ones(len(rows)))
        rho = chosen.rho[: chosen.count]
        times = (chosen.write[: chosen.count] / rho).round().long()
        assert times.sum() == rank
        return Rows(rows.repeat_interleave(times), rho.repeat_interleave(times))

    return choose


def walk_both(config, kind, weight_decay, accumulation, warmup=1):
    """Train both sides; asserts after every step that the weights agree. Returns the naive run."""
    torch.manual_seed(0)
    model = Net()
    naive_model = copy.deepcopy(model)
    targets = [f"layers.{i}.weight" for i in range(len(SHAPES))]
    turns = min(config.stagger, len(targets))
    phases = {name: i * turns // len(targets) * INTERVAL // turns for i, name in enumerate(targets)}

    def strided(size):
        rank = config.rank_for(size)
        return torch.tensor([j * size // rank for j in range(rank)])

    naive = NaiveGrass(
        naive_model,
        targets,
        side=config.side,
        first=strided,
        choose=choose_as(config),
        interval=INTERVAL,
        kind=kind,
        lr=rate,
        weight_decay=weight_decay,
        scale=config.scale,
        scale_warmup=config.scale_warmup,
        policy=config.state_policy,
        decay_all=config.decay == "all",
        phases=phases,
        warmup=warmup,
        until=config.select_until,
        observes=needs_scores(config.selection),
    )
    convert_to_grass(model, config)
    classes = {"adamw": (torch.optim.AdamW, {}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}
    cls, settings = classes[kind]
    optimizer = grass_optimizer(model, cls, lr=rate(0), weight_decay=weight_decay, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / rate(0))
    for step in range(STEPS):
        losses = micro_losses(step, accumulation)
        for loss in losses:
            loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        naive.step(losses)
        for (name, ours), (_, theirs) in zip(plain_weights(model), naive_model.named_parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.data, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    naive.finish()
    restore_model(model)
    for ours, theirs in zip(model.parameters(), naive_model.parameters(), strict=True):
        assert ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    return naive


def plain_weights(model):
    return [(name, p.data) for name, p in model.named_parameters() if not name.endswith("active")]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize(
    "kind, weight_decay, accumulation", list(itertools.product(["adamw", "sgd"], [0.0, 0.3], [1, 4]))
)
def test_same_trajectory_as_naive_algorithm_1(rule, side, kind, weight_decay, accumulation):
    config = GrassConfig(density=DENSITY, update_interval=INTERVAL, selection=rule, side=side, state_policy="carry")
    naive = walk_both(config, kind, weight_decay, accumulation)
    # the trajectories crossed several slices, or they would prove nothing about reselection
    assert any(len(visited) >= 3 for visited in naive.visited.values()), naive.visited


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "options",
    [
        {"side": "input", "state_policy": "carry_seeded"},  # the defaults
        {"state_policy": "reset"},
        {"state_policy": "reset_warmup"},
        {"state_policy": "carry_seeded"},
        {"state_policy": "carry_seeded", "selection": "multinomial_norm"},
        {"state_policy": "carry_seeded", "selection": "uniform"},
        {"state_policy": "carry_seeded", "selection": "uniform_nr", "stagger": 100},
        {"select_until": 16, "stagger": 100},
        {"state_policy": "carry_seeded", "side": "input", "selection": "cycle"},
        {"stagger": 100},
        {"stagger": 100, "state_policy": "reset_warmup"},
        {"scale": 0.5},
        {"scale": 2.0, "selection": "multinomial_norm"},
        {"scale_warmup": 12},
        {"scale_warmup": 12, "scale": 2.0, "state_policy": "reset_warmup", "decay": "active"},
        {"decay": "active"},
        {"state_policy": "reset", "selection": "multinomial_norm2", "side": "input"},
        {"seed": 3, "selection": "uniform_nr", "side": "input", "stagger": 100},
        {"seed": 2, "selection": "cycle", "side": "input", "stagger": 100},
        {"selection": "multinomial_stale_nr", "side": "input", "state_policy": "carry_seeded", "stagger": 100},
    ],
    ids=str,
)
def test_same_trajectory_with_every_setting(options, kind):
    base = {"selection": "multinomial_norm_nr", "side": "output", "state_policy": "carry"}
    config = GrassConfig(**({"density": DENSITY, "update_interval": INTERVAL} | base | options))
    walk_both(config, kind, weight_decay=0.3, accumulation=2)


@pytest.mark.parametrize("stagger", [1, 2, 100])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_same_trajectory_with_a_warmup_of_several_steps(monkeypatch, kind, stagger):
    """The ramp after a reset rises step by step: 1/5, 2/5, 3/5, 4/5, 1."""
    monkeypatch.setattr(rate_warmup, "RESET_SHARE", 4 / INTERVAL)
    config = GrassConfig(
        density=DENSITY,
        update_interval=INTERVAL,
        selection="multinomial_norm_nr",
        side="output",
        state_policy="reset_warmup",
        stagger=stagger,
    )
    walk_both(config, kind, weight_decay=0.3, accumulation=1, warmup=4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["to_none", "to_zero"])
@pytest.mark.parametrize("fused", [False, True], ids=["not_called", "found_inf"])
def test_a_step_that_was_skipped_leaves_no_trace(fused, set_to_none, compiled):
    """An observing step whose gradients GradScaler drops is as if it had not been: neither state nor scores.

    Without fused the scaler does not call the optimizer at all; with it, it calls with `found_inf` set.
    """
    assert_no_trace(fused, compiled, lambda model, optimizer: optimizer.zero_grad(set_to_none=set_to_none))


@pytest.mark.parametrize(
    "fused, set_to_none, compiled",
    [(False, True, False), (True, True, False), (True, False, False), (True, True, True)],
)
def test_nor_does_it_where_the_model_clears_the_gradients(fused, set_to_none, compiled):
    """`model.zero_grad`, of which the optimizer does not know, as the Trainer calls it."""
    assert_no_trace(fused, compiled, lambda model, optimizer: model.zero_grad(set_to_none=set_to_none))


def assert_no_trace(fused, compiled, clear):
    config = GrassConfig(density=DENSITY, update_interval=INTERVAL, selection="top_r", side="output")
    runs = []
    torch._dynamo.reset()
    for skip in (False, True):
        torch.manual_seed(0)
        model = convert_to_grass(Net(), config)
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=0.02, weight_decay=0.3, fused=fused)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        if skip:
            (1e3 * micro_losses(99, 1)[0](forward)).backward()  # large: its scores would outvote the real ones
            if fused:
                optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), dtype=torch.float32)
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
            clear(model, optimizer)
        for step in range(3):
            micro_losses(step, 1)[0](forward).backward()
            optimizer.step()
            clear(model, optimizer)
        runs.append((model, optimizer))
    (plain, first), (skipped, second) = runs
    assert first.grass.step == second.grass.step == 3
    for ours, theirs in zip(grass_slices(plain), grass_slices(skipped), strict=True):
        assert ours.state.energy == theirs.state.energy
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.weight, theirs.weight)


def test_the_reference_tells_wrong_rows():
    """The comparison can fail: with another seed on one side the weights part after the first reselection."""
    config = GrassConfig(density=DENSITY, update_interval=INTERVAL, selection="uniform_nr", seed=1)
    wrong = GrassConfig(density=DENSITY, update_interval=INTERVAL, selection="uniform_nr", seed=2)
    original = globals()["choose_as"]
    try:
        globals()["choose_as"] = lambda _: original(wrong)
        with pytest.raises(AssertionError):
            walk_both(config, "adamw", 0.0, 1)
    finally:
        globals()["choose_as"] = original


def test_every_row_has_its_turn():
    """Over a run with small density, rows outside the first slice are trained too."""
    torch.manual_seed(0)
    model = Net()
    before = [layer.weight.clone() for layer in model.layers]
    convert_to_grass(model, GrassConfig(density=DENSITY, update_interval=1, selection="uniform_nr", side="output"))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.0)
    for step in range(60):
        micro_losses(step, 1)[0](model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.grass.metrics()["grass/coverage"] == 1.0
    for layer, old in zip(grass_slices(model), before, strict=True):
        assert (layer.weight != old).any(dim=1).all()
