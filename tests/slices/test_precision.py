"""Precisions people train in: small updates arrive, overflow leaves no trace, resuming is exact."""

import copy

import pytest
import torch
from helpers import VOCABULARY, assert_same_weights, tiny_llama, trainer
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim import resume
from grass_hf.slices.ops.rounding import round_stochastically
from grass_hf.slices.ops.selection import seeded

pytestmark = pytest.mark.oldest

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("given", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0 + 1e-3, -1.0 - 1e-3, 1.9999, 3e-8, -3e-8, 2.0 - 2**-12, 0.3, -7e-6])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_exact_in_the_mean(dtype, value, given):
    draws = seeded("a")
    values = torch.full((200_000,), value, dtype=given)
    value = float(values[0])
    rounded = round_stochastically(values, dtype, draws).double()
    nearest = values[:1].to(dtype)
    found = rounded.unique()
    assert len(found) <= 2 and float(nearest) in found.tolist()
    if len(found) == 2:
        low, high = found.tolist()
        assert low <= value <= high
        bits = found.to(dtype).view(torch.int16).to(torch.int32)
        assert float(found[0]) == 0.0 or float(found[1]) == 0.0 or abs(int(bits[1] - bits[0])) == 1  # neighbours
        error = (high - low) / 2 / 200_000**0.5
        assert abs(float(rounded.mean()) - value) < 5 * error
    else:
        assert abs(value - float(nearest)) < 1e-4 * abs(value) or value == float(nearest)


@pytest.mark.parametrize("given", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_leaves_exact_and_special_values_alone(dtype, given):
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 65504.0 if dtype == torch.float16 else 1e38, float("inf")])
    exact = torch.cat([exact, -exact]).to(dtype).to(given).expand(50, -1)
    assert torch.equal(round_stochastically(exact, dtype, seeded("b")).to(given), exact)
    odd = torch.tensor([float("nan"), -float("nan")], dtype=given).expand(50, -1)
    assert round_stochastically(odd, dtype, seeded("b")).isnan().all()
    largest = torch.tensor([torch.finfo(dtype).max], dtype=given) * (1 + 1e-5)
    for sign in (1, -1):
        assert round_stochastically(sign * largest.expand(1000), dtype, seeded("c")).isfinite().all()


def ones_that_shrink(steps=400, size=64, **settings):
    """Weights of 1 in bfloat16 under SGD updates of 1e-4, a fortieth of what bfloat16 resolves there; the mean."""
    model = nn.Sequential(nn.Linear(4, size, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    convert_to_grass(model, GrassConfig(update_interval=2, selection="uniform_nr", side="output", **settings))
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=1e-4)
    for _ in range(steps):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    restore_model(model)
    return float(1.0 - model[0].weight.float().mean())


def test_small_updates_arrive_where_plain_rounding_stalls():
    """Every row is trained half of 400 steps, so 0.02 is to arrive; rows change every second step."""
    assert ones_that_shrink(density=0.5, slice_dtype="bfloat16") == 0.0  # as pure bfloat16 AdamW or SGD stalls
    assert ones_that_shrink(density=0.5, rounding="nearest") < 0.004  # rows leave before they have gathered enough
    assert ones_that_shrink(density=0.5) == pytest.approx(0.02, rel=0.15)
    assert ones_that_shrink(density=1.0) == pytest.approx(0.04, rel=0.05)


def test_owed_decay_arrives_in_half_precision():
    """lr * weight_decay = 1e-5 a step and 20 steps an interval: far below what bfloat16 resolves."""

    def mean(**settings):
        model = nn.Sequential(nn.Linear(16, 512, bias=False)).bfloat16()
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        convert_to_grass(
            model, GrassConfig(rank=1, update_interval=20, selection="uniform_nr", side="output", **settings)
        )
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-4, weight_decay=0.1)
        for _ in range(100):
            (model(torch.ones(1, 16, dtype=torch.bfloat16)).sum() * 0.0).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.grass.settle()
        return float(1.0 - model[0].weight.float().mean())

    assert mean(rounding="nearest") < 1e-5
    assert mean() == pytest.approx(1 - (1 - 1e-5) ** 100, rel=0.25)


