"""resident=False over bfloat16 weights: slices that keep sixteen bits train as float32 slices do, bit for bit."""

import copy
import functools
import importlib

import pytest
import torch
from forks import ranks
from helpers import assert_same_weights, plain_state, tiny_llama, trainer

from grass_hf import GrassConfig, convert_to_grass, estimate_memory, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.low_bits import rounded
from grass_hf.slices.ops.rows import take_rows
from grass_hf.slices.part import Part

TOKENS = torch.arange(24).view(2, 12)
KEPT, WHOLE = {"resident": False}, {}
EXACT = {"resident": False, "gradient_dtype": "float32"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("grass_hf.optim.chunked_step.CHUNK_BYTES", 4000)


@pytest.fixture(autouse=True)
def ties_away(monkeypatch):
    """Slices that stay in memory are written as those that keep low bits are, see [Note: ties] in `slices.low_bits`."""
    put = Part.put

    def rounds(self, rows, seed=None):
        put(self, rounded(rows) if (rows.dtype, self.weight.dtype) == (torch.float32, torch.bfloat16) else rows, seed)

    monkeypatch.setattr(Part, "put", rounds)
    agrees = Part.agrees
    monkeypatch.setattr(
        Part,
        "agrees",
        lambda self, dtype=None: (
            torch.equal(rounded(self.active), self.take())
            if self.active.dtype == torch.float32 and self.is_plain
            else agrees(self, dtype)
        ),
    )
    monkeypatch.setattr("grass_hf.optim.controller.write_back_all", lambda slices: [own.write_back() for own in slices])


def made(settings, optimizer_class=torch.optim.AdamW):
    model = tiny_llama().bfloat16()
    convert_to_grass(model, GrassConfig(density=0.25, **{"update_interval": 3, **settings}))
    return model, grass_optimizer(model, optimizer_class, lr=1e-3, weight_decay=0.1)


def train(model, optimizer, steps, micro=1):
    for _ in range(steps):
        for x in TOKENS.chunk(micro):
            (model(input_ids=x, labels=x).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()


def run(settings, optimizer_class=torch.optim.AdamW, steps=8, micro=1):
    model, optimizer = made(settings, optimizer_class)
    train(model, optimizer, steps, micro)
    return model, optimizer


def assert_same_slices(kept, whole):
    """Weights, and all digits of the slices."""
    assert_same_weights(kept, whole)
    assert any(slice_.low.any() for slice_ in grass_slices(kept))
    for ours, theirs in zip(grass_slices(kept), grass_slices(whole), strict=True):
        assert ours.is_released and torch.equal(ours.index, theirs.index)
        with ours.held():
            assert torch.equal(ours.wide, theirs.active)


CASES = {
    "default": {},
    "rows of all matrices": {"side": "output", "target_modules": "all-matrices"},
    "algorithm 1": {"side": "output", "selection": "top_r", "state_policy": "reset", "stagger": 1},
    "seldom, decay of the slices only": {"update_interval": 100, "decay": "active"},
}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Adagrad])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_sixteen_bits_are_the_whole_slice(optimizer_class, settings):
    kept, optimizer = run({**KEPT, **settings}, optimizer_class)
    whole, _ = run({**WHOLE, **settings}, optimizer_class)
    slice_ = next(iter(grass_slices(kept)))
    assert slice_.active.dtype == torch.bfloat16 and slice_.low.dtype == torch.int16
    state = optimizer.state[slice_.active].values()
    assert {value.dtype for value in state if value.dim()} == {torch.float32}
    assert_same_slices(kept, whole)
    assert_same_weights(restore_model(kept), restore_model(whole))


def test_micro_batches_are_summed_in_the_dtype_of_gradients():
    whole, _ = run(WHOLE, micro=2)
    assert_same_slices(run(EXACT, micro=2)[0], whole)
    # sums of bfloat16 numbers are rounded: the weights stay within a few of their last places
    rounded = plain_state(run(KEPT, micro=2)[0])
    for name, value in plain_state(whole).items():
        assert (rounded[name] - value).abs().max() <= 8e-3 * value.abs().max()


