"""TRL's trainers: at rank m each is AdamW to the bit, and a loss that reads a compressed weight without its module is
refused before a weight has changed."""

import copy

import pytest
import torch

pytest.importorskip("trl")

import datasets
from helpers import arguments, tiny_llama, trainer
from peft import LoraConfig
from readers import Kernel, Product
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from trl_runs import KINDS, model_for, tokenizer, trained, trainer_of

from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations.trl import plain_head_trainer

ADAMW = {"optim": "adamw_torch", "optim_args": None}
MATRICES = "density=1.0,target_modules=all-matrices,base=adamw_torch"
# they compute log-probabilities or divergences from the head's weight, without calling the head
FUSED = [kind for kind in KINDS if kind != "reward"]


def weights(model) -> dict[str, torch.Tensor]:
    """A model's, by plain names, copied."""
    return {name: value.clone() for name, value in model.state_dict().items() if "_slice." not in name}


def assert_equal(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor], within: float = 0.0) -> None:
    assert mine.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(
            mine[name], value, rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied, bf16", [(True, True), (False, False)])
def test_every_trainer_at_rank_m_is_adamw(tmp_path, kind, tied, bf16):
    run = trainer_of(kind, tmp_path, tied=tied, bf16=bf16)
    before = weights(run.model)
    run.train()
    assert len(list(grass_slices(run.model))) == 14 and "training_step" not in vars(run)
    mine = weights(run.model)
    assert all(not torch.equal(before[name], value) for name, value in mine.items())
    assert_equal(mine, trained(trainer_of, kind, tmp_path, tied=tied, bf16=bf16, **ADAMW))


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("tied, bf16", [(True, None), (False, False)])  # None: TRL's default, which is bf16
def test_a_fused_loss_over_a_compressed_head(tmp_path, kind, tied, bf16):
    """Either the head is trained in full from the first step on, or a sentence says what to exclude, before it."""
    options = {"tied": tied, "bf16": bf16}
    run = trainer_of(kind, tmp_path, optim_args=MATRICES, **options)
    assert run.args.bf16 is (bf16 is None)
    before = weights(run.model)
    name = "model.embed_tokens" if tied else "lm_head"
    try:
        run.train()
    except (ValueError, RuntimeError) as error:
        assert name in str(error) and f"exclude_modules=['{name}']" in str(error)
        assert_equal(weights(run.model), before)
        run = trainer_of(kind, tmp_path, optim_args=f"{MATRICES},exclude_modules={name}", **options)
        run.train()
    assert name not in [slice_.state.name for slice_ in grass_slices(run.model)]
    assert "training_step" not in vars(run)
    assert_equal(weights(run.model), trained(trainer_of, kind, tmp_path, **options, **ADAMW))


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_with_all_matrices_is_adamw(tmp_path, tied):
    """Its backbone has an embedding and no output head."""
    run = trainer_of("reward", tmp_path, tied=tied, bf16=None, optim_args=MATRICES)
    run.train()
    assert any(slice_.vocabulary for slice_ in grass_slices(run.model))
    assert_equal(weights(run.model), trained(trainer_of, "reward", tmp_path, tied=tied, bf16=None, **ADAMW))


def test_metrics_may_read_the_head(tmp_path):
    """With label smoothing TRL takes the model's own logits, and the fused head for its metrics only."""
    options = {"tied": True, "label_smoothing_factor": 0.1}
    mine = trained(trainer_of, "sft", tmp_path, optim_args=MATRICES, **options)
    assert_equal(mine, trained(trainer_of, "sft", tmp_path, **options, **ADAMW))


OPTIONS = {
    "packing": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "neftune": {"neftune_noise_alpha": 5.0},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "selective": {"gradient_checkpointing_kwargs": {"selective": True}},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "dft": {"loss_type": "dft"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_of_finetuning_at_rank_m_are_adamw(tmp_path, options):
    given = {"tied": True, "bf16": None, **options}
    mine = trained(trainer_of, "sft", tmp_path, **copy.deepcopy(given))
    assert_equal(mine, trained(trainer_of, "sft", tmp_path, **copy.deepcopy(given), **ADAMW))


def test_a_cloned_chat_template_resizes_before_the_conversion(tmp_path):
    other = tokenizer()
    other.add_tokens(["<x>", "<y>"])
    other.save_pretrained(tmp_path / "other")
    given = {"chat_template_path": str(tmp_path / "other")}
    head = f"{MATRICES},exclude_modules=lm_head"
    mine = trained(trainer_of, "sft", tmp_path, optim_args=head, **given)
    assert len(mine["model.embed_tokens.weight"]) == 64
    assert_equal(mine, trained(trainer_of, "sft", tmp_path, **given, **ADAMW))


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_adapters_are_adamw(tmp_path, kind):
    """DPO's reference is the model without its adapters: PEFT turns them off and on, every parameter of them."""
    given = {"extra": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])}}
    if kind == "dpo":
        given["extra"]["ref_model"] = None
    if kind == "grpo":
        given["beta"] = 0.1  # its reference is asked before the first training forward
    run = trainer_of(kind, tmp_path, **copy.deepcopy(given))
    run.train()
    assert all("lora_" in slice_.state.name for slice_ in grass_slices(run.model))
    assert_equal(weights(run.model), trained(trainer_of, kind, tmp_path, **copy.deepcopy(given), **ADAMW))


def mixture():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **{**model_for("sft").config.to_dict(), "architectures": None, "model_type": "mixtral"},
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
        )
    )