@pytest.mark.parametrize("slice_dtype", [None, "bfloat16"])
def test_bytes_of_each_choice(slice_dtype):
    """Over bfloat16 weights a float32 slice and its gradient and AdamW state take 16 bytes an element, else 8."""
    model = tiny_llama().bfloat16()
    convert_to_grass(model, GrassConfig(density=0.25, slice_dtype=slice_dtype))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
    tokens = torch.randint(VOCABULARY, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    slice_ = next(grass_slices(model))
    state = optimizer.state[slice_.active]
    total = slice_.active.nbytes + slice_.active.grad.nbytes + sum(state[k].nbytes for k in ("exp_avg", "exp_avg_sq"))
    assert total == slice_.active.numel() * (16 if slice_dtype is None else 8)


@pytest.mark.parametrize(
    "settings", [{}, {"selection": "multinomial_norm"}, {"rounding": "nearest", "side": "output"}], ids=str
)
@pytest.mark.parametrize("targets", ["all-linear", "all-matrices"])
def test_pure_bfloat16_resumes_bit_for_bit(settings, targets):
    config = GrassConfig(density=0.25, update_interval=3, target_modules=targets, **settings)

    def start():
        model = convert_to_grass(tiny_llama(tie_word_embeddings=True).bfloat16(), config)
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

    def run(model, optimizer, numbers):
        losses = []
        for number in numbers:
            tokens = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(number))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    for stop in (3, 4, 5):
        whole, optimizer = start()
        run(whole, optimizer, range(stop))
        state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        expected = run(whole, optimizer, range(stop, 9))
        resumed, optimizer = start()
        resumed.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        assert run(resumed, optimizer, range(stop, 9)) == expected
        assert_same_weights(whole, resumed)
        assert all(
            torch.equal(a.active, b.active) for a, b in zip(grass_slices(whole), grass_slices(resumed), strict=True)
        )


def test_rank_m_in_pure_bfloat16_follows_float32_adamw_more_closely_than_bfloat16_adamw():
    tokens = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))

    def losses(kind):
        model = tiny_llama()
        model = model if kind == "float32" else model.bfloat16()
        if kind == "grass":
            convert_to_grass(model, GrassConfig(density=1.0, update_interval=5, target_modules="all-matrices"))
            optimizer = grass_optimizer(model, torch.optim.AdamW, lr=3e-4)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        found = []
        for _ in range(60):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found[-10:])

    exact = losses("float32")
    assert (losses("grass") - exact).abs().mean() < (losses("bfloat16") - exact).abs().mean()


def test_bfloat16_autocast_equals_adamw_under_autocast_at_full_rank(tmp_path):
    runs = []
    for optim, optim_args in (("grass", "density=1.0,update_interval=2,base=adamw_torch"), ("adamw_torch", None)):
        run = trainer(tmp_path, tiny_llama(), optim=optim, optim_args=optim_args, bf16=True)
        run.train()
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        runs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


class Overflow:
    """A training loop in float16 autocast with a GradScaler; chosen steps overflow."""

    def __init__(self, fused, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        convert_to_grass(self.model, GrassConfig(density=0.25, update_interval=3, **settings))
        self.optimizer = grass_optimizer(self.model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)

    def step(self, number, overflow=False):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = self.model(x).float().square().sum()
        if overflow:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update(16.0)
        self.optimizer.zero_grad()

    def everything(self):
        state = copy.deepcopy(self.optimizer.state_dict())
        meta, entries = resume.read(state)
        # the fused kernel makes its state, zero, even on a step it skips
        moments = [v for s in state["state"].values() for k, v in s.items() if v.any() and not k.startswith("grass_")]
        tensors = [*self.model.state_dict().values(), *moments]
        for entry in entries.values():
            tensors += [entry["index"], entry["trained"]]
        return [t.clone() for t in tensors if isinstance(t, torch.Tensor)], meta["step"], meta["due"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("selection", ["top_r", "multinomial_norm", "uniform_nr"])
@pytest.mark.parametrize("when", [0, 1, 3, 4])
def test_an_overflow_step_is_skipped_without_a_trace(fused, selection, when):
    """On observing steps (0, 3) and others: state untouched, norms of the overflow discarded."""
    smooth, bumpy = (Overflow(fused, selection=selection) for _ in range(2))
    for number in range(8):
        if number == when:
            before = bumpy.everything()
            bumpy.step(100, overflow=True)
            after = bumpy.everything()
            assert before[1:] == after[1:]
            assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        smooth.step(number)
        bumpy.step(number)
    assert all(torch.equal(a, b) for a, b in zip(smooth.everything()[0], bumpy.everything()[0], strict=True))


def test_the_trainer_drops_the_norms_of_a_skipped_step(tmp_path):
    """GradScaler may skip optimizer.step, and the Trainer clears gradients through the model: norms must go too."""
    job = trainer(tmp_path)
    job.create_optimizer_and_scheduler(6)
    slice_ = next(grass_slices(job.model))
    slice_.norms.grad = torch.full_like(slice_.norms, float("inf"))
    slice_.active.grad = torch.zeros_like(slice_.active)  # as zero_grad(set_to_none=False) leaves it
    job.callback_handler.optimizer = job.optimizer
    job.callback_handler.on_step_begin(job.args, job.state, job.control)
    assert slice_.norms.grad is None


def test_a_gradient_that_overflows_only_outside_the_slice_makes_the_layer_select_later():
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    convert_to_grass(model, GrassConfig(rank=2, selection="top_r", side="output", update_interval=5))
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=1e-3)
    slice_ = next(grass_slices(model))
    first = slice_.index.clone()

    def step(weights):
        (model(torch.ones(1, 4)) * weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    huge = torch.ones(8)
    huge[1] = 1e30  # its square is infinite in float32; rows 0 and 4 are in the slice
    step(huge)
    assert torch.equal(slice_.index, first) and optimizer.grass.step == 1
    step(torch.arange(8.0))
    assert slice_.index.tolist() == [6, 7]
