"""What a GPU could do differently: the CPU's runs repeated there, and its own kernels, memory and waiting.

Everything is skipped without a GPU; GRASS_TEST_DEVICE=cpu runs on the CPU what can be run there, to debug the tests.
"""

import os
import warnings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, said before torch is used

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCABULARY, assert_same_weights, plain_state, tiny_llama, trainer
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, int8, restore_model
from grass_hf.convert import grass_slices
from grass_hf.functional import embedding_tap, tap
from grass_hf.grouped import grouped_linear
from grass_hf.rounding import round_stochastically
from grass_hf.selection import seeded

DEVICE = "cuda" if torch.cuda.is_available() else os.environ.get("GRASS_TEST_DEVICE", "")
ON_CPU = DEVICE != "cuda"
pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a GPU; GRASS_TEST_DEVICE=cpu debugs it on the CPU")
needs_cuda = pytest.mark.skipif(ON_CPU, reason="only CUDA has it")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Rotary(nn.Module):
    """A model's rotary angles, which are float32 in a model of any dtype, as the CPU computes them."""

    def __init__(self, original):
        super().__init__()
        self.__dict__["original"] = original  # not registered, so it stays where it is

    def forward(self, x, position_ids):
        return tuple(values.to(x.device) for values in self.original(x.cpu(), position_ids.cpu()))


class Norm(nn.RMSNorm):
    """LLaMA's norm in the dtype of its input, by no fused kernel."""

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def exact_llama(**options):
    """`tiny_llama` in float64 without transformers' detours by float32, so that devices agree to its digits."""
    model = tiny_llama(**options)
    model.model.rotary_emb = Rotary(model.model.rotary_emb)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, Norm(child.weight.shape, eps=child.variance_epsilon))
    return model.double()


def tokens_of(step):
    starts = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(12)) % VOCABULARY


