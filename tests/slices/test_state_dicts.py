"""What goes out of a converted model and into it: plain state dicts everywhere, slices that follow their weights."""

import copy
import json

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from helpers import assert_same_weights, tiny_llama
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.cli import app
from grass_hf.convert.conversion import grass_slices

TOKENS = torch.arange(48).view(4, 12)


def tied():
    return tiny_llama(tie_word_embeddings=True)


def mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, vocab_size=48, num_local_experts=4))


def converted(model, target_modules="all-matrices", **settings):
    return convert_to_grass(model, GrassConfig(density=0.5, target_modules=target_modules, **settings))


def train(model, steps=2):
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def looks(state_dict):
    return [(name, value.shape, value.dtype) for name, value in state_dict.items()]


def agree(model):
    """Whether slices are their weights' rows; where they are divided by multipliers, but for rounding."""
    parts = [slice_.rank_part(slice_, False) for slice_ in grass_slices(model)]
    return all(slice_.agrees() or torch.allclose(slice_.active, slice_.loaded(slice_.active.dtype)) for slice_ in parts)


@pytest.mark.parametrize("make", [tiny_llama, tied, mixtral])
@pytest.mark.parametrize("settings", [{}, {"weight_dtype": "int8", "side": "output", "target_modules": "all-linear"}])
def test_keys_shapes_dtypes_and_order_are_those_of_the_plain_model(make, settings):
    plain, model = make().bfloat16(), converted(make().bfloat16(), **settings)
    assert looks(model.state_dict()) == looks(plain.state_dict())
    assert model.state_dict()._metadata == plain.state_dict()._metadata
    assert looks(model.state_dict(keep_vars=True, prefix="a.")) == looks(plain.state_dict(keep_vars=True, prefix="a."))
    for (name, ours), (_, theirs) in zip(
        [(n, m) for n, m in model.named_modules() if not n.endswith("_slice")], plain.named_modules(), strict=True
    ):
        assert looks(ours.state_dict()) == looks(theirs.state_dict()), name
    assert vars(model).keys() - vars(plain).keys() <= {"grass", "_ddp_params_and_buffers_to_ignore"}


def holders():
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    def in_peft(model):
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))

    return [Holder, torch.compile, nn.DataParallel, in_peft]


@pytest.mark.parametrize("hold", holders(), ids=["module", "compiled", "parallel", "peft"])
def test_whoever_holds_the_model(hold):
    plain, model = tiny_llama(), converted(tiny_llama())
    torch.manual_seed(0)
    ours = hold(model)
    torch.manual_seed(0)
    theirs = hold(plain)
    assert looks(ours.state_dict()) == looks(theirs.state_dict())
    for saved in (get_model_state_dict, Accelerator(cpu=True).get_state_dict):
        assert looks(saved(ours)) == looks(saved(theirs))
    if hasattr(ours, "peft_config"):
        assert looks(get_peft_model_state_dict(ours)) == looks(get_peft_model_state_dict(theirs))


@pytest.mark.parametrize("make", [tiny_llama, tied])
def test_files_load_strictly_both_ways(make, tmp_path):
    model = converted(make())
    train(model)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    safetensors.torch.save_model(model, str(tmp_path / "a.safetensors"))
    plain = make()
    plain.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert_same_weights(plain, model)
    for into in (make(), converted(make())):
        assert safetensors.torch.load_model(into, str(tmp_path / "a.safetensors")) == (set(), [])
        assert_same_weights(into, model)
    assert agree(into)
    plain.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    ours, theirs = (safetensors.torch.load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert looks(ours) == looks(theirs)


@pytest.mark.parametrize("make", [tiny_llama, tied, mixtral])
@pytest.mark.parametrize("way", ["copied", "assigned", "distributed", "old"])
def test_slices_follow_weights_that_are_loaded(make, way):
    torch.manual_seed(3)
    others = make()
    for param in others.parameters():
        nn.init.normal_(param, std=0.1)
    state = others.state_dict()
    model = converted(make(), selection="multinomial_norm" if way == "copied" else "top_r", update_interval=1)
    if way == "copied":
        train(model)  # multipliers are no ones any more
    if way == "old":  # of format 4, when state dicts of converted models had slices, of other rows perhaps
        named = [(name, slice_) for name, slice_ in model.named_modules() if slice_ in set(grass_slices(model))]
        state = {**state, **{f"{name}.active": torch.full_like(slice_.active, 7.0) for name, slice_ in named}}
        assert len(state) > len(others.state_dict())
    if way == "distributed":
        set_model_state_dict(model, state)
    else:
        found = model.load_state_dict(state, assign=way == "assigned")
        assert not found.missing_keys and not found.unexpected_keys
    assert_same_weights(model, others)
    assert agree(model) and not any(param.requires_grad for param in (slice_.weight for slice_ in grass_slices(model)))


def test_what_is_missing_or_not_expected_is_said():
    model, state = converted(tiny_llama()), tiny_llama().state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    del state[name]
    state |= {f"{name}_slice.other": torch.ones(1), "model.norm_slice.active": torch.ones(1)}
    found = model.load_state_dict(state, strict=False)
    assert found.missing_keys == [name]
    assert sorted(found.unexpected_keys) == [f"{name}_slice.other", "model.norm_slice.active"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*up_proj.weight"):
        model.load_state_dict(tiny_llama(intermediate_size=56).state_dict())
    int8 = converted(tiny_llama(), "all-linear", weight_dtype="int8", side="output")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*up_proj.weight"):
        int8.load_state_dict(tiny_llama(intermediate_size=56).state_dict())


@pytest.mark.parametrize("weights_first", [True, False])
def test_weights_and_optimizer_in_any_order(weights_first):
    model = converted(tied().bfloat16(), update_interval=2)
    optimizer = train(model, steps=5)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = converted(tied().bfloat16(), update_interval=2)
    other = grass_optimizer(again, torch.optim.AdamW, lr=1e-2)
    for loaded, saved in ((again, weights), (other, state))[:: 1 if weights_first else -1]:
        loaded.load_state_dict(saved)
    for ours, theirs in zip(grass_slices(again), grass_slices(model), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.active, theirs.active), ours.state.name  # with the digits that the weight has not
    assert_same_weights(again, model)


def test_a_part_of_a_state_dict():
    model, others = converted(tied()), tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        others.lm_head.weight.mul_(2)
        others.model.layers[0].mlp.up_proj.weight.mul_(2)
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]  # a tied weight under its second name alone
    found = model.load_state_dict({name: others.state_dict()[name] for name in names}, strict=False)
    assert not found.unexpected_keys and names[0] not in found.missing_keys
    assert agree(model)
    assert_same_weights(model, others)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "parallel"])
