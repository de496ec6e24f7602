"""The support matrix's own oracles find what is made wrong, and its tiny configurations hold every kind of layer."""

import pytest
import torch
from matrix_cases import build, case, settings
from matrix_checks import Trial, check
from tiny_configs import tiny_config
from transformers import AutoConfig

from grass_hf.convert import modules
from grass_hf.convert.audit import callers
from grass_hf.slices.doors import Doors
from grass_hf.slices.ops import row_norms, tap
from grass_hf.slices.slice import Slice

LLAMA = "llama:LlamaForCausalLM"


def test_a_right_one_is_right():
    found = check(case(LLAMA))
    assert (found.status, found.dtype, found.coverage) == ("ok", "float64", 1.0)
    assert found.targets == {"embedding": 1, "linear": 15} and not found.wrong


def test_it_finds_a_gradient_that_is_a_little_off(monkeypatch):
    monkeypatch.setattr(tap.torch, "mm", lambda a, b, mm=torch.mm: mm(a, b) * (1 + 1e-3))
    assert any("gradient of" in sentence for sentence in check(case(LLAMA)).wrong)


def test_it_finds_norms_of_something_else(monkeypatch):
    norms = row_norms.squared_norms
    monkeypatch.setattr(tap, "squared_norms", lambda a, b: norms(a, b) * 1.01)
    assert any("squared norms of" in sentence for sentence in check(case(LLAMA)).wrong)


def test_it_finds_rows_that_are_not_the_slices(monkeypatch):
    write_back = Slice.write_back

    def beside(self, seed=None):
        write_back(self, seed)
        outside = next(row for row in range(self.state.size) if row not in self.index)
        self.weight.data.select(self.dim, outside).add_(1e-13)

    monkeypatch.setattr(Slice, "write_back", beside)
    wrong = check(case(LLAMA)).wrong
    for start in ("a step at density 1/4 moves", "the second step at density 1/4 moves"):
        assert any(sentence.startswith(start) and "outside of its slice" in sentence for sentence in wrong)


def test_it_finds_a_weight_without_a_gradient(monkeypatch):
    monkeypatch.setattr(modules.TappedLinear, "forward", torch.nn.Linear.forward)
    monkeypatch.setattr(callers, "_tapped", callers._tapped.__wrapped__)  # as it is now
    assert any("has no gradient, unlike the plain weight" in sentence for sentence in check(case(LLAMA)).wrong)


def test_it_finds_a_checkpoint_that_is_not_plain(monkeypatch):
    monkeypatch.setattr(Doors, "_save_to_state_dict", torch.nn.Module._save_to_state_dict)
    assert "differs from the plain one" in str(Trial(case(LLAMA)).check_movement_and_files(None))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen3_next:Qwen3NextForCausalLM", {"linear_attention", "full_attention"}),
        ("gemma3_text:Gemma3ForCausalLM", {"sliding_attention", "full_attention"}),
    ],
)
def test_every_kind_of_layer_stays(name, kinds):
    pytest.importorskip("transformers", minversion="5.0")
    model = build(case(name))
    assert set(model.config.layer_types) == kinds and model.config.num_hidden_layers == 2
    assert sum(p.numel() for p in model.parameters()) < 100_000


def test_what_the_rules_get_wrong_is_overridden():
    cls = type(AutoConfig.for_model("llama"))
    assert tiny_config(cls).hidden_size == 32 and tiny_config(cls, {"hidden_size": 48}).hidden_size == 48
    assert settings(case("dbrx:DbrxForCausalLM"))["fields"]["ffn_config"]["moe_num_experts"] == 4