@pytest.mark.parametrize("loss", ["nll", "dft"])
@pytest.mark.parametrize("make", [lambda: model_for("sft", True), mixture], ids=["tied", "mixture"])
def test_a_recipes_trainer_calls_the_head(tmp_path, monkeypatch, make, loss):
    """Loss, metrics and weights are those of TRL's own trainer, to rounding, with steps of two micro-batches."""
    monkeypatch.setitem(KINDS, "plain", (plain_head_trainer(), *KINDS["sft"][1:]))
    options = {"loss_type": loss, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    mine = trainer_of("plain", tmp_path, make(), optim_args=MATRICES, **options)
    usual = trainer_of("sft", tmp_path, make(), **options, **ADAMW)
    for run in (mine, usual):
        run.train()
    assert any(slice_.vocabulary for slice_ in grass_slices(mine.model))
    assert_equal(weights(mine.model), weights(usual.model), within=2e-5)
    for own, other in zip(mine.state.log_history[:2], usual.state.log_history[:2], strict=True):
        for key in ("loss", "entropy", "mean_token_accuracy", "aux_loss"):
            assert own.get(key) == pytest.approx(other.get(key), abs=1e-5)


# -- losses of other libraries, and of users: their reads stand outside of the model's own forward


def hidden_of(model, inputs):
    return model.model(inputs["input_ids"]).last_hidden_state


LOSSES = {
    "product": lambda model, inputs: (hidden_of(model, inputs) @ model.lm_head.weight.T).logsumexp(-1).mean(),
    "function": lambda model, inputs: (
        Product.apply(hidden_of(model, inputs), model.lm_head.weight).logsumexp(-1).mean()
    ),
    "kernel": lambda model, inputs: Kernel.apply(hidden_of(model, inputs), model.lm_head.weight).mean(),
    "penalty": lambda model, inputs: model(**inputs).loss + model.lm_head.weight.square().sum(),
}


def with_loss(folder, loss, **options) -> Trainer:
    run = trainer(folder, tiny_llama(tie_word_embeddings=True), **options)
    run.compute_loss = lambda model, inputs, return_outputs=False, num_items_in_batch=None: loss(model, inputs)
    return run


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_ones_own_that_reads_the_head_is_refused(tmp_path, name):
    run = with_loss(tmp_path, LOSSES[name], optim_args="density=0.25,target_modules=all-matrices")
    before = weights(run.model)
    with pytest.raises(ValueError, match=r"reads the weights of model\.embed_tokens \(the output head's\)"):
        run.train()
    assert_equal(weights(run.model), before)


def test_the_remedy_it_names_works(tmp_path):
    """In `optim_args`, and beside what was excluded before."""
    matrices = "density=1.0,target_modules=all-matrices,base=adamw_torch"
    plain = with_loss(tmp_path, LOSSES["product"], **ADAMW)
    plain.train()
    for setting in (matrices, f"{matrices},exclude_modules=q_proj;k_proj"):
        with pytest.raises(ValueError) as error:
            with_loss(tmp_path, LOSSES["product"], optim_args=setting).train()
        remedy = str(error.value).rpartition("in optim_args: ")[2].rstrip(").")
        assert remedy.startswith("exclude_modules=") and remedy.endswith("model.embed_tokens")
        run = with_loss(tmp_path, LOSSES["product"], optim_args=f"{matrices},{remedy}")
        run.train()
        assert len(list(grass_slices(run.model))) == (10 if "q_proj" in setting else 14)
        assert_equal(weights(run.model), weights(plain.model))
    pattern = r"exclude_modules=r'\(\.\*q_proj\)\|\(model\\\.embed_tokens\)'"
    with pytest.raises(ValueError, match=pattern):
        with_loss(tmp_path, LOSSES["product"], optim_args=f"{matrices},exclude_modules=.*q_proj").train()


def test_all_weights_that_are_read_are_named_once(tmp_path):
    def penalty(model, inputs):
        return model(**inputs).loss + sum(layer.mlp.up_proj.weight.abs().sum() for layer in model.model.layers)

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj, model\.layers\.1\.mlp\.up_proj without calling"):
        with_loss(tmp_path, penalty).train()


def unused_head(model, inputs):
    return hidden_of(model, inputs).square().mean()


def looks_at_shapes(model, inputs):
    with torch.no_grad():
        metric = (hidden_of(model, inputs) @ model.lm_head.weight.T).argmax(-1).float().mean()
    like = torch.zeros_like(model.lm_head.weight, dtype=model.lm_head.weight.dtype).sum()
    return model(**inputs).loss + 0 * (metric + like)


@pytest.mark.parametrize("loss", [unused_head, looks_at_shapes])
def test_no_false_alarm(tmp_path, loss):
    """A head that is not used at all, and reads of which no gradient is wanted."""
    run = with_loss(tmp_path, loss, optim_args="density=1.0,target_modules=all-matrices,base=adamw_torch")
    run.train()
    plain = with_loss(tmp_path, loss, **ADAMW)
    plain.train()
    assert_equal(weights(run.model), weights(plain.model))


def test_a_trainer_whose_step_is_its_own_is_looked_at(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = LOSSES["product"](model, inputs)
            loss.backward()
            return loss.detach()

    model = tiny_llama(tie_word_embeddings=True)
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8)
    args = arguments(tmp_path, optim_args="density=0.25,target_modules=all-matrices")
    with pytest.raises(ValueError, match=r"reads the weights of model\.embed_tokens"):
        Own(model, args, train_dataset=rows).train()
