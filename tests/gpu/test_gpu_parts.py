"""What a GPU could do differently: embeddings, int8, experts, bitsandbytes, memory, waiting for the device."""

import gc
import warnings

import pytest
import torch
from helpers import tiny_llama
from on_gpu import DEVICE, ON_CPU, needs_cuda, needs_device, train, walk
from torch import nn

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim import muon
from grass_hf.slices.ops import int8
from grass_hf.slices.ops.grouped_linear import grouped_linear
from grass_hf.slices.ops.tap import embedding_tap

pytestmark = needs_device


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
    for slice_ in grass_slices(model):
        assert int8.is_int8(slice_.weight) and slice_.weight.int_data.device.type == DEVICE
        again = int8.quantize(int8.dequantize(slice_.weight))
        assert torch.equal(again.int_data, slice_.weight.int_data) and torch.equal(again.scale, slice_.weight.scale)


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
    states = [job.optimizer.optimizer.state[slice_.active] for slice_ in grass_slices(job.model)]
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


@pytest.mark.parametrize("shape", [(5, 64, 256), (5, 256, 64)])
def test_muons_products_in_bfloat16_are_good_to_its_digits(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = muon.orthogonalised(values.double(), 5)
    ours = muon.orthogonalised(values.to(DEVICE, torch.bfloat16), 5).cpu().double()
    assert (ours - exact).norm() < 0.03 * exact.norm()


# -- memory and waiting --------------------------------------------------------------------------------------------


def peak_of(call):
    """Bytes that a call holds at its peak beyond those that were held before it."""
    gc.collect()  # models of earlier tests that are freed during the call would hide what it takes
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
        # no decay: it is multiplied into a half-precision weight in blocks of a size of their own
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
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
@pytest.mark.parametrize("base", [torch.optim.AdamW, MuonAdamW])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_does_not_wait_for_the_device_and_a_step_waits_once(side, dtype, base):
    """Whether gradients are finite, however many layers there are; a step that selects waits for norms besides."""
    waits = []
    for depth in (1, 5):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth))).to(DEVICE, dtype)
        convert_to_grass(model, GrassConfig(rank=16, side=side, update_interval=4, stagger=1))
        optimizer = grass_optimizer(model, base, lr=1e-3, weight_decay=0.1)
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
