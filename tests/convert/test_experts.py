"""Experts in 3-D parameters: a slice per expert, no E x m x n and no m x n gradient, idle experts stay sane."""

import copy

import pytest
import torch
from allocations import Allocations
from helpers import check_resumes
from model_matrix import CAUSAL, SHAPE, batch, build, needs_interface, step
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops.grouped_linear import grouped_linear

pytestmark = pytest.mark.oldest

E, M, N, R = 4, 10, 6, 3
TOKENS = [3, 0, 4, 1]


def matrices(transposed, dtype=torch.float64):
    draws = torch.Generator().manual_seed(1)
    weight = torch.randn(E, N, M, dtype=torch.float64, generator=draws)
    weight = weight if transposed else weight.mT.contiguous()
    x = torch.randn(sum(TOKENS), N, dtype=torch.float64, generator=draws)
    dy = torch.randn(sum(TOKENS), M, dtype=torch.float64, generator=draws)
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def by_autograd(x, weight, dy, transposed):
    """(y, dX, dW) with every expert's product written out."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = [rows @ (w if transposed else w.T) for rows, w in zip(x.split(TOKENS), weight, strict=True)]
    y = torch.cat(parts)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_autograds(transposed, side, observing, weighted):
    x, weight, dy = matrices(transposed)
    y, dx, dw = by_autograd(x, weight, dy, transposed)
    dim = 1 if (side == "output") != transposed else 2
    size = weight.shape[dim]
    index = torch.stack([torch.randperm(size, generator=torch.Generator().manual_seed(e))[:R] for e in range(E)])
    rho = torch.rand(E, R, dtype=torch.float64) if weighted else None
    active = torch.stack([w.index_select(dim - 1, i) for w, i in zip(weight, index, strict=True)]).requires_grad_()
    norms = torch.zeros(E, size, dtype=torch.float64, requires_grad=True) if observing else None
    x_ours = x.clone().requires_grad_()
    ours = grouped_linear(
        x_ours, weight, TOKENS, active, index, side=side, transposed=transposed, multiplier=rho, norms=norms
    )
    ours.backward(dy)
    torch.testing.assert_close(ours, y, rtol=0, atol=1e-13)
    torch.testing.assert_close(x_ours.grad, dx, rtol=0, atol=1e-13)
    expected = torch.stack([g.index_select(dim - 1, i) for g, i in zip(dw, index, strict=True)])
    if weighted:
        expected = expected * rho.unsqueeze(-1 if dim == 1 else -2)
    torch.testing.assert_close(active.grad, expected, rtol=0, atol=1e-13)
    assert not active.grad[1].any()  # no token came to the second expert
    if observing:
        torch.testing.assert_close(norms.grad, dw.square().sum(3 - dim), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("side", ["output", "input"])
def test_autocast_computes_in_half_precision_and_returns_full_gradients(side):
    x, weight, dy = matrices(False, torch.float32)
    index = torch.arange(R).expand(E, R).contiguous()
    active = (weight[:, :R] if side == "output" else weight[:, :, :R]).clone().requires_grad_()
    x = x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weight, TOKENS, active, index, side=side)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert x.grad.dtype == active.grad.dtype == torch.float32
    _, dx, dw = by_autograd(x.detach(), weight, dy, False)
    torch.testing.assert_close(x.grad, dx, rtol=0.05, atol=0.05)
    expected = dw[:, :R] if side == "output" else dw[:, :, :R]
    torch.testing.assert_close(active.grad, expected, rtol=0.05, atol=0.05)


@needs_interface
@pytest.mark.parametrize("side", ["output", "input"])
def test_no_tensor_of_an_experts_size_in_backward(monkeypatch, side):
    from grass_hf.slices.ops import row_norms

    monkeypatch.setattr(row_norms.squared_norms, "__defaults__", (4,))
    sizes = {"hidden_size": 47, "intermediate_size": 41, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("mixtral", **{**SHAPE, **sizes}, num_local_experts=3, use_cache=False)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    plain.set_experts_implementation("eager")  # transformers' grouped product wants even sizes
    model = copy.deepcopy(plain)
    forbidden = {3 * 82 * 47, 82 * 47, 3 * 47 * 41, 47 * 41}
    inputs = {name: values[:2, :9] for name, values in batch(plain).items()}  # so few that no activation is as large
    convert_to_grass(
        model, GrassConfig(density=0.25, side=side, update_interval=3, stagger=1, target_modules=["experts"])
    )
    assert [slice_.parameter for slice_ in grass_slices(model)] == ["gate_up_proj", "down_proj"] * 2

    def sizes_in_step(model, optimizer):
        mode = Allocations()
        mode.weights = frozenset(p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 3)
        loss = model(**inputs).loss
        with mode:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        return mode.sizes

    assert sizes_in_step(plain, torch.optim.AdamW(plain.parameters(), foreach=False)) & forbidden
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
    for number in range(5):
        assert all((slice_.norms is not None) == (number % 3 == 0) for slice_ in grass_slices(model))
        assert not sizes_in_step(model, optimizer) & forbidden


class Separate(nn.Module):
    """The same experts as linear modules, each converted for itself: what `grouped` must equal."""

    def __init__(self, weight):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(N, M, bias=False) for _ in range(E)).double()
        for linear, matrix in zip(self.experts, weight, strict=True):
            linear.weight.data.copy_(matrix)

    def forward(self, x, tokens):
        return torch.cat([e(rows) for e, rows in zip(self.experts, x.split(tokens), strict=True)])


class Together(nn.Module):
    """A module that keeps the promises of the experts interface, for one product."""

    is_transposed = has_bias = False
    num_experts, has_gate = E, False

    def __init__(self, weight):
        super().__init__()
        self.up_proj = nn.Parameter(weight.clone())
        self.down_proj = nn.Parameter(torch.eye(M, dtype=torch.float64).expand(E, M, M).clone(), requires_grad=False)

    def _apply_gate(self, y):
        raise AssertionError("no gate here")

    def act_fn(self, y):
        return y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros(hidden_states.shape[0], M, dtype=hidden_states.dtype)
        for token in range(len(out)):
            for place in range(top_k_index.shape[1]):
                e = top_k_index[token, place]
                up = self.up_proj[e] @ hidden_states[token]
                out[token] += top_k_weights[token, place] * (self.down_proj[e] @ up)
        return out


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize(
    "rule", ["top_r", "multinomial_norm", "multinomial_norm_nr", "multinomial_stale_nr", "uniform"]
)
@pytest.mark.parametrize("state_policy", ["carry", "reset"])
def test_the_same_trajectory_as_separate_linear_layers(monkeypatch, side, rule, state_policy):
    """Ten steps over several selections, an expert idle now and then."""
    from grass_hf.slices.ops import selection

    # expert e of the parameter draws as "<name>.<e>"; give the separate layers the same draws
    original = selection.generator
    monkeypatch.setattr(
        selection,
        "generator",
        lambda seed, step, name: original(seed, step, name.replace("up_proj", "experts")),
    )
    _, weight, _ = matrices(False)
    settings = {
        "rank": R,
        "update_interval": 3,
        "stagger": 1,
        "side": side,
        "selection": rule,
        "state_policy": state_policy,
    }
    separate, together = nn.Sequential(Separate(weight)), nn.Sequential(Together(weight))
    convert_to_grass(separate, GrassConfig(**settings))
    convert_to_grass(together, GrassConfig(**settings, target_modules=["up_proj"]))
    optimizers = [grass_optimizer(m, torch.optim.AdamW, lr=0.05, weight_decay=0.1) for m in (separate, together)]
    for number in range(10):
        draws = torch.Generator().manual_seed(number)
        # every expert gets a token but on steps 4 and 5; separate layers without tokens would skip their step
        experts = torch.arange(8) % E if number not in (4, 5) else torch.arange(8) % (E - 1)
        experts = experts.sort().values
        tokens = torch.bincount(experts, minlength=E).tolist()
        x = torch.randn(8, N, dtype=torch.float64, generator=draws)
        separate[0](x, tokens).sin().sum().backward()
        together[0](x, experts[:, None], torch.ones(8, 1, dtype=torch.float64)).sin().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.zero_()  # an idle expert has the gradient zero, not none
        for slice_ in grass_slices(separate):
            slice_.norms is not None and slice_.norms.grad is not None and slice_.norms.grad.zero_()
        for optimizer in optimizers:
            optimizer.grass.forget_norms()
        slice_ = next(grass_slices(together))
        for e, other in enumerate(grass_slices(separate)):
            torch.testing.assert_close(slice_.weight[e], other.weight, rtol=0, atol=1e-12)
            assert torch.equal(slice_.index[e], other.index)


def test_an_expert_without_tokens_keeps_its_rows():
    _, weight, _ = matrices(False)
    model = nn.Sequential(Together(weight))
    convert_to_grass(model, GrassConfig(rank=R, update_interval=1, target_modules=["up_proj"]))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=0.05, weight_decay=0.0)
    slice_ = next(grass_slices(model))
    before = slice_.index.clone()
    x = torch.randn(6, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    used = torch.tensor([0, 0, 2, 2, 3, 3])
    model[0](x, used[:, None], torch.ones(6, 1, dtype=torch.float64)).sin().sum().backward()
    optimizer.step()
    assert torch.equal(slice_.index[1], before[1]) and not torch.equal(slice_.index, before)
    assert torch.equal(slice_.weight[1], weight[1])
    assert slice_.active.isfinite().all() and slice_.state.energy[0] > 0


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if "experts" in str(CAUSAL[name])])
@needs_interface
def test_resumes_bit_for_bit(model_type):
    def run(model, optimizer, numbers):
        return [step(model, optimizer, batch(model), seed=number) for number in numbers]

    config = GrassConfig(density=0.25, update_interval=3, target_modules="all-matrices", selection="multinomial_norm")

    def start():
        model = convert_to_grass(build(model_type), config)
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

    check_resumes(start, run)


@needs_interface
@pytest.mark.parametrize("base", ["adamw_torch_fused", "adafactor", "lion_32bit", "adamw_bnb_8bit", "adagrad"])
def test_base_optimizers_carry_the_state_of_experts(tmp_path, base):
    if "bnb" in base or "lion" in base:
        pytest.importorskip("bitsandbytes")
    from helpers import VOCABULARY as TOKENS_OF_HELPERS
    from helpers import trainer

    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": TOKENS_OF_HELPERS, "hidden_size": 64}
    config = AutoConfig.for_model("mixtral", **{**SHAPE, **sizes}, use_cache=False)
    torch.manual_seed(0)
    optim_args = f"density=0.25,update_interval=3,target_modules=all-matrices,base={base}"
    rate = 1e-3 if "lion" in base else 5e-3
    job = trainer(
        tmp_path, AutoModelForCausalLM.from_config(config), optim_args=optim_args, max_steps=16, learning_rate=rate
    )
    job.train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(slice_.weight.isfinite().all() for slice_ in grass_slices(job.model))


def test_a_forward_that_keeps_no_promises_is_left_and_named():
    class Odd(Together):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    _, weight, _ = matrices(False)
    model = nn.Sequential(Odd(weight), nn.Linear(4, 4))
    convert_to_grass(model, GrassConfig(rank=R))
    assert "something else than a plain experts product" in model.grass.left_out["0.up_proj"]
    assert type(restore_model(model)[0]) is Odd
