"""Whole runs of models that read weights without calling their modules: the Trainer, resuming, remedies by layers."""

import copy

import pytest
import torch
import transformers
from helpers import assert_same_weights, trainer
from model_matrix import CAUSAL, build
from torch import nn
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM, WavLMConfig, WavLMForSequenceClassification

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.convert.audit.exclusion import patterns, summary
from grass_hf.convert.audit.freeing import freed
from grass_hf.convert.conversion import grass_slices


def longcat(layers: int = 2) -> LongcatFlashForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "num_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "use_cache": False,
    }
    return LongcatFlashForCausalLM(LongcatFlashConfig(**shape))


def wavlm() -> WavLMForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return WavLMForSequenceClassification(WavLMConfig(**shape, **convolutions, **positions))


SETTINGS = "density=0.25,update_interval=2,stagger=2,target_modules=all-matrices"


def assert_all_moved(model, before):
    for name, weight in model.named_parameters():
        assert name.endswith(".active") or not torch.equal(weight, before[name]), name


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith(".active")}


def test_a_trainer_run_trains_the_routers(tmp_path):
    run = trainer(tmp_path, longcat(), optim_args=SETTINGS)
    before = weights_of(run.model)
    run.train()
    assert len(freed(run.model)) == 2
    assert_all_moved(run.model, before)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="its Mamba calls its modules")
def test_a_trainer_run_resumes_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "optim_args": SETTINGS}
    whole = trainer(tmp_path / "whole", build("mamba"), **options)
    before = weights_of(whole.model)
    whole.train()
    assert len(freed(whole.model)) == 2
    assert_all_moved(whole.model, before)
    again = trainer(tmp_path / "again", build("mamba"), **options)
    assert not freed(again.model)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert freed(again.model).keys() == freed(whole.model).keys()
    assert_same_weights(again.model, whole.model)
    assert_same_state(again.optimizer, whole.optimizer)


def assert_same_state(ours, theirs):
    ours, theirs = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key, entry in ours.items():
        for field, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key][field])), (key, field)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("exclude", [None, ["lm_head"]], ids=str)
def test_a_loop_resumes_bit_for_bit_before_its_first_forward(scale, exclude):
    """Without lm_head among the targets there is an ordinary group to go to, else the weight stays among slices."""
    ids = torch.randint(3, 60, (8, 2, 8), generator=torch.Generator().manual_seed(0))

    def start():
        settings = {"density": 0.25, "update_interval": 2, "stagger": 2, "scale": scale}
        model = convert_to_grass(
            longcat(), GrassConfig(target_modules="all-matrices", exclude_modules=exclude, **settings)
        )
        return model, grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

    def steps(model, optimizer, batches):
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, whole_optimizer = start()
    steps(whole, whole_optimizer, ids[:4])
    saved = copy.deepcopy((whole.state_dict(), whole_optimizer.state_dict()))
    steps(whole, whole_optimizer, ids[4:])
    again, optimizer = start()
    again.load_state_dict({key: value for key, value in saved[0].items() if not key.endswith(".active")}, strict=False)
    optimizer.load_state_dict(saved[1])
    assert len(freed(again)) == 2
    steps(again, optimizer, ids[4:])
    assert_same_weights(again, whole)
    assert_same_state(optimizer, whole_optimizer)


def test_resuming_where_the_weight_is_excluded_is_a_sentence():
    model, ids = convert_to_grass(longcat(), GrassConfig(density=0.25)), torch.arange(3, 9)[None]
    optimizer = grass_optimizer(model, torch.optim.AdamW)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    config = GrassConfig(density=0.25, exclude_modules=["classifier"])
    other = grass_optimizer(convert_to_grass(longcat(), config), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"router.classifier was a Grass layer .* exclude_modules of that run"):
        other.load_state_dict(optimizer.state_dict())


