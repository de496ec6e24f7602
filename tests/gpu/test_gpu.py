"""What a GPU could do differently: the CPU's runs repeated there, half precision, exact resume, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_weights, plain_state, tiny_llama, trainer
from on_gpu import (
    DEVICE,
    ON_CPU,
    assert_same_walk,
    exact_llama,
    needs_device,
    tokens_of,
    train,
    walk,
)
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.measure.estimate.simulate import enable_checkpointing
from grass_hf.slices.ops.rounding import round_stochastically
from grass_hf.slices.ops.selection import seeded
from grass_hf.slices.ops.tap import tap

pytestmark = needs_device


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-matrices"},
        {"target_modules": "all-matrices", "side": "output", "state_policy": "reset", "tied": True},
        {"side": "output", "selection": "top_r", "state_policy": "carry"},
        {"side": "output", "selection": "multinomial_norm", "target_modules": "all-matrices"},
        {"selection": "multinomial_norm", "state_policy": "reset_warmup", "tied": True},
        {"selection": "uniform_nr", "side": "auto", "score_by": "sequence"},
        {"selection": "cycle", "target_modules": "all-matrices", "tied": True},
        {"selection": "multinomial_stale_nr", "score_by": "sequence", "stagger": 100},
    ],
    ids=str,
)
def test_the_same_trajectory_as_on_the_cpu(settings):
    """Rows are drawn on the CPU, so they are equal exactly."""
    settings = {"steps": 11, **settings}
    tied = {"tie_word_embeddings": settings.pop("tied", False)}
    ours, theirs = (walk(device, exact_llama(**tied), **settings) for device in (DEVICE, "cpu"))
    assert_same_walk(ours, theirs)
    assert min(len({str(rows[slice_]) for rows in ours[1]}) for slice_ in range(len(ours[1][0]))) >= 3
    assert all((value - plain_state(ours[2])[k]).any() for k, value in plain_state(exact_llama(**tied)).items())


@pytest.mark.parametrize("side, how", [("output", "fused"), ("input", "fused"), ("input", "foreach")])
def test_rank_m_is_the_base_optimizer(side, how):
    ours, theirs = exact_llama().to(DEVICE), exact_llama().to(DEVICE)
    config = GrassConfig(density=1.0, update_interval=3, side=side, target_modules="all-matrices")
    settings = {"lr": 1e-2, "weight_decay": 0.1, how: True}
    optimizer = grass_optimizer(convert_to_grass(ours, config), torch.optim.AdamW, **settings)
    train(ours, optimizer, steps=8)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), steps=8)
    assert_same_weights(restore_model(ours), theirs, atol=1e-10)


@pytest.mark.parametrize("side, reentrant", [("input", None), ("output", True), ("input", True), ("input", False)])
def test_clipping_accumulation_and_checkpointing_as_on_the_cpu(side, reentrant):
    settings = {"accumulation": 2, "clip": 0.5, "side": side, "target_modules": "all-matrices", "steps": 8}
    theirs = walk("cpu", exact_llama(), **settings)
    model = exact_llama()
    if reentrant is not None:
        enable_checkpointing(model, use_reentrant=reentrant)
    assert_same_walk(walk(DEVICE, model, **settings), theirs)


def test_a_model_may_move_after_its_optimizer_was_made():
    """As accelerator.prepare moves it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # what other tests have left
    model = convert_to_grass(exact_llama(), GrassConfig(density=0.25, update_interval=3))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    accelerator = Accelerator(cpu=ON_CPU)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert next(model.parameters()).device.type == DEVICE
    found = train(model, optimizer)
    accelerator.free_memory()
    assert_same_walk((*found, restore_model(model).cpu()), walk("cpu", exact_llama()))


