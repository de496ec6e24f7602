"""What is compressed: PEFT's matching, and a reason for everything that is not."""

import copy

import pytest
import torch
from helpers import VOCABULARY, assert_same_weights, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, T5Config

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer, restore_model
from grass_hf.config.optim_args import config_and_base
from grass_hf.convert.conversion import grass_slices, is_converted
from grass_hf.convert.targets import plan
from grass_hf.integrations.start_table import start_report

pytestmark = pytest.mark.oldest


def names(model, **settings):
    return {target.name for target in plan(model, GrassConfig(density=0.25, **settings)).targets}


PATTERNS = [
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": r".*\.mlp\.(gate|up)_proj"},
    {"target_modules": ["lm_head", "o_proj"]},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_matches_what_peft_matches(patterns):
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, **patterns))
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "base_layer")
    }
    assert names(tiny_llama(), **patterns) == theirs


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 4, "down_proj": 12},
        {"(q|k|v|o)_proj": 4},
        {"layers.0.self_attn.q_proj": 12, ".*self_attn.*": 4},  # the first that matches counts
        {r"layers\.1\.mlp\.up_proj": 4, "model.layers.0.self_attn.v_proj": 12},
    ],
    ids=str,
)
def test_rank_pattern_is_pefts(pattern):
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=8, rank_pattern=pattern, target_modules="all-linear"))
    theirs = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in adapted.named_modules()
        if hasattr(module, "base_layer")
    }
    ours = {t.name: t.rank for t in plan(tiny_llama(), GrassConfig(rank=8, rank_pattern=pattern)).targets}
    assert ours == theirs and set(ours.values()) > {8}


