"""Frozen weights in int8: stored and found again exactly, trained in float32, saved plain."""

import json

import pytest
import torch
from forks import ranks
from helpers import assert_same_weights, plain_state, tiny_llama, trainer
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model, save_plain
from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations import saving
from grass_hf.slices.ops import int8

TOKENS = torch.arange(48).view(4, 12)
SETTINGS = {"density": 0.25, "side": "output", "update_interval": 3, "weight_dtype": "int8"}


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
    assert all(int8.is_int8(slice_.weight) and slice_.active.dtype == torch.float32 for slice_ in parts)
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
    slice_ = next(grass_slices(model))
    codes, scale, index = slice_.weight.int_data.clone(), slice_.weight.scale.clone(), slice_.index.clone()
    train(model, optimizer, 1)
    rest = torch.ones(len(scale), dtype=torch.bool).index_fill_(0, index, False)
    assert torch.equal(slice_.weight.int_data[rest], codes[rest]) and torch.equal(
        slice_.weight.scale[rest], scale[rest]
    )
    assert not torch.equal(slice_.weight.int_data[~rest], codes[~rest])


def test_small_updates_arrive_in_the_mean():
    """Updates of a hundredth of a code: rounding to nearest loses what stochastic rounding keeps."""

    def arrived(rounding):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
        torch.nn.init.constant_(layer[0].weight, 32.0 / 127)
        layer[0].weight.data[:, 0] = 1.0  # keeps every row's scale near 1 / 127, and the others near its code 32
        settings = {"density": 0.5, "update_interval": 2, "selection": "uniform_nr", "decay": "active"}
        convert_to_grass(
            layer, GrassConfig(weight_dtype="int8", side="output", target_modules=["0"], rounding=rounding, **settings)
        )
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
    args = "density=0.25,side=output,update_interval=3,weight_dtype=int8,base=adamw_torch"

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

    model, optimizer = converted(model=tiny_llama(vocab_size=50), stagger=1)  # the head is 50 x 32, and no target
    train(model, optimizer, 1)  # which observes, in blocks larger than these weights
    tokens = torch.arange(33).view(3, 11)
    loss = model(input_ids=tokens, labels=tokens).loss
    with Shapes() as shapes:
        loss.backward()
    full = {tuple(slice_.weight.shape) for slice_ in grass_slices(model)}
    assert (8, 32) in shapes.seen and not shapes.seen & full, shapes.seen & full


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"side": "input"}, "side='input', the default, does not go with: use side='output'"),
        ({"side": "auto"}, "side='auto' does not go with: use side='output'"),
        ({"selection": "uniform"}, "use selection='multinomial_norm_nr'"),
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


def test_weights_that_are_int8_already_train_the_same():
    """A large model is never there in its own dtype: each weight is quantised as soon as it is made."""

    def losses(beforehand):
        model = tiny_llama().bfloat16()
        if beforehand:
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    module.weight = int8.quantize(module.weight)
        # rows of a slice start from the plain weights, or else from the codes
        return train(*converted(torch.bfloat16, model, selection="uniform_nr"), 4)

    assert losses(True)[0] == losses(False)[0]
    assert losses(True) == pytest.approx(losses(False), abs=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("largest", [2_000, 10**9])
def test_a_plain_checkpoint_is_written_shard_by_shard(tmp_path, tied, largest, monkeypatch):
    model, optimizer = converted(torch.bfloat16, tiny_llama(tie_word_embeddings=tied))
    train(model, optimizer, 2)
    held = []

    def save(shard, path, metadata):
        held.append(sum(tensor.nbytes for tensor in shard.values()))
        save_file(shard, path, metadata=metadata)

    save_file = saving.save_file
    monkeypatch.setattr(saving, "save_file", save)
    old = tmp_path / "ours" / "model-00001-of-00003.safetensors"
    old.parent.mkdir()
    old.write_text("of an earlier checkpoint")
    save_plain(model, tmp_path / "ours", max_shard_size=largest)
    model.save_pretrained(tmp_path / "theirs")
    largest_tensor = max(p.nbytes for p in tiny_llama().bfloat16().parameters())
    assert max(held) <= max(largest, largest_tensor) and (len(held) > 1) == (largest < 10**9)
    ours = {k: v for file in (tmp_path / "ours").glob("*.safetensors") for k, v in load_file(file).items()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")]
    assert configs[0] == configs[1]
    loaded = [LlamaForCausalLM.from_pretrained(tmp_path / folder) for folder in ("ours", "theirs")]
    assert_same_weights(*loaded)
    assert not old.exists() or len(held) == 3


def test_what_cannot_be_written_shard_by_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        save_plain(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(ValueError, match="max_shard_size=0 is not a positive number"):
        save_plain(tiny_llama(), tmp_path / "a", max_shard_size=0)
    assert not (tmp_path / "a").exists()


def test_two_ranks_under_ddp_are_one():
    model, optimizer = converted(torch.float32, score_by="sequence")
    alone = train(model, optimizer, 5)
    for said in ranks(2, "int8_under_ddp", SETTINGS):
        found = json.loads(said.splitlines()[-1])
        assert found["losses"] == pytest.approx(alone, abs=1e-5)
        assert found["rows"] == [slice_.index.tolist() for slice_ in grass_slices(model)]


def test_ranks_with_other_int8_weights_and_shards_stop():
    for said in ranks(2, "int8_that_stops", SETTINGS):
        other, sharded = said.splitlines()[-2:]
        assert "disagree on the first step" in other and "int8 model.layers.0" in other
        assert "weight_dtype='int8' does not go with sharded parameters" in sharded