def test_distributed_checkpoint_loads_strictly_through_a_wrapper(wrap):
    model, others = converted(tiny_llama()), tiny_llama(initializer_range=0.3)
    state = others.state_dict()
    wrapped = wrap(model) if wrap is torch.compile else model
    found = set_model_state_dict(wrapped, state, options=StateDictOptions(strict=True))
    assert not found.missing_keys and not found.unexpected_keys
    assert not any(key.endswith(".active") for key in state)
    assert_same_weights(model, others)
    assert agree(model)


def test_what_is_trained_is_not_frozen_to_distributed_checkpoint():
    """accelerate saves adapters so, under FSDP2 with full state."""

    def adapters(model):
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))

    plain, model = adapters(tiny_llama()), converted(adapters(tiny_llama()), "all-linear")
    options = StateDictOptions(ignore_frozen_params=True)
    assert looks(get_model_state_dict(model, options=options)) == looks(get_model_state_dict(plain, options=options))
    assert not any(slice_.weight.requires_grad for slice_ in grass_slices(model))


@pytest.mark.parametrize("selection", ["top_r", "multinomial_norm"])
def test_a_model_that_is_made_without_values(selection):
    with torch.device("meta"):
        model = tied()
    converted(model, selection=selection, update_interval=1)
    model.load_state_dict(tied().state_dict(), assign=True)
    model.tie_weights()
    expected = converted(tied(), selection=selection, update_interval=1)
    for ours, theirs in zip(grass_slices(model), grass_slices(expected), strict=True):
        assert not ours.active.is_meta and ours.active.requires_grad
        assert torch.equal(ours.active, theirs.active) and torch.equal(ours.index, theirs.index)
    model.model.rotary_emb = tied().model.rotary_emb  # its buffer is in no state dict
    train(model, steps=4)
    train(expected, steps=4)
    assert_same_weights(model, expected)


def test_memory_without_values_is_filled_before_the_first_step():
    """Whatever brings the weights afterwards, an initialisation in place for instance, which loads nothing."""
    model = converted(tiny_llama())
    reference = converted(tiny_llama())
    model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for slice_ in grass_slices(model):
            slice_.active.fill_(torch.nan)
        plain = dict(tiny_llama().named_parameters())
        for name, param in model.named_parameters():
            if name in plain:
                param.copy_(plain[name])
        for name, buffer in tiny_llama().named_buffers():
            model.get_buffer(name).copy_(buffer)
    assert [slice_.index.tolist() for slice_ in grass_slices(model)] == [
        p.index.tolist() for p in grass_slices(reference)
    ]
    train(model)
    train(reference)
    assert_same_weights(model, reference)
    assert_same_weights(restore_model(model), restore_model(reference))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [True, False])
def test_slices_are_removed_from_files(tmp_path, kind, sharded):
    from grass_hf.integrations.adapters.plain import remove_slices

    model = tiny_llama()
    parts = {f"{name}_slice.active": torch.ones(2, 2) for name in model.state_dict() if "proj" in name}
    contents = [{**model.state_dict(), **parts}]
    if sharded:
        contents = [dict(list(contents[0].items())[:9]), dict(list(contents[0].items())[9:]), parts]
    names = [f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{n}.{kind}" for n in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        if kind == "bin":
            torch.save(content, tmp_path / name)
        else:
            safetensors.torch.save_file(content, tmp_path / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {key: n for n, c in zip(names, contents, strict=True) for key in c},
    }
    (tmp_path / f"model.{kind}.index.json").write_text(json.dumps(index))
    said = CliRunner().invoke(app.app, ["plain", str(tmp_path)])
    assert said.exit_code == 0 and f"{len(parts)} slices removed" in said.output, said.output
    read = safetensors.torch.load_file if kind == "safetensors" else torch.load
    found = [read(tmp_path / name) for name in names if (tmp_path / name).exists()]
    assert len(found) == (2 if sharded else 1)
    after = {key: value for content in found for key, value in content.items()}
    assert looks(dict(sorted(after.items()))) == looks(dict(sorted(model.state_dict().items())))
    index = json.loads((tmp_path / f"model.{kind}.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert remove_slices(tmp_path) == 0
    safetensors.torch.save_file(parts, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"_slice.active without model.layers.0.*the folder with all files"):
        remove_slices(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        remove_slices(tmp_path / "nothing")