@pytest.mark.parametrize("saved, resumed", [(KEPT, KEPT), (WHOLE, KEPT), (KEPT, WHOLE), (EXACT, KEPT)])
def test_resumes_exactly_and_between_the_ways(saved, resumed, tmp_path):
    expected, _ = run(WHOLE, steps=8)
    model, optimizer = run(saved, steps=4)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    fresh = tiny_llama().bfloat16()
    fresh.load_state_dict(plain_state(model))
    convert_to_grass(fresh, GrassConfig(density=0.25, update_interval=3, **resumed))
    other = grass_optimizer(fresh, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    other.load_state_dict(state)
    train(fresh, other, 4)
    assert_same_weights(fresh, expected)


def test_a_copy_trains_on_by_itself():
    pair = run(KEPT, steps=4)
    model, optimizer = copy.deepcopy(pair)
    train(model, optimizer, 4)
    assert_same_slices(model, run(WHOLE, steps=8)[0])
    train(*pair, 4)
    assert_same_weights(pair[0], model)


def test_a_checkpoint_of_format_4_is_read(tmp_path):
    model, optimizer = run(WHOLE, steps=4)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        if "grass" in group:
            assert '"version": 5' in group["grass"]
            group["grass"] = (
                group["grass"].replace('"version": 5', '"version": 4').replace(', "gradient_dtype": null', "")
            )
    fresh = tiny_llama().bfloat16()
    fresh.load_state_dict(plain_state(model))
    convert_to_grass(fresh, GrassConfig(density=0.25, update_interval=3, **KEPT))
    other = grass_optimizer(fresh, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    other.load_state_dict(state)
    train(fresh, other, 4)
    assert_same_slices(fresh, run(WHOLE, steps=8)[0])


def zero(slice_):
    slice_.weight.data.zero_()


def zero_a_row(slice_):
    with torch.no_grad():
        slice_.weight.select(slice_.dim, int(slice_.index[0])).zero_()


def scale(slice_):
    with torch.no_grad():
        slice_.weight.mul_(0.5)


def copy_into(slice_):
    with torch.no_grad():
        slice_.weight.copy_(slice_.weight.flip(0))


def assign(slice_):
    slice_.weight.data = slice_.weight.detach() + 1.0


@pytest.mark.parametrize("write", [zero, zero_a_row, scale, copy_into, assign])
def test_a_weight_that_is_overwritten_between_steps_drops_its_low_bits(write):
    model, optimizer = run(KEPT, steps=4)
    slices = list(grass_slices(model))
    assert all((slice_.low < 0).any() for slice_ in slices)
    write(slices[0])
    kept = slices[1].low.clone()
    before = take_rows(slices[0].weight.detach(), slices[0].index, slices[0].dim).float()
    with slices[0].held():
        assert torch.equal(slices[0].wide, before)
    with slices[1].held():
        assert slices[1].low is not None
    assert torch.equal(slices[1].low, kept)
    train(model, optimizer, 2)
    assert not any(value.isnan().any() for value in plain_state(model).values())


@pytest.mark.parametrize("way", ["in place", "data", "moved", "copied"])
def test_low_bits_outlive_values_that_are_written_again_as_they_were(way):
    model, optimizer = run(KEPT, steps=4)
    for slice_ in grass_slices(model):
        before = slice_.weight.detach().clone()
        with torch.no_grad():
            if way == "in place":
                slice_.weight.zero_()
                slice_.weight.copy_(before)
            elif way == "data":
                slice_.weight.data = before
    model = model.to("cpu").double().bfloat16() if way == "moved" else model
    if way == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 4)
    assert_same_slices(model, run(WHOLE, steps=8)[0])


def test_a_step_that_breaks_off_leaves_what_was_before(monkeypatch):
    model, optimizer = run(KEPT, steps=4)
    before = copy.deepcopy(plain_state(model)), [slice_.low.clone() for slice_ in grass_slices(model)]
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    module = importlib.import_module("torch.optim.adam")
    step = module.adam

    def breaks(params, *args, **kwargs):
        step(params, *args, **kwargs)
        if any(param.dtype == torch.float32 for param in params):
            raise KeyboardInterrupt("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(module, "adam", breaks)
        with pytest.raises(KeyboardInterrupt, match="broken off"):
            optimizer.step()
    slices = list(grass_slices(model))
    assert all(slice_.is_released and slice_.wide is None for slice_ in slices)
    assert all(map(torch.equal, (slice_.low for slice_ in slices), before[1]))
    for slice_ in slices:
        name = slice_.state.name
        key = next(key for key in before[0] if key.startswith(name))
        assert torch.equal(plain_state(model)[key], before[0][key])


def test_other_weights_drop_the_bits_of_those_before():
    model, _ = run(KEPT, steps=4)
    model.load_state_dict(plain_state(tiny_llama().bfloat16()))
    assert all(slice_.low is None for slice_ in grass_slices(model))


def test_through_the_trainer(tmp_path):
    def weights(name, optim_args, **options):
        own = trainer(tmp_path / name, tiny_llama().bfloat16(), optim_args=optim_args, max_grad_norm=0.0, **options)
        own.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4") if name == "c" else None)
        return own.model

    args = "density=0.25,update_interval=3,base=adamw_torch"
    whole = weights("b", args)
    assert_same_slices(weights("a", args + ",resident=false", save_strategy="steps", save_steps=4), whole)
    assert_same_slices(weights("c", args + ",resident=false"), whole)


@pytest.mark.dist
def test_on_two_ranks(tmp_path):
    settings = {"default": WHOLE, "exact": EXACT, "kept": KEPT}
    settings = {name: {"cast": "bfloat16", "side": "input", **own} for name, own in settings.items()}
    ranks(2, "batches.train", str(tmp_path / "out.pt"), 2, settings)
    found = torch.load(tmp_path / "out.pt")
    assert all(outcome["ranks"] == 2 for outcome in found.values())
    same = functools.partial(map, torch.equal)
    weights = {name: outcome["weights"].values() for name, outcome in found.items()}
    assert all(same(weights["exact"], weights["default"]))
    assert found["kept"]["losses"] == pytest.approx(found["default"]["losses"], rel=2e-2)
    assert found["kept"]["losses"][-1] != found["kept"]["losses"][0]


def test_what_cannot_be_kept_stops_with_a_sentence():
    def convert(dtype, **settings):
        convert_to_grass(tiny_llama().to(dtype), GrassConfig(density=0.5, **settings))

    with pytest.raises(ValueError, match=r"weights, which are torch\.float16, and slice_dtype='float32' holds more"):
        convert(torch.float16, resident=False, slice_dtype="float32")
    with pytest.raises(ValueError, match=r"slices that stay in memory are torch\.float32"):
        convert(torch.bfloat16, gradient_dtype="bfloat16")
    with pytest.raises(ValueError, match="gradient_dtype='float16' is neither the dtype of the weights"):
        convert(torch.bfloat16, resident=False, gradient_dtype="float16")
    convert(torch.bfloat16, resident=False, slice_dtype="float32", gradient_dtype="bfloat16")


def test_eight_bit_state_over_released_slices(monkeypatch):
    optimizers = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which its step would wait for

    def run(**settings):
        model = tiny_llama(hidden_size=128, intermediate_size=256).bfloat16()
        convert_to_grass(model, GrassConfig(density=0.5, update_interval=2, **settings))
        optimizer = grass_optimizer(model, optimizers.AdamW8bit, lr=1e-3)
        train(model, optimizer, 5)
        return model, {type(value).__name__ for state in optimizer.state.values() for value in state.values()}

    kept, kinds = run(resident=False)
    assert "OptimState8bit" in kinds
    assert_same_slices(kept, run()[0])
    # state is quantised some at a time, and comes out the same
    monkeypatch.setattr("grass_hf.optim.state_remap._QUANTISED", 512)
    assert_same_slices(kept, run()[0])


@pytest.mark.slow
def test_the_estimate_of_eight_bit_state_counts_no_compiled_step():
    optimizers = pytest.importorskip("torchao.optim")
    config = GrassConfig(density=0.5, resident=False)
    options = {"optimizer": optimizers.AdamW8bit, "optimizer_args": {"lr": 1e-3}, "sequence": 8}
    made = tiny_llama(hidden_size=128, intermediate_size=256, vocab_size=4096).bfloat16()
    step = estimate_memory(made, config, **options).step
    plain = estimate_memory(made, config, sequence=8).step
    assert step.optimizer_state < 0.5 * plain.optimizer_state and step.total < plain.total


def test_released_slices_of_int8_weights():
    pytest.importorskip("torchao")
    settings = {"weight_dtype": "int8", "side": "output"}
    model, optimizer = made({**settings, **KEPT})
    whole, _ = run({**settings, "stagger": 1}, steps=1)
    train(model, optimizer, 1)
    for ours, theirs in zip(grass_slices(model), grass_slices(whole), strict=True):
        if not torch.equal(ours.index, theirs.index):
            continue  # they have other turns
        with ours.held():
            assert ours.active.dtype == torch.bfloat16 and ours.wide.dtype == torch.float32
            scale = ours.weight.scale[ours.index].float()[:, None]
            assert ((ours.wide - theirs.active).abs() <= scale * 2**-16).all()
            # far closer than codes are
            assert ((ours.wide - ours.rank_part(ours, False).take()).abs() > scale * 2**-8).any()
    losses = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
