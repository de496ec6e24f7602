"""Muon over the slices and AdamW over the rest: what the two of PyTorch do, in one optimizer and in batches."""

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers import assert_same_weights, tiny_llama, trainer
from model_matrix import SHAPE, batch, build, needs_interface
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from grass_hf import GrassCallback, GrassConfig, MuonAdamW, convert_to_grass, estimate_memory, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim import muon
from grass_hf.optim.driving import plain_class

pytestmark = pytest.mark.oldest

needs_pytorchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@contextmanager
def float32_products():
    """PyTorch's Muon with the products that ours has on a CPU."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        yield


def gradients(model, step):
    tokens = torch.randint(48, (3, 10), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


@needs_pytorchs
def test_rank_m_is_muon_beside_adamw():
    ours, theirs = tiny_llama(), tiny_llama()
    convert_to_grass(ours, GrassConfig(density=1.0, update_interval=3))
    optimizer = grass_optimizer(ours, MuonAdamW, lr=0.01, weight_decay=0.1)
    hidden = [p for name, p in theirs.named_parameters() if "_proj" in name]
    rest = [p for name, p in theirs.named_parameters() if "_proj" not in name]
    assert len(hidden) == 14
    pytorchs = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    for step in range(8):
        for model in (ours, theirs):
            gradients(model, step)
        for each in (optimizer, pytorchs, adamw):
            with float32_products():
                each.step()
    assert_same_weights(ours, theirs, atol=1e-6)
    assert not torch.equal(theirs.model.layers[0].mlp.up_proj.weight, tiny_llama().model.layers[0].mlp.up_proj.weight)


@needs_pytorchs
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjustment", ["match_rms_adamw", "original", None])
def test_a_step_of_a_slice_is_muons_own(nesterov, adjustment):
    """At rank < m, after other rows were selected."""
    options = {"momentum": 0.9, "ns_steps": 4, "nesterov": nesterov, "adjust_lr_fn": adjustment}
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5, update_interval=3, stagger=1, selection="cycle"))
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01, **options)
    for step in range(5):
        gradients(model, step)
        optimizer.step()
    copies = {slice_.state.name: nn.Parameter(slice_.active.detach().clone()) for slice_ in grass_slices(model)}
    pytorchs = torch.optim.Muon(copies.values(), lr=0.01, weight_decay=0.01, **options)
    gradients(model, 5)
    for slice_ in grass_slices(model):
        state = optimizer.state[slice_.active]
        assert {key for key in state if not key.startswith("grass")} == {"momentum_buffer"}
        pytorchs.state[copies[slice_.state.name]] = {"momentum_buffer": state["momentum_buffer"].clone()}
        copies[slice_.state.name].grad = slice_.active.grad.clone()
    assert optimizer.grass.step % 3, "a step on which nothing is selected"
    with float32_products():
        pytorchs.step()
    optimizer.step()
    for slice_ in grass_slices(model):
        torch.testing.assert_close(slice_.active, copies[slice_.state.name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_slices_of_embedding_and_head_have_adamw(tied, resident):
    """As over the same slices by themselves, at the ordinary rate; all others have Muon."""
    model = tiny_llama(tie_word_embeddings=tied)
    config = GrassConfig(density=0.5, target_modules="all-matrices", resident=resident, scale=4.0, scale_warmup=3)
    convert_to_grass(model, config)
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.04, 0.01]
    tables = [slice_ for slice_ in grass_slices(model) if slice_.state.name in ("model.embed_tokens", "lm_head")]
    assert len(tables) == (1 if tied else 2)
    copies = [nn.Parameter(slice_.weight.index_select(1, slice_.index).clone()) for slice_ in tables]
    adamw = torch.optim.AdamW(copies, lr=0.01, weight_decay=0.1)
    gradients(model, 0)
    for copy, slice_ in zip(copies, tables, strict=True):
        copy.grad = slice_.active.grad.clone()
    indices = [slice_.index.clone() for slice_ in tables]
    adamw.step()
    optimizer.step()
    for copy, slice_, index in zip(copies, tables, indices, strict=True):
        torch.testing.assert_close(slice_.weight.index_select(1, index), copy, rtol=0, atol=1e-7)
    found = {
        slice_: {"momentum_buffer", "exp_avg"} & set(optimizer.state[slice_.active]) for slice_ in grass_slices(model)
    }
    assert len(found) == 14 + len(tables)
    assert found == {slice_: {"exp_avg"} if slice_ in tables else {"momentum_buffer"} for slice_ in found}


def test_the_hidden_matrices_of_a_classification_head_have_muon():
    """RoBERTa's head is a module of two linear layers, and no matrix itself."""
    config = RobertaConfig(**SHAPE, num_labels=3, max_position_embeddings=32)
    model = RobertaForSequenceClassification(config)
    convert_to_grass(model, GrassConfig(density=0.5, target_modules="all-matrices"))
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01)
    model(**batch(model)).loss.backward()
    optimizer.step()
    adamw = {slice_.state.name for slice_ in grass_slices(model) if "exp_avg" in optimizer.state[slice_.active]}
    assert adamw == {f"roberta.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")}
    head = next(slice_ for slice_ in grass_slices(model) if slice_.state.name == "classifier.dense")
    assert "momentum_buffer" in optimizer.state[head.active]