# -- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_goes_to_a_neighbour_and_is_exact_in_the_mean(dtype, given):
    values = torch.tensor([1.001, -1.001, 1.9999, 0.3, -7e-6, -0.0, 1.0, -2.5], dtype=given, device=DEVICE)
    rounded = round_stochastically(values.expand(200_000, -1), dtype, seeded("a", DEVICE)).double()
    values, low, high = values.double(), rounded.min(dim=0).values, rounded.max(dim=0).values
    assert (low <= values).all() and (values <= high).all()
    assert (low == values)[-3:].all() and (high == values)[-3:].all() and (low < high)[:-3].all()
    same = round_stochastically(values.to(given).expand(200_000, -1), dtype, seeded("a", DEVICE)).double()
    assert torch.equal(same, rounded)
    assert ((rounded.mean(dim=0) - values).abs() <= 5 * (high - low) / 2 / 200_000**0.5 + 1e-12).all()
    gap = (low.to(dtype).view(torch.int16).int() - high.to(dtype).view(torch.int16).int()).abs()
    assert (gap <= 1).all()
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).max], dtype=given, device=DEVICE)
    kept = round_stochastically(odd.expand(1000, -1), dtype, seeded("b", DEVICE)).to(given)
    torch.testing.assert_close(kept, odd.expand(1000, -1), rtol=0, atol=0, equal_nan=True)


def lost_by_ones(steps, optimizer_class, gradient, size=(256, 4), **settings):
    """How far weights of 1 in bfloat16 have fallen in the mean."""
    model = nn.Sequential(nn.Linear(size[1], size[0], bias=False)).bfloat16().to(DEVICE)
    nn.init.ones_(model[0].weight)
    options = settings.pop("optimizer")
    convert_to_grass(model, GrassConfig(selection="uniform_nr", side="output", **settings))
    optimizer = grass_optimizer(model, optimizer_class, **options)
    x = torch.ones(1, size[1], dtype=torch.bfloat16, device=DEVICE)
    for _ in range(steps):
        (model(x).sum() * gradient).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(1.0 - restore_model(model)[0].weight.detach().float().mean())


def test_small_updates_arrive():
    """Updates of 1e-4, a fortieth of what bfloat16 resolves: every row has half of 200 of them."""

    def lost(**settings):
        return lost_by_ones(200, torch.optim.SGD, 1.0, optimizer={"lr": 1e-4}, density=0.5, **settings)

    assert lost(update_interval=2) == pytest.approx(0.01, rel=0.2)
    assert lost(update_interval=2, rounding="nearest") < 0.002
    assert lost(update_interval=2, slice_dtype="bfloat16") == 0.0


def test_owed_decay_arrives():
    def lost(**settings):
        options = {"lr": 1e-4, "weight_decay": 0.1}
        kind = {"rank": 1, "update_interval": 20, "size": (512, 16), "optimizer": options}
        return lost_by_ones(100, torch.optim.AdamW, 0.0, **kind, **settings)

    assert lost() == pytest.approx(1 - (1 - 1e-5) ** 100, rel=0.25)
    assert lost(rounding="nearest") < 1e-5


@pytest.mark.parametrize("side, dtype", [("output", torch.float32), ("input", torch.bfloat16)])
def test_released_slices_train_as_resident_ones(deterministic, monkeypatch, side, dtype):
    monkeypatch.setattr("grass_hf.optim.chunked_step.CHUNK_BYTES", 2000)
    options = {"slice_dtype": str(dtype).removeprefix("torch."), "side": side, "target_modules": "all-matrices"}
    ours, theirs = (walk(DEVICE, tiny_llama().to(dtype), resident=kept, **options) for kept in (False, True))
    assert_same_walk(ours, theirs, tolerance=0.0)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_gradients_under_autocast_are_autograds(dtype, side, inside):
    x, weight, dy = (torch.randn(*shape, device=DEVICE) for shape in ((3, 5, 14), (10, 14), (3, 5, 10)))
    index, dim = torch.tensor([1, 4, 5, 8], device=DEVICE), 0 if side == "output" else 1
    active = weight.index_select(dim, index).requires_grad_()
    norms = torch.zeros(weight.shape[dim], device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=dtype):
        y = tap(F.linear(x, weight), x, active, index, side=side, norms=norms)
        assert y.dtype == dtype
        if inside:
            y.backward(dy.to(dtype))
    if not inside:
        y.backward(dy.to(dtype))
    full = dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    assert active.grad.dtype == norms.grad.dtype == torch.float32
    torch.testing.assert_close(active.grad.double(), full.index_select(dim, index), rtol=0.02, atol=0.1)
    torch.testing.assert_close(norms.grad.double(), full.square().sum(1 - dim), rtol=0.03, atol=0)


