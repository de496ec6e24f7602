"""Every model type of the matrix: it trains, rank = m is AdamW, its checkpoint is plain; see model_matrix.py."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from model_matrix import CAUSAL, MORE, OTHERS, PARTLY, build, check, distance_at_full_rank, reload, save, train
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert import grass_slices

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "support.md"
sys.path.insert(0, str(ROOT / "scripts"))
import support_table  # noqa: E402

# transformers 4.57 has no experts interface, and these models of its know no float64.
OLD = transformers.__version__.startswith("4.")
NOT_IN_OLD = {"gpt_oss", "granitemoe", "mpt", "deepseek_v3"} if OLD else set()
TYPES = [name for name in [*CAUSAL, *OTHERS] if name not in NOT_IN_OLD]
WHOLE = [*TYPES, *(pytest.param(name, marks=pytest.mark.slow) for name in [*MORE, *PARTLY])]


def constrained(package):
    """The version of a package that the tests are meant to run on."""
    pins = (ROOT / "constraints" / "dev.txt").read_text().splitlines()
    return dict(pin.split("==") for pin in pins if "==" in pin)[package]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the trained models, and the types that were saved."""
    return tmp_path_factory.mktemp("models"), []


@pytest.mark.parametrize("model_type", WHOLE)
def test_trains_equals_adamw_at_full_rank_and_saves(model_type, saved):
    result, model = check(model_type)
    assert result.losses[2] < result.losses[1] < result.losses[0]
    assert result.moved > 1e-2 and result.apart < 1e-10
    assert "embedding" in result.kinds and len(result.kinds) > 1
    if model_type not in PARTLY:
        # nothing that costs memory is left out: routers' scores and experts' biases are all there may be
        assert all("rout" in name or "gate" in name or "bias" in name for name in result.in_full), result.in_full
    assert result.tied == (model.config.tie_word_embeddings and model.get_output_embeddings() is not None)
    if transformers.__version__ == constrained("transformers"):
        assert support_table.row(result, plain=True) in DOCS.read_text(), "run make support-table"
    folder, names = saved
    save(model, folder / model_type)
    names.append(model_type)


def test_reloads_without_grass_hf_with_the_same_logits(saved):
    folder, names = saved
    if not names:
        pytest.skip("no model was saved: run the whole file")
    done = reload(folder, names)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == names


@pytest.mark.slow
def test_reloads_without_grass_hf_the_whole_matrix(saved):
    test_reloads_without_grass_hf_with_the_same_logits(saved)


@pytest.mark.skipif(OLD, reason="Mamba of transformers 4.57 calls the module")
def test_a_weight_that_is_read_without_a_call_is_trained_in_full():
    model = build("mamba")
    convert_to_grass(model, GrassConfig(target_modules="all-matrices"))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    mixer = model.backbone.layers[0].mixer
    before = mixer.dt_proj.weight.clone()
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(mixer.dt_proj.weight, before)
    assert "without calling" in model.grass.left_out["backbone.layers.0.mixer.dt_proj"]


@pytest.mark.parametrize("settings", [{"side": "input"}, {"side": "auto"}, {"selection": "multinomial_norm"}], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_other_sides_and_rules(model_type, settings):
    losses = train(build(model_type), **settings)
    assert losses[2] < losses[0]
    if "side" in settings:
        apart, moved = distance_at_full_rank(build(model_type), **settings)
        assert moved > 1e-2 and apart < 1e-10


def test_the_language_tower_of_a_vision_language_model():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=63, vision_feature_layer=-1)
    )
    tower = r".*language_model\..*(_proj|embed_tokens)|lm_head"
    convert_to_grass(model, GrassConfig(density=0.25, target_modules=tower, update_interval=2))
    assert len(list(grass_slices(model))) == 16
    assert all("vision" not in part.state.name for part in grass_slices(model))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    ids[:, 1:5], labels[:, 1:5] = 63, -100
    losses = []
    for _ in range(3):
        pixels = torch.ones(2, 3, 8, 8)
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_the_matrix_is_as_large_as_promised():
    assert len(CAUSAL) >= 24
    assert all(AutoConfig.for_model(name).model_type == name for name in TYPES)