def test_momentum_goes_with_its_columns():
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5, update_interval=3, side="input"))
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01, momentum=0.9)
    stayed = came = 0
    for step in range(7):
        gradients(model, step)
        parts = [(slice_, slice_.index.clone()) for slice_ in grass_slices(model)]
        means = [optimizer.state[slice_.active].get("momentum_buffer", torch.zeros(())).clone() for slice_, _ in parts]
        means = [m.lerp(slice_.active.grad, 0.1) for m, (slice_, _) in zip(means, parts, strict=True)]
        optimizer.step()
        for (slice_, index), mean in zip(parts, means, strict=True):
            whole = torch.zeros_like(slice_.weight).index_copy_(1, index, mean)
            torch.testing.assert_close(optimizer.state[slice_.active]["momentum_buffer"], whole[:, slice_.index])
            kept = torch.isin(slice_.index, index)
            if not torch.equal(slice_.index, index):
                stayed, came = stayed + int(kept.sum()), came + int((~kept).sum())
    assert stayed and came


def test_a_slices_state_is_half_of_adamws():
    def state_bytes(cls):
        model = tiny_llama()
        convert_to_grass(model, GrassConfig(density=0.25))
        optimizer = grass_optimizer(model, cls, lr=0.01)
        gradients(model, 0)
        optimizer.step()
        return sum(
            value.nbytes
            for slice_ in grass_slices(model)
            for value in optimizer.state[slice_.active].values()
            if isinstance(value, torch.Tensor) and value.dim() == 2
        )

    assert 2 * state_bytes(MuonAdamW) == state_bytes(torch.optim.AdamW) > 0