@pytest.mark.parametrize(
    "preset, share, others", [("muon", 1.0, 0.25), ("muon_quarter", 0.5, 0.125), ("muon_eighth", 0.25, 0.0625)]
)
@pytest.mark.parametrize(
    "config, attention",
    [
        (LlamaConfig(), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (GPT2Config(), {"attn.c_attn", "attn.c_proj"}),
        (GPTNeoXConfig(), {"query_key_value", "attention.dense"}),
        (BertConfig(), {"query", "key", "value", "attention.output.dense"}),
        (T5Config(), {"q", "k", "v", "o"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_preset_gives_attention_more(config, attention, preset, share, others):
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    settings = config_and_base({"preset": preset})[0]
    shares = {t.name: t.rank / t.size for t in plan(model, settings).targets}
    mine = {name for name in shares if any(name.endswith(f".{leaf}") for leaf in attention)}
    assert {shares[name] for name in mine} == {share} and 0 < len(mine) < len(shares)
    assert {shares[name] for name in shares if name not in mine} == {others}


def test_layers_of_different_density_choose_apart_and_get_their_own_gradients():
    model = tiny_llama()
    config = GrassConfig(density=0.25, density_pattern={"v_proj": 0.5, "gate_proj": 1.0, "up_proj": 1})
    tokens = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    full = {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaders = {t.name.rpartition(".")[2]: t.leader.rpartition(".")[2] for t in plan(model, config).targets}
    assert (leaders["k_proj"], leaders["v_proj"], leaders["up_proj"]) == ("q_proj", "v_proj", "gate_proj")
    convert_to_grass(model, config)
    model(input_ids=tokens, labels=tokens).loss.backward()
    shares = {}
    for layer in grass_slices(model):
        name, index = layer.state.name, layer.index
        torch.testing.assert_close(layer.active.grad, full[name][:, index])
        shares[name.rpartition(".")[2]] = len(index) / full[name].shape[1]
    assert shares == dict.fromkeys(shares, 0.25) | {"v_proj": 0.5, "gate_proj": 1.0, "up_proj": 1.0}


REFUSED = [
    (
        {"density_pattern": {"o_proj": 0.5, "attn": 0.1}},
        ["density_pattern", "'attn'", "no target of Llama", "o_proj, gate_proj"],
    ),
    ({"rank": 8, "rank_pattern": {".*_proj": 8, "q_proj": 4}}, ["rank_pattern", "'q_proj'", "the first one counts"]),
    ({"rank": 64}, ["rank=64", "48 rows", "density=0.25"]),
    ({"target_modules": ["qproj"]}, ["'qproj'", "q_proj"]),
    ({"target_modules": ["q_proj", "w_proj"]}, ["'w_proj'", "did you mean"]),
    ({"target_modules": "q_proj"}, ["'q_proj'", "regular expression", "q_proj"]),
    ({"target_modules": "(q_proj"}, ["'(q_proj'", "regular expression"]),
    ({"exclude_modules": ["nothing"]}, ["exclude_modules=['nothing']", "matches no module"]),
    ({"target_modules": ["input_layernorm"]}, ["input_layernorm", "LlamaRMSNorm is no linear layer"]),
]


@pytest.mark.parametrize("settings, words", REFUSED, ids=lambda v: str(v)[:40])
def test_refused_before_anything_is_changed(settings, words):
    model = tiny_llama()
    with pytest.raises(ValueError) as error:
        convert_to_grass(model, GrassConfig(**settings))
    for word in words:
        assert word in str(error.value)
    assert not is_converted(model) and all(p.requires_grad for p in model.parameters())
    assert not list(grass_slices(model))


def test_layers_below_rank_train_in_full_and_are_named():
    model = tiny_llama()  # k_proj and v_proj have 16 rows, under grouped-query attention
    convert_to_grass(model, GrassConfig(rank=20, side="output"))
    assert all("k_proj" not in layer.state.name for layer in grass_slices(model))
    assert model.model.layers[0].self_attn.k_proj.weight.requires_grad
    report = start_report(model, grass_optimizer(model, torch.optim.AdamW, lr=1e-3))
    reasons = {name: reason for _, name, _, reason in report.ordinary}
    assert "16 rows, fewer than rank=20" in reasons["model.layers.*.self_attn.k_proj.weight"]
    assert "embedding" in reasons["model.embed_tokens.weight"]
    assert "output head" in reasons["lm_head.weight"]
    assert "vector" in reasons["model.norm.weight"]
    listed = sum(elements for _, _, elements, _ in report.ordinary)
    slices = sum(layer.active.numel() for layer in grass_slices(model))
    assert listed + slices == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", "all-matrices"])
@pytest.mark.parametrize("base", ["AdamW", "SGD", "Muon"])
def test_start_report_counts_the_bytes_that_a_step_makes(base, targets):
    model = tiny_llama()
    full = 4 * sum(p.numel() for p in model.parameters())
    convert_to_grass(model, GrassConfig(density=0.25, target_modules=targets))
    optimizer = grass_optimizer(model, MuonAdamW if base == "Muon" else getattr(torch.optim, base), lr=1e-3)
    report = start_report(model, optimizer)
    tokens = torch.randint(VOCABULARY, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert (report.grass.optimizer_state, report.grass.gradients) == (state, grads)
    assert (report.adamw.gradients, report.adamw.optimizer_state) == (full, 2 * full)


def test_sides():
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8))
    chosen = {t.name: (t.side, t.size) for t in plan(model, GrassConfig(rank=4, side="auto")).targets}
    assert chosen == {"0": ("output", 24), "1": ("input", 24), "2": ("output", 8)}


def test_frozen_and_replaced_weights_are_left_and_named():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    down = model.model.layers[0].mlp.down_proj
    down.forward = down.forward  # what accelerate's offloading hooks do
    found = plan(model, GrassConfig(density=0.5, target_modules=["up_proj", "down_proj"]))
    assert "frozen by you" in found.left_out["model.layers.0.mlp.up_proj"]
    assert "replaced" in found.left_out["model.layers.0.mlp.down_proj"]
    assert len(found.targets) == 2


def test_all_matrices_adds_embeddings_and_the_head_by_feature_columns():
    model = tiny_llama()
    found = {t.name: t for t in plan(model, GrassConfig(density=0.5, target_modules="all-matrices")).targets}
    assert found.keys() - names(tiny_llama()) == {"model.embed_tokens", "lm_head"}
    assert all(found[name].size == 32 for name in ("model.embed_tokens", "lm_head"))  # the width, not the vocabulary


def test_a_tied_weight_is_one_target_by_whatever_name():
    for patterns in ("all-matrices", ["lm_head"], ["embed_tokens"]):
        model = tiny_llama(tie_word_embeddings=True)
        convert_to_grass(model, GrassConfig(density=0.5, target_modules=patterns))
        assert model.lm_head.weight_slice is model.model.embed_tokens.weight_slice
        assert sum(slice_.weight is model.lm_head.weight for slice_ in grass_slices(model)) == 1
    model = tiny_llama(tie_word_embeddings=True)
    found = plan(model, GrassConfig(target_modules="all-matrices", exclude_modules=["lm_head"]))
    assert "tied to lm_head, which exclude_modules names" in found.left_out["model.embed_tokens"]


def test_classification_head_is_no_target():
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny_llama().config)
    assert "score" not in names(model)


def test_converting_twice_and_wrapped_models_stop():
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(rank=8))
    with pytest.raises(ValueError, match=r"already converted .* restore_model"):
        convert_to_grass(model, GrassConfig(rank=8))
    with pytest.raises(ValueError, match="part that was already converted"):
        convert_to_grass(nn.Sequential(model), GrassConfig(rank=8))
    with pytest.raises(ValueError, match="convert the model first"):
        convert_to_grass(torch.compile(tiny_llama()), GrassConfig(rank=8))
    with pytest.raises(ValueError, match="convert the model first"):
        convert_to_grass(nn.DataParallel(tiny_llama()), GrassConfig(rank=8))
    with pytest.raises(ValueError, match="not converted"):
        grass_optimizer(tiny_llama(), torch.optim.AdamW)
    with pytest.raises(ValueError, match="no Grass slices"):
        restore_model(tiny_llama())


def test_an_optimizer_made_too_early_stops():
    from grass_hf.optim.factory import attach

    model = tiny_llama()
    early = torch.optim.AdamW(model.parameters())
    convert_to_grass(model, GrassConfig(rank=8))
    with pytest.raises(ValueError, match="make it after convert_to_grass"):
        attach(early, model)


def test_restore_gives_the_same_model_back():
    model, untouched = tiny_llama(), tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5, side="auto"))
    assert "rank=16" in repr(model) and type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    restore_model(model)
    assert repr(model) == repr(untouched)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert vars(model).keys() == vars(untouched).keys()
    assert_same_weights(model, untouched)
    assert set(vars(model.lm_head)) == set(vars(untouched.lm_head))
    q_proj, plain = model.model.layers[0].self_attn.q_proj, untouched.model.layers[0].self_attn.q_proj
    assert set(vars(q_proj)) == set(vars(plain)) and set(q_proj._buffers) == set(plain._buffers)


def test_deepcopy_of_a_converted_model_is_independent():
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5))
    twin = copy.deepcopy(model)
    optimizer = grass_optimizer(twin, torch.optim.SGD, lr=0.1)
    tokens = torch.randint(VOCABULARY, (2, 8))
    twin(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert_same_weights(restore_model(model), tiny_llama())
    assert (twin.model.norm.weight != model.model.norm.weight).any()


def test_subclasses_of_linear_keep_their_own_forward():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4))
    x = torch.randn(2, 4)
    before = model(x)
    before.sum().backward()
    expected = model[0].weight.grad.clone()
    convert_to_grass(model, GrassConfig(density=0.5, side="output"))
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    slice_ = model[0].weight_slice
    torch.testing.assert_close(slice_.active.grad, expected[slice_.index])  # what follows the product is in it
    assert type(restore_model(model)[0]) is Doubled


def test_subclasses_that_write_the_product_out_are_tapped_from_outside():
    class WrittenOut(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T + self.bias

    class Other(nn.Linear):
        def forward(self, input):
            return 3 * (input @ self.weight.T) + self.bias

    model = nn.Sequential(WrittenOut(4, 4), Other(4, 4))
    x = torch.randn(2, 4)
    model[0](x).sum().backward()
    expected = model[0].weight.grad.clone()
    convert_to_grass(model, GrassConfig(density=0.5, side="output"))
    model(x)
    model[0](x).sum().backward()
    slice_ = model[0].weight_slice
    torch.testing.assert_close(slice_.active.grad, expected[slice_.index])
    assert "something else than a plain linear product" in model.grass.left_out["1"]
    assert type(restore_model(model)[0]) is WrittenOut
