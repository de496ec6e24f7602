"""Frozen weights in int8: stored and found again exactly, trained in float32, saved plain."""

import pytest
import torch
from helpers import assert_same_weights, plain_state, tiny_llama, trainer

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, int8, restore_model
from grass_hf.convert import grass_slices

TOKENS = torch.arange(48).view(4, 12)
SETTINGS = {"density": 0.25, "update_interval": 3, "weight_dtype": "int8"}


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def converted(dtype=torch.float32, model=None, **settings):
    model = convert_to_grass((model or tiny_llama()).to(dtype), GrassConfig(**{**SETTINGS, **settings}))
    return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_weights_are_found_again_exactly(dtype):
    torch.manual_seed(0)
    weight = int8.quantize(torch.randn(600, 96).mul(torch.rand(600, 1)).to(dtype))
    index = torch.randperm(600)[:200]
    for step in range(20):  # as training does: rows stored with random rounding, scales multiplied by decay
        draws = torch.Generator().manual_seed(step)
        int8.store_rows(weight, index, int8.read_rows(weight, index) + 0.01 * torch.randn(200, 96), draws)
        int8.multiply(weight, 0.999, draws)
    again = int8.quantize(int8.dequantize(weight))
    assert torch.equal(again.int_data, weight.int_data)
    assert torch.equal(again.scale, weight.scale)


def test_rounding_is_near_or_exact_in_the_mean():
    torch.manual_seed(0)
    plain = torch.randn(8, 64).bfloat16()
    weight, index = int8.quantize(plain), torch.arange(8)
    bound = weight.scale.float()[:, None]
    assert ((int8.dequantize(weight).float() - plain.float()).abs() <= 0.51 * bound + 0.004 * plain.float().abs()).all()
    total = torch.zeros(8, 64)
    for number in range(2000):
        int8.store_rows(weight, index, plain, torch.Generator().manual_seed(number))
        total += int8.read_rows(weight, index)
    assert ((total / 2000 - plain.float()).abs() < 5 * bound / 2 / 2000**0.5 + 1e-6).all()


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_dequantised_weight(bias):
    torch.manual_seed(0)
    weight = int8.quantize(torch.randn(24, 16))
    b = torch.randn(24) if bias else None
    x = torch.randn(2, 5, 16, requires_grad=True)
    y = int8.linear(x, weight, b)
    y.square().sum().backward()
    x2 = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(x2, int8.dequantize(weight), b)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_saves_plain(dtype, tmp_path):
    model, optimizer = converted(dtype)
    parts = list(grass_slices(model))
    assert all(int8.is_int8(part.weight) and part.active.dtype == torch.float32 for part in parts)
    losses = train(model, optimizer, 20)
    assert losses[-1] < 0.7 * losses[0]
    optimizer.grass.settle()
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {k: (v.shape, v.dtype) for k, v in plain.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in tiny_llama().to(dtype).state_dict().items()
    }
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=TOKENS).logits.float() for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert_same_weights(restore_model(model), plain)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_what_is_not_trained_does_not_change():
    model, optimizer = converted(weight_dtype="int8", decay="active", selection="uniform_nr")
    part = next(grass_slices(model))
    codes, scale, index = part.weight.int_data.clone(), part.weight.scale.clone(), part.index.clone()
    train(model, optimizer, 1)
    rest = torch.ones(len(scale), dtype=torch.bool).index_fill_(0, index, False)
    assert torch.equal(part.weight.int_data[rest], codes[rest]) and torch.equal(part.weight.scale[rest], scale[rest])
    assert not torch.equal(part.weight.int_data[~rest], codes[~rest])


def test_small_updates_arrive_in_the_mean():
    """Updates of a hundredth of a code: rounding to nearest loses what stochastic rounding keeps."""

    def arrived(rounding):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
        torch.nn.init.constant_(layer[0].weight, 32.0 / 127)
        layer[0].weight.data[:, 0] = 1.0  # keeps every row's scale near 1 / 127, and the others near its code 32
        settings = {"density": 0.5, "update_interval": 2, "selection": "uniform_nr", "decay": "active"}
        convert_to_grass(layer, GrassConfig(weight_dtype="int8", target_modules=["0"], rounding=rounding, **settings))
        optimizer = grass_optimizer(layer, torch.optim.SGD, lr=2e-5)
        start = layer.state_dict()["0.weight"][:, 1:].mean().item()
        for _ in range(200):
            layer((torch.arange(256) > 0).float()[None]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return start - layer.state_dict()["0.weight"][:, 1:].mean().item()

    assert arrived("stochastic") == pytest.approx(0.002, rel=0.1)
    assert abs(arrived("nearest")) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumes_exactly_through_the_trainer(dtype, tmp_path):
    args = "density=0.25,update_interval=3,weight_dtype=int8,base=adamw_torch"

    def run(folder, resume=None, **options):
        made = trainer(folder, tiny_llama().to(getattr(torch, dtype)), optim_args=args, max_steps=10, **options)
        made.train(resume_from_checkpoint=resume)
        return made.model

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=4)
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-4"))
    assert_same_weights(resumed, whole)
    for ours, theirs in zip(grass_slices(resumed), grass_slices(whole), strict=True):
        assert torch.equal(ours.weight.int_data, theirs.weight.int_data)
        assert torch.equal(ours.weight.scale, theirs.weight.scale)
        assert torch.equal(ours.active, theirs.active)


def test_no_gradient_of_full_size():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                self.seen.add(tuple(out.shape))
            return out

    model, optimizer = converted(model=tiny_llama(vocab_size=50))  # the head is 50 x 32, and no target
    train(model, optimizer, 1)  # which observes, in blocks larger than these weights
    tokens = torch.arange(33).view(3, 11)
    loss = model(input_ids=tokens, labels=tokens).loss
    with Shapes() as shapes:
        loss.backward()
    full = {tuple(part.weight.shape) for part in grass_slices(model)}
    assert (8, 32) in shapes.seen and not shapes.seen & full, shapes.seen & full


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"side": "input"}, "use side='output'"),
        ({"selection": "uniform"}, "use selection='top_r'"),
        ({"resident": False}, "use resident=True"),
        ({"weight_dtype": "int4"}, "did you mean 'int8'"),
    ],
)
def test_refused_with_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        GrassConfig(**{**SETTINGS, **settings})


def test_fsdp2_is_refused_with_a_sentence(monkeypatch):
    from grass_hf.integrations import accelerate

    monkeypatch.setattr(accelerate, "fsdp_version", lambda: 2)
    with pytest.raises(ValueError, match="weight_dtype='int8' does not go with FSDP2"):
        accelerate.adapt_to_engine(GrassConfig(**SETTINGS), tiny_llama())


def test_state_dicts_are_plain():
    model, _ = converted(torch.bfloat16)
    assert all(type(value) is torch.Tensor for value in plain_state(model).values())