def loss_of(model, tokens):
    """The loss of the next tokens in the model's dtype; transformers' own is float32."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, device=DEVICE, steps=10, accumulation=1, clip=None):
    """(losses, rows of every slice after each step)."""
    losses, rows = [], []
    for step in range(steps):
        for micro in tokens_of(step).to(device).chunk(accumulation):
            loss = loss_of(model, micro) / accumulation
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([part.index.tolist() for part in grass_slices(model)])
    return losses, rows


def walk(device, model, steps=10, accumulation=1, clip=None, **settings):
    """Train a model with Grass: (losses, rows, the model, back on the CPU)."""
    config = GrassConfig(**{"density": 0.25, "update_interval": 3, **settings})
    model = convert_to_grass(model.to(device), config)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    losses, rows = train(model, optimizer, device, steps, accumulation, clip)
    return losses, rows, restore_model(model).cpu()


def assert_same_walk(ours, theirs, tolerance=1e-9):
    assert ours[1] == theirs[1]
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
    assert_same_weights(ours[2], theirs[2], atol=tolerance)


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
    assert min(len({str(rows[part]) for rows in ours[1]}) for part in range(len(ours[1][0]))) >= 3
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
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
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
    monkeypatch.setattr("grass_hf.stepping.CHUNK_BYTES", 2000)
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
    for part in grass_slices(job.model):
        assert part.active.device.type == DEVICE and part.weight.dtype == torch.float32
        assert part.active.isfinite().all() and part.weight.isfinite().all()


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
        moments = [optimizer.state[part.active]["exp_avg"] for part in grass_slices(model)]
        return [*plain_state(model).values(), *moments, *(part.index for part in grass_slices(model))]

    smooth, bumpy = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(smooth, bumpy, strict=True))
    assert all(value.isfinite().all() for value in smooth)


# -- resuming, embeddings, int8, experts, bitsandbytes -----------------------------------------------------------


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


@pytest.mark.parametrize("count", [500, 5000])  # torch has one kernel for few tokens and another for many
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_an_embedding_is_exact_and_the_same_twice(deterministic, count, dtype):
    """In bfloat16 sums of many tokens are exact only where torch's kernel adds in float32, as CUDA's do."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (count,), generator=draws)
    dy = torch.randn(count, 24, dtype=torch.float64, generator=draws).to(dtype)
    index = torch.randperm(24, generator=draws)[:7]
    found = []
    for _ in range(2):
        active = torch.zeros(50, 7, dtype=dtype, device=DEVICE, requires_grad=True)
        norms_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch.zeros(24, dtype=norms_dtype, device=DEVICE, requires_grad=True)
        y = torch.zeros(count, 24, dtype=dtype, device=DEVICE, requires_grad=True)
        tapped = embedding_tap(y, ids.to(DEVICE), active, index.to(DEVICE), padding_idx=3, norms=norms)
        tapped.backward(dy.to(DEVICE))
        found.append((active.grad, norms.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    full = torch.zeros(50, 24, dtype=torch.float64).index_add_(0, ids, dy.double())
    full[3] = 0.0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    if dtype != torch.bfloat16 or not ON_CPU:
        torch.testing.assert_close(found[0][0].double().cpu(), full[:, index], rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(found[0][1].double().cpu(), full.square().sum(0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_train_and_are_found_again(dtype):
    pytest.importorskip("torchao.prototype.quantized_training.int8", exc_type=ImportError)
    config = GrassConfig(density=0.25, side="output", update_interval=3, weight_dtype="int8")
    model = convert_to_grass(tiny_llama().to(dtype).to(DEVICE), config)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    losses, _ = train(model, optimizer, steps=20)
    assert losses[-1] < 0.8 * losses[0]
    optimizer.grass.settle()
    for part in grass_slices(model):
        assert int8.is_int8(part.weight) and part.weight.int_data.device.type == DEVICE
        again = int8.quantize(int8.dequantize(part.weight))
        assert torch.equal(again.int_data, part.weight.int_data) and torch.equal(again.scale, part.weight.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(16, 24, 8), (10, 6, 3)], ids=["aligned", "odd"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["output", "input"])
def test_gradients_of_experts_are_autograds(side, transposed, widths, dtype):
    (m, n, r), tokens, draws = widths, [3, 0, 9, 1], torch.Generator().manual_seed(0)
    shapes = ((13, n), (4, n, m) if transposed else (4, m, n), (13, m))
    x, weight, dy = (torch.randn(*s, dtype=torch.float64, generator=draws).to(dtype) for s in shapes)
    dim = 1 if (side == "output") != transposed else 2
    index = torch.stack([torch.randperm(weight.shape[dim], generator=draws)[:r] for _ in range(4)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]

    wide = [t.double().clone().requires_grad_() for t in (x, weight)]
    pairs = zip(wide[0].split(tokens), wide[1], strict=True)
    torch.cat([rows @ (w if transposed else w.T) for rows, w in pairs]).backward(dy.double())
    expected = torch.stack([g.index_select(dim - 1, i) for g, i in zip(wide[1].grad, index, strict=True)])
    for observing in (False, True):
        active = torch.zeros(expected.shape, dtype=dtype, device=DEVICE, requires_grad=True)
        norms_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch.zeros(4, weight.shape[dim], dtype=norms_dtype, device=DEVICE, requires_grad=observing)
        ours = x.clone().to(DEVICE).requires_grad_()
        extras = {"side": side, "transposed": transposed, "norms": norms if observing else None}
        grouped_linear(ours, weight.to(DEVICE), tokens, active, index.to(DEVICE), **extras).backward(dy.to(DEVICE))
        torch.testing.assert_close(active.grad.double().cpu(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.grad.double().cpu(), wide[0].grad, rtol=tolerance, atol=10 * tolerance)
    full = wide[1].grad.square().sum(3 - dim)
    torch.testing.assert_close(norms.grad.double().cpu(), full, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sizes, dtype", [({"hidden_size": 36, "intermediate_size": 45, "head_dim": 8}, torch.float32), ({}, torch.bfloat16)]
)
def test_a_mixture_of_experts_trains_as_on_the_cpu(sizes, dtype):
    import transformers
    from model_matrix import CAUSAL, SHAPE

    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4.57 has no experts interface")
    found = []
    for device in (DEVICE, "cpu"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            "mixtral", **{**SHAPE, **CAUSAL["mixtral"], **sizes}, use_cache=False
        )
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        found.append(walk(device, model, target_modules="all-matrices", selection="uniform_nr")[:2])
    assert found[0][0] == pytest.approx(found[1][0], rel=0.01 if dtype == torch.float32 else 0.05)
    assert found[0][1] == found[1][1]
    assert sum(isinstance(index[0], list) for index in found[0][1][0]) == 4  # experts have an index each
    assert found[0][0][-1] < 0.95 * found[0][0][0]


def test_bitsandbytes_trains_through_the_trainer(tmp_path):
    pytest.importorskip("bitsandbytes")
    from test_base_optimizers import train as run

    job = run(tmp_path, "adamw_bnb_8bit", use_cpu=ON_CPU)
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert min(losses[1:]) < losses[0] and job.optimizer.optimizer.grass.step == 5
    states = [job.optimizer.optimizer.state[part.active] for part in grass_slices(job.model)]
    assert any(s["state1"].dtype == torch.uint8 and s["state1"].device.type == DEVICE for s in states)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_bitsandbytes_state_follows_its_rows(side, name):
    cls = getattr(pytest.importorskip("bitsandbytes.optim"), name)
    from test_base_optimizers import dequantised

    model = nn.Sequential(nn.Linear(*((64, 128) if side == "output" else (128, 64)), bias=False)).to(DEVICE)
    rules = {"selection": "uniform_nr", "state_policy": "carry"}
    convert_to_grass(model, GrassConfig(rank=64, side=side, update_interval=2, **rules))
    optimizer, layer, calls = grass_optimizer(model, cls, lr=1e-3), model[0].weight_slice, []
    original = layer.load_selection

    def spy(selection, seed):
        calls.append((dequantised(optimizer.state[layer.active], layer.active.shape), original(selection, seed)))
        return calls[-1][1]

    layer.load_selection = spy
    for _ in range(3):
        model(torch.randn(32, model[0].in_features, device=DEVICE)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (before, source), after = calls[-1], dequantised(optimizer.state[layer.active], layer.active.shape)
    source = source.to(DEVICE)
    kept, fresh = (source >= 0).nonzero().squeeze(1), (source < 0).nonzero().squeeze(1)
    assert len(kept) and len(fresh) and after
    for key, value in after.items():
        moved = before[key].index_select(layer.dim, source[kept])
        assert moved.any()
        atol = 0.05 * float(before[key].abs().max())  # one more rounding to 8 bits
        torch.testing.assert_close(value.index_select(layer.dim, kept), moved, rtol=0, atol=atol)
        assert not value.index_select(layer.dim, fresh).any()


# -- memory and waiting --------------------------------------------------------------------------------------------


def peak_of(call):
    """Bytes that a call holds at its peak beyond those that were held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def wide_step(settings, dtype):
    """(a weight of 8192 x 8192, a step of its training)."""
    model = nn.Sequential(nn.Linear(8192, 8192, bias=False, device=DEVICE, dtype=dtype))
    if settings is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    else:
        options = {"density": 1 / 32, "update_interval": 2, "stagger": 1, **settings}
        convert_to_grass(model, GrassConfig(**options))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    x = torch.randn(64, 8192, device=DEVICE, dtype=dtype)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model[0].weight, step


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"side": "output"}, {"selection": "top_r"}, {"resident": False}], ids=str)
def test_no_full_gradient_in_the_memory_of_a_step(settings, dtype):
    """Of steps that observe and select, and of others; the first two warm up libraries and make optimizer state."""
    weight, step = wide_step(settings, dtype)
    step(), step()
    peaks = [peak_of(step) for _ in range(4)]
    assert max(peaks) < weight.nbytes / 2, (peaks, weight.nbytes)


@needs_cuda
def test_the_memory_of_a_full_gradient_would_be_seen():
    weight, step = wide_step(None, torch.float32)
    step(), step()
    assert peak_of(step) >= weight.nbytes


def waits_of(call):
    """How often a call makes the host wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@needs_cuda
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_does_not_wait_for_the_device_and_a_step_waits_once(side, dtype):
    """Whether gradients are finite, however many layers there are; a step that selects waits for norms besides."""
    waits = []
    for depth in (1, 5):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth))).to(DEVICE, dtype)
        convert_to_grass(model, GrassConfig(rank=16, side=side, update_interval=4, stagger=1))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
        x = torch.randn(8, 64, device=DEVICE, dtype=dtype)
        for step in range(6):
            observing = model[0].weight_slice.norms is not None
            assert observing == (step % 4 == 0)
            assert waits_of(lambda model=model, x=x: model(x).square().sum().backward()) == 0, (depth, step)
            of_step = waits_of(optimizer.step)
            optimizer.zero_grad()
            if step in (1, 2, 5):
                waits.append(of_step)
    assert waits == [1] * 6
    assert waits_of(lambda: x.sum().item()) == 1  # they are seen


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