def test_wavlm_trains_at_the_first_try_with_the_gradients_of_the_plain_model():
    plain, ours = wavlm().eval(), convert_to_grass(wavlm().eval(), GrassConfig(density=1.0))
    optimizer = grass_optimizer(ours, torch.optim.AdamW, lr=1e-2)
    sound = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    for model in (plain, ours):
        model(sound, labels=torch.tensor([0, 1])).loss.backward()
    weights = dict(plain.named_parameters())
    assert len(freed(ours)) == 8
    for name, weight in freed(ours).items():
        assert torch.equal(weight.grad, weights[f"{name}.weight"].grad)
    for slice_ in grass_slices(ours):
        grad = weights[f"{slice_.state.name}.weight"].grad.index_select(slice_.dim, slice_.index)
        torch.testing.assert_close(slice_.active.grad, grad)
    optimizer.step()


class Object:
    pass


def test_many_layers_are_one_expression_that_frees_just_them():
    class TakesAnObject(LongcatFlashForCausalLM):
        def forward(self, *args, cache=None, **kwargs):
            return super().forward(*args, **kwargs)

    def make():
        model = longcat(layers=9)
        model.__class__ = TakesAnObject
        return model

    ids = torch.arange(3, 9)[None]
    model = convert_to_grass(make(), GrassConfig(density=0.25))
    compressed = {slice_.state.name for slice_ in grass_slices(model)}
    with pytest.raises(RuntimeError, match=r"model.layers.\*.mlp.router.classifier \(9\)") as error:
        model(input_ids=ids, labels=ids, cache=Object())
    text = str(error.value).partition("in optim_args: ")[2].removesuffix(").")
    assert text == r"exclude_modules=model\.layers\.\d+\.mlp\.router\.classifier"
    config = parse_optim_args(f"density=0.25,{text}").config
    assert f"exclude_modules=r'{config.exclude_modules}'" in str(error.value)
    again = convert_to_grass(make(), config)
    again(input_ids=ids, labels=ids, cache=Object()).loss.backward()
    left = compressed - {slice_.state.name for slice_ in grass_slices(again)}
    assert left == {f"model.layers.{layer}.mlp.router.classifier" for layer in range(9)}


@pytest.mark.parametrize(
    ("names", "others", "already", "expected"),
    [
        (["a.b"], {"a.c"}, None, ["a.b"]),
        (["a.b"], {"a.c"}, ("head",), ["head", "a.b"]),
        (["a.b"], {"x.a.b"}, None, r"a\.b"),
        (["a.b"], {"x.a.b"}, ("head",), r"((.*\.)?(head))|(a\.b)"),
        (["a.b"], {"a.c"}, r".*head", r"(.*head)|(a\.b)"),
        ([f"l.{i}.q" for i in range(9)], {"l.0.k"}, None, r"l\.\d+\.q"),
        ([f"l.{i}.q" for i in range(9)], {"l.9.q"}, None, r"l\.(0|1|2|3|4|5|6|7|8)\.q"),
        ([f"l.{i}.{i}.q" for i in range(9)], {"l.0.1.q"}, None, "|".join(rf"l\.{i}\.{i}\.q" for i in range(9))),
    ],
)
def test_what_is_written_frees_just_these(names, others, already, expected):
    assert patterns(names, others, already) == expected
    shape = {name: nn.Linear(4, 4) for name in [*names, *others, "head"]}

    model = nn.Module()
    for name, layer in shape.items():
        *path, leaf = name.split(".")
        at = model
        for piece in path:
            if not hasattr(at, piece):
                at.add_module(piece, nn.Module())
            at = getattr(at, piece)
        at.add_module(leaf, layer)
    convert_to_grass(model, GrassConfig(density=0.5, exclude_modules=expected))
    kept = {slice_.state.name for slice_ in grass_slices(model)}
    assert kept == others | (set() if already else {"head"})


def test_names_for_people():
    assert summary(["l.0.q", "l.1.q", "head"]) == "l.*.q (2), head"


@pytest.mark.parametrize("kind", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "opt", "bloom", "falcon"])
def test_nothing_is_found_in_models_that_call_their_modules(name, kind):
    assert name in CAUSAL
    model, ids = build(name).train(), torch.arange(3, 15).view(2, 6)
    if kind is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        model.enable_input_require_grads()
    convert_to_grass(model, GrassConfig(target_modules="all-matrices"))
    compressed = len(list(grass_slices(model)))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is None):
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(list(grass_slices(model))) == compressed and not freed(model)
