"""PEFT: adapters trained by Grass, base layers beside adapters, merged models; plain keys and true reasons."""

import pytest
import torch
from helpers import tiny_llama, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from grass_hf import GrassConfig, convert_to_grass, restore_model
from grass_hf.convert.conversion import grass_slices, is_converted
from grass_hf.convert.targets import plan

PREFIX = "base_model.model."
FACTORS = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def adapted(free="nothing", base=None, **options):
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **options})
    model = get_peft_model(base or tiny_llama(), config)
    for name, param in model.named_parameters():
        if free in name:
            param.requires_grad_(True)
    return model


def files(model, folder):
    """What is saved of a model with adapters, and of it merged."""
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return load_file(folder / "adapter" / "adapter_model.safetensors"), load_file(folder / "merged/model.safetensors")


def shapes(tensors):
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


@pytest.mark.parametrize(
    "free, targets",
    [("nothing", "all-linear"), ("mlp", ".*mlp.*"), ("base_layer", ".*q_proj")],
    ids=["factors", "base layers beside adapters", "base layers under adapters"],
)
def test_files_are_those_of_an_adamw_run(tmp_path, free, targets):
    model = adapted(free)
    made = trainer(tmp_path, model, optim_args=f"density=0.25,update_interval=2,target_modules={targets}")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    made.train()
    parts = list(grass_slices(model))
    assert parts and all(not torch.equal(slice_.weight, before[f"{slice_.state.name}.weight"]) for slice_ in parts)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        trained = model.eval()(input_ids=tokens).logits
    base = {n.removeprefix(PREFIX): p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    ours, theirs = files(model, tmp_path / "ours"), files(adapted(free), tmp_path / "theirs")
    assert shapes(ours[0]) == shapes(theirs[0]) and shapes(ours[1]) == shapes(theirs[1])
    for name, slice_ in ((slice_.state.name, slice_) for slice_ in parts if "lora" in slice_.state.name):
        assert torch.equal(ours[0][f"{name.replace('.default', '')}.weight"], slice_.weight)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "merged")
    plain = tiny_llama()
    names = {name: name.replace(".base_layer", "") for name in base if not name.endswith(".active")}
    plain.load_state_dict({short: base[name] for name, short in names.items()})
    again = PeftModel.from_pretrained(plain, tmp_path / "ours" / "adapter")
    with torch.no_grad():
        for loaded in (merged, again):
            torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, trained, rtol=1e-4, atol=1e-4)


def test_presets_say_what_they_take(caplog):
    found = plan(adapted(), GrassConfig(density=0.25))
    assert len(found.targets) == 4 and found.targets[0].name == f"{FACTORS}A.default"
    assert set(found.left_out.values()) == {"frozen by PEFT: left frozen"}
    assert f"takes 4 factors of PEFT's adapters ({FACTORS}A.default, ...)" in caplog.text
    assert "the 14 other layers are frozen by PEFT" in caplog.text
    caplog.clear()
    freed = plan(adapted(""), GrassConfig(density=0.25))
    names = {target.name for target in freed.targets}
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer" in names and not freed.left_out
    assert len(names) == 14 + 4 and "PEFT" not in caplog.text
    plan(adapted(), GrassConfig(density=0.25, target_modules=["lora_A.default"]))
    assert "PEFT" not in caplog.text  # they were asked for by name
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert set(plan(model, GrassConfig(density=0.25)).left_out.values()) == {"frozen by you: left frozen"}


def test_heads_stay_heads_inside_wrappers():
    for options in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}):
        for preset in ("all-linear", "all-matrices"):
            names = {
                target.name
                for target in plan(adapted("", **options), GrassConfig(density=0.25, target_modules=preset)).targets
            }
            heads = {name for name in names if "lm_head" in name and "lora" not in name}
            assert bool(heads) == (preset == "all-matrices"), (options, heads)


def test_a_wrapped_layer_goes_by_its_own_name():
    config = GrassConfig(density=0.25, target_modules=["q_proj"])
    names = {target.name for target in plan(adapted("base_layer"), config).targets}
    assert names == {f"{PREFIX}model.layers.{n}.self_attn.q_proj.base_layer" for n in (0, 1)}
    with pytest.raises(ValueError, match="frozen by PEFT"):
        plan(adapted(), config)


def test_what_is_left_after_merging_is_restored_and_converted_anew():
    model = convert_to_grass(adapted("mlp"), GrassConfig(density=0.25, target_modules=".*mlp.*"))
    merged = model.merge_and_unload()
    saved = {name: value.clone() for name, value in merged.state_dict().items()}
    with pytest.raises(ValueError, match="call restore_model on that part first"):
        convert_to_grass(merged, GrassConfig(density=0.25))
    restore_model(merged)
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear and not list(grass_slices(merged))
    assert all(torch.equal(value, saved[name]) for name, value in merged.state_dict().items())
    assert merged.model.layers[0].mlp.up_proj.weight.requires_grad
    convert_to_grass(merged.requires_grad_(True), GrassConfig(density=0.25))


def test_a_converted_model_inside_adapters_is_not_taken_for_one():
    model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25))
    outer = adapted(base=model)
    assert is_converted(model) and not is_converted(outer)
    with pytest.raises(ValueError, match="contains a part that was already converted: call restore_model on that part"):
        convert_to_grass(outer, GrassConfig(density=0.25))
    restore_model(model)
    assert not list(grass_slices(outer)) and list(outer.state_dict()) == list(adapted().state_dict())
