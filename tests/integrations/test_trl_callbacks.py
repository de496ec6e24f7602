"""What walks over a model's parameters in TRL sees the plain ones: reference models, averages, vLLM."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from helpers import tiny_llama
from transformers import AutoModelForCausalLM
from trl import BEMACallback
from trl.trainer.callbacks import SyncRefModelCallback
from trl_runs import model_for, trainer_of

from grass_hf import GrassConfig, convert_to_grass, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations.trl_callbacks import plain_parameters

ADAMW = {"optim": "adamw_torch", "optim_args": None}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 3}


def assert_equal(mine, other) -> None:
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(mine[name], value), name


@pytest.fixture
def folder(tmp_path):
    """A model on the disk: GRPO and RLOO make their reference models from where the policy came from."""
    model_for("grpo", tied=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_a_reference_follows_the_trained_weights(tmp_path, folder, kind):
    """At rank m it ends as that of an AdamW run."""
    references = []
    for optimizer in ({}, ADAMW):
        given = {**SYNC, **({"beta": 0.1} if kind in ("grpo", "rloo") else {}), **optimizer}
        run = trainer_of(kind, tmp_path, AutoModelForCausalLM.from_pretrained(folder), **given)
        begun = copy.deepcopy(run.ref_model.state_dict())
        run.train()
        references.append(run.ref_model.state_dict())
        assert all(not torch.equal(begun[name], value) for name, value in references[-1].items())
    assert_equal(*references)


def test_a_reference_is_mixed_from_the_whole_weights(tmp_path):
    """At a quarter of the rows: of slices and weights only weights count."""
    run = trainer_of("dpo", tmp_path, optim_args="density=0.25,update_interval=1,base=adamw_torch", **SYNC)
    run.args.max_steps = run.args.ref_model_sync_steps = 2
    run.args.ref_model_mixup_alpha = 0.25
    before = copy.deepcopy(run.ref_model.state_dict())
    run.train()
    trained = run.model.state_dict()
    for name, value in run.ref_model.state_dict().items():
        assert torch.equal(value, before[name].mul(0.75).add(trained[name], alpha=0.25)), name


def test_a_converted_reference_stays_whole():
    """Its slices follow its weights, so that `restore_model` puts nothing old back."""
    model, reference = tiny_llama(), tiny_llama()
    for weight in reference.parameters():
        weight.data.zero_()
    wanted = {name: value / 2 for name, value in model.state_dict().items()}
    for each in (model, reference):
        convert_to_grass(each, GrassConfig(density=0.25))
    SyncRefModelCallback._sync_target_model(model, reference, 0.5)
    assert_equal(restore_model(reference).state_dict(), wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_bema_averages_the_trained_weights(tmp_path, tied):
    """At rank m it ends as that of an AdamW run; the model that it saves is a plain one."""
    averages = []
    for optimizer in ({}, ADAMW):
        callback = BEMACallback(update_freq=1)
        run = trainer_of("sft", tmp_path, tied=tied, max_steps=3, extra={"callbacks": [callback]}, **optimizer)
        cls = type(run.model)
        run.train()
        assert type(run.model) is cls is type(callback.running_model)
        averages.append(AutoModelForCausalLM.from_pretrained(tmp_path / "bema").state_dict())
        assert not torch.equal(averages[-1]["lm_head.weight"], run.model.lm_head.weight)
    assert_equal(*averages)


def test_bema_over_int8_weights_is_refused(tmp_path):
    options = "density=0.25,weight_dtype=int8,side=output,base=adamw_torch"
    run = trainer_of("sft", tmp_path, optim_args=options, extra={"callbacks": [BEMACallback()]})
    with pytest.raises(ValueError, match="q_proj is stored as int8: leave weight_dtype='int8' out"):
        run.train()


def test_a_reference_follows_int8_weights():
    model, reference = tiny_llama(), tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.25, weight_dtype="int8", side="output"))
    SyncRefModelCallback._sync_target_model(model, reference, 1.0)
    assert_equal(reference.state_dict(), restore_model(model).state_dict())


def test_vllm_is_sent_the_weights(tmp_path):
    generation = pytest.importorskip("trl.generation.vllm_generation")
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    convert_to_grass(model, GrassConfig(density=0.25, target_modules="all-matrices"))
    sender = object.__new__(generation.VLLMGeneration)
    sender.model = model
    sender._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda params: torch.no_grad())
    sender._fix_param_name_to_vllm = lambda name, **_: name
    assert [name for name, _ in sender._iter_named_params()] == names


def test_plain_parameters_are_those_of_the_plain_model():
    plain, model = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    convert_to_grass(model, GrassConfig(density=0.25, target_modules="all-matrices"))
    cls = type(model)
    with plain_parameters(model):
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert all(param.requires_grad for param in model.parameters())
        assert_equal(model.state_dict(), plain.state_dict())
        assert type(type(model)(model.config)) is cls and isinstance(model, cls)
    assert type(model) is cls
    slices = list(grass_slices(model))
    assert len(slices) == 15 and not any(slice_.weight.requires_grad for slice_ in slices)
    with plain_parameters(plain):  # one that is not converted stays as it is
        assert type(plain) is cls