@pytest.mark.parametrize("base", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_through_the_trainer(tmp_path, precision, base):
    if precision == "fp16" and ON_CPU:
        pytest.skip("accelerate's float16 wants a GPU")
    optim_args = f"density=0.25,update_interval=3,target_modules=all-matrices,base={base}"
    job = trainer(tmp_path, optim_args=optim_args, use_cpu=ON_CPU, max_steps=16, **{precision: True})
    job.train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert 12 <= job.optimizer.optimizer.grass.step <= 16  # the first scales may overflow
    for slice_ in grass_slices(job.model):
        assert slice_.active.device.type == DEVICE and slice_.weight.dtype == torch.float32
        assert slice_.active.isfinite().all() and slice_.weight.isfinite().all()


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_overflow_leaves_no_trace(deterministic, fused, unscaled, when):
    """On observing steps (0, 3) and on another."""

    def run(overflow):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to(DEVICE)
        convert_to_grass(model, GrassConfig(density=0.25, update_interval=3, selection="top_r", stagger=1))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=fused)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=16.0, growth_interval=1000)
        numbers = list(range(8))
        if overflow:
            numbers.insert(when, None)
        for number in numbers:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number or 0)).to(DEVICE)
            with torch.autocast(DEVICE, dtype=torch.float16):
                loss = model(x).float().square().sum()
            scaler.scale(loss * float("inf") if number is None else loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(16.0)
            optimizer.zero_grad()
        assert optimizer.grass.step == 8
        moments = [optimizer.state[slice_.active]["exp_avg"] for slice_ in grass_slices(model)]
        return [*plain_state(model).values(), *moments, *(slice_.index for slice_ in grass_slices(model))]

    smooth, bumpy = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(smooth, bumpy, strict=True))
    assert all(value.isfinite().all() for value in smooth)


# -- resuming and compiling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, dtype",
    [("selection=multinomial_norm", torch.bfloat16), ("target_modules=all-matrices,stagger=1", torch.float32)],
)
def test_resuming_is_exact(deterministic, tmp_path, options, dtype):
    from test_resume import assert_same_run, run

    args, here = f"density=0.25,update_interval=4,base=adamw_torch_fused,{options}", {"use_cpu": ON_CPU}
    whole = run(tmp_path / "a", args, tiny_llama().to(dtype), save_strategy="steps", save_steps=3, **here)
    assert next(whole.model.parameters()).device.type == DEVICE
    for step in (3, 6):
        start = str(tmp_path / "a" / f"checkpoint-{step}")
        assert_same_run(run(tmp_path / "b", args, tiny_llama().to(dtype), resume=start, **here), whole)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_compiled_as_eager_and_never_again_at_a_reselection(side, backend):
    from torch._dynamo.utils import counters

    losses = []
    for compiled in (False, True):
        model = convert_to_grass(
            tiny_llama().to(DEVICE),
            GrassConfig(density=0.25, update_interval=3, stagger=1, side=side, target_modules="all-matrices"),
        )
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
        torch._dynamo.reset()
        counters.clear()
        forward = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        found = []
        for step in range(8):
            tokens = tokens_of(step).to(DEVICE)
            loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert counters["stats"]["unique_graphs"] == 2  # one that observes and one that does not
    assert losses[1] == pytest.approx(losses[0], abs=1e-4 if backend == "aot_eager" else 1e-3)