@pytest.mark.parametrize("targets", ["all-linear", "all-matrices"])
def test_through_the_trainer_and_resumed_exactly(tmp_path, targets):
    arguments = f"density=0.5,update_interval=3,target_modules={targets},base=muon,base.momentum=0.9"
    options = {"optim_args": arguments, "max_steps": 7}
    options |= {"adam_beta2": 0.97, "lr_scheduler_type": "cosine"}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    optimizer = whole.optimizer.optimizer
    assert plain_class(optimizer) is MuonAdamW and optimizer.grass.step == 7
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.97)}
    cut = trainer(tmp_path / "cut", save_strategy="steps", save_steps=4, **options)
    cut.train()
    again = trainer(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert_same_weights(again.model, whole.model, atol=0)
    for mine, other in zip(grass_slices(again.model), grass_slices(whole.model), strict=True):
        assert torch.equal(mine.index, other.index)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_beside_the_callback(tmp_path):
    objects = {"callbacks": [GrassCallback(GrassConfig(density=0.5))]}
    objects["optimizer_cls_and_kwargs"] = (MuonAdamW, {"lr": 0.01, "momentum": 0.8})
    job = trainer(tmp_path, trainer_options=objects, optim="adamw_torch", optim_args=None, max_steps=3)
    job.train()
    optimizer = job.optimizer.optimizer
    assert plain_class(optimizer) is MuonAdamW and optimizer.grass.step == 3
    assert all("momentum_buffer" in optimizer.state[slice_.active] for slice_ in grass_slices(job.model))


def test_released_slices_take_the_same_steps():
    models = []
    for resident in (True, False):
        model = tiny_llama()
        convert_to_grass(model, GrassConfig(density=0.5, update_interval=3, resident=resident))
        optimizer = grass_optimizer(model, MuonAdamW, lr=0.01)
        for step in range(7):
            gradients(model, step)
            optimizer.step()
        models.append(model)
    assert_same_weights(*models, atol=0)


@pytest.mark.parametrize("targets", ["all-linear", "all-matrices"])
def test_the_estimate_counts_its_state(targets):
    config = GrassConfig(density=0.25, target_modules=targets)
    muon, adamw = (
        estimate_memory(tiny_llama, config, optimizer=cls, optimizer_args={"lr": 1e-3}, sequence=16).step
        for cls in (MuonAdamW, torch.optim.AdamW)
    )
    model = tiny_llama()
    convert_to_grass(model, config)
    assert adamw.optimizer_state - muon.optimizer_state == pytest.approx(
        sum(slice_.active.nbytes for slice_ in grass_slices(model) if "layers" in slice_.state.name), rel=0.02
    )


@needs_interface
@needs_pytorchs
def test_every_expert_is_a_matrix():
    model = build("mixtral")
    convert_to_grass(model, GrassConfig(density=0.5))
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01, weight_decay=0.01)
    experts = [slice_ for slice_ in grass_slices(model) if slice_.active.dim() == 3]
    assert experts
    gradients(model, 0)
    copies = [[nn.Parameter(each.clone()) for each in slice_.active.detach()] for slice_ in experts]
    for slice_, parameters in zip(experts, copies, strict=True):
        for parameter, grad in zip(parameters, slice_.active.grad, strict=True):
            parameter.grad = grad.clone()
    pytorchs = torch.optim.Muon(itertools.chain(*copies), lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    with float32_products():
        pytorchs.step()
    optimizer.step()
    for slice_, parameters in zip(experts, copies, strict=True):
        torch.testing.assert_close(slice_.active, torch.stack(list(parameters)), rtol=0, atol=1e-6)


def test_batches_are_of_one_shape_and_bounded_and_change_nothing(monkeypatch):
    models = []
    for limit in (muon.BATCH_BYTES, 1):
        monkeypatch.setattr(muon, "BATCH_BYTES", limit)
        model = tiny_llama()
        convert_to_grass(model, GrassConfig(density=0.5))
        optimizer, sizes = grass_optimizer(model, MuonAdamW, lr=0.01), []
        original = optimizer._step_batch

        def spy(members, group, original=original, sizes=sizes):
            assert len({param.shape for param in members}) == 1
            sizes.append(len(members))
            original(members, group)

        optimizer._step_batch = spy
        for step in range(3):
            gradients(model, step)
            optimizer.step()
        slices = sum(1 for _ in grass_slices(model))
        assert sum(sizes) == 3 * slices and (max(sizes) == 1 if limit == 1 else len(sizes) < slices)
        models.append(model)
    assert_same_weights(*models, atol=1e-6)


def test_updates_are_orthogonal_and_of_adamws_size():
    """Singular values are around one, and a root mean square of 0.2 is what the factor makes of them."""
    values = torch.randn(3, 32, 96, generator=torch.Generator().manual_seed(0))
    for matrices in (values, values.mT):
        singular = torch.linalg.svdvals(muon.orthogonalised(matrices, 5))
        assert singular.min() > 0.3 and singular.max() < 1.3
        factor = muon._size_factor(*matrices.shape[-2:], "match_rms_adamw")
        size = (factor * muon.orthogonalised(matrices, 5)).square().mean().sqrt()
        assert size == pytest.approx(0.2, rel=0.2)


def test_products_are_in_what_the_device_multiplies_well(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = {dtype: muon.product_dtype(dtype, cpu) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    assert found == {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert muon.product_dtype(torch.float32, gpu) == expected


@pytest.mark.parametrize(
    "options",
    [{"momentum": -1.0}, {"momentum": 1.0}, {"ns_steps": 0}, {"ns_steps": 2.5}, {"adjust_lr_fn": "rms"}],
    ids=str,
)
def test_what_it_cannot_do_is_said(options):
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5))
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is "):
        grass_optimizer(model, MuonAdamW, lr=0.01, **options)


def test_without_slices_of_hidden_matrices_it_takes_no_step():
    with pytest.raises(ValueError, match="no slices of hidden matrices to orthogonalise"):
        MuonAdamW(tiny_llama().parameters(), lr=0.01).step()
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5, target_modules=["embed_tokens"]))
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01)
    gradients(model, 0)
    with pytest.raises(ValueError, match="among the targets"):
        optimizer.step()


def test_zero_is_refused():
    from grass_hf.integrations.deepspeed import take_over

    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.5))
    optimizer = grass_optimizer(model, MuonAdamW, lr=0.01)
    config = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="MuonAdamW orthogonalises matrices, and ZeRO"):
        take_over({"model": model, "optimizer": optimizer, "config": config}, None)
