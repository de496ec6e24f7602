"""The support matrix: a sample of it here, all of it when slow; see matrix_cases.py and matrix_checks.py."""

import subprocess
import sys
from pathlib import Path

import matrix_cases
import matrix_checks
import matrix_tools
import pytest
import torch
import transformers
from model_matrix import OTHERS, TRAINED, build, distance_at_full_rank, reload, save, train
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

pytestmark = pytest.mark.oldest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "support.md"
sys.path.insert(0, str(ROOT / "scripts"))
import support_page  # noqa: E402

# transformers 4.57 has no experts interface, and these models of its know no float64.
OLD = transformers.__version__.startswith("4.")
NOT_IN_OLD = {"gpt_oss", "granitemoe", "mpt", "deepseek_v3"} if OLD else set()
TYPES = [name for name in [*TRAINED, *OTHERS] if name not in NOT_IN_OLD]
# One of every kind of layer, of experts, of input.
SAMPLE = [
    "llama:LlamaForCausalLM",
    "gpt2:GPT2LMHeadModel",
    "gemma2:Gemma2ForCausalLM",
    "bloom:BloomForCausalLM",
    "falcon:FalconForCausalLM",
    "opt:OPTForCausalLM",
    "gpt_neox:GPTNeoXForCausalLM",
    "phi3:Phi3ForCausalLM",
    "mixtral:MixtralForCausalLM",
    "gpt_oss:GptOssForCausalLM",
    "deepseek_v3:DeepseekV3ForCausalLM",
    "llama4_text:Llama4ForCausalLM",
    "dbrx:DbrxForCausalLM",
    "jetmoe:JetMoeForCausalLM",
    "deepseek_v4:DeepseekV4ForCausalLM",
    "gemma4_text:Gemma4ForCausalLM",
    "inkling_text:InklingForCausalLM",
    "recurrent_gemma:RecurrentGemmaForCausalLM",
    "qwen3_next:Qwen3NextForCausalLM",
    "bart:BartForConditionalGeneration",
    "t5:T5ForConditionalGeneration",
    "switch_transformers:SwitchTransformersForConditionalGeneration",
    "bert:BertForMaskedLM",
    "roberta:RobertaForSequenceClassification",
    "vit:ViTForImageClassification",
    "clip:CLIPModel",
    "llava:LlavaForConditionalGeneration",
    "wav2vec2-bert:Wav2Vec2BertForCTC",
    "whisper:WhisperForConditionalGeneration",
    "yolos:YolosForObjectDetection",
]


def constrained(package):
    """The version of a package that the tests are meant to run on."""
    pins = (ROOT / "constraints" / "dev.txt").read_text().splitlines()
    return dict(pin.split("==") for pin in pins if "==" in pin)[package]


@pytest.mark.parametrize("name", SAMPLE)
def test_equals_the_plain_model(name):
    if OLD and name not in {case.name for case in matrix_cases.cases()}:
        pytest.skip("transformers 4.57 has no such class")
    found = matrix_checks.check(matrix_cases.case(name))
    if OLD and found.status == "not built":
        pytest.skip(found.why)
    assert found.status == "ok", found.wrong or found.why
    # hyper-connections, positions and convolutions stay in full, and are small in a model that is not tiny
    assert max(found.coverage, found.full_size or 0) > 0.95 or OLD or name.split(":")[0] in ("wav2vec2-bert", "yolos")
    if transformers.__version__ == constrained("transformers"):
        assert support_page.row_text(matrix_tools.as_json(found)) in DOCS.read_text(), "run make support-table"


@pytest.mark.slow
def test_the_whole_matrix_is_as_the_page_says(tmp_path):
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "scripts" / "support_table.py"), "--json", str(rows), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of some trained models, and their types."""
    folder, names = (
        tmp_path_factory.mktemp("models"),
        [name for name in TYPES if name in ("gpt2", "llama", "mixtral", "t5")],
    )
    for name in names:
        model = build(name)
        train(model)
        save(model, folder / name)
    return folder, names


def test_reloads_without_grass_hf_with_the_same_logits(saved):
    folder, names = saved
    done = reload(folder, names)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == names


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
    assert all("vision" not in slice_.state.name for slice_ in grass_slices(model))
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
    cases = matrix_cases.cases()
    assert len({case.model_type for case in cases if case.kind == "causal LM"}) > (100 if OLD else 180)
    assert len(cases) > (250 if OLD else 500) and len({case.name for case in cases}) == len(cases)
