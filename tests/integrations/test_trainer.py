"""The ways into the Trainer and into plain loops, what the user sees, and what stops a run."""

import pytest
import torch
import torch.utils.checkpoint
from helpers import Sequences, assert_same_weights, plain_state, tiny_llama, trainer
from torch import nn

from grass_hf import (
    GrassCallback,
    GrassConfig,
    GrassOptimizerFactory,
    convert_to_grass,
    grass_optimizer,
    restore_model,
)
from grass_hf.convert.conversion import is_converted

CONFIG = GrassConfig(density=0.25, update_interval=3)
SETTINGS = {"weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
ADAMW = {"lr": 1e-2, "weight_decay": 0.0}


def by_name(folder):
    return trainer(folder, **SETTINGS)


def by_callback(folder):
    options = {"optim": "adamw_torch", "optim_args": None}
    return trainer(folder, trainer_options={"callbacks": [GrassCallback(CONFIG)]}, **options, **SETTINGS)


def by_factory(folder):
    model = tiny_llama()
    kwargs = {"model": model, "config": CONFIG, "base": torch.optim.AdamW, **ADAMW}
    options = {"optimizer_cls_and_kwargs": (GrassOptimizerFactory, kwargs)}
    return trainer(folder, model, options, optim="adamw_torch", optim_args=None, **SETTINGS)


def by_optimizer(folder):
    model = convert_to_grass(tiny_llama(), CONFIG)
    options = {"optimizers": (grass_optimizer(model, torch.optim.AdamW, **ADAMW), None)}
    return trainer(folder, model, options, optim="adamw_torch", optim_args=None, **SETTINGS)


def by_class(folder):
    """A plain optimizer class over a model that a callback converted."""
    options = {
        "callbacks": [GrassCallback(CONFIG)],
        "optimizer_cls_and_kwargs": (torch.optim.AdamW, dict(ADAMW)),
    }
    return trainer(folder, None, options, optim="adamw_torch", optim_args=None, **SETTINGS)


def by_model_init(folder):
    return trainer(folder, trainer_options={"model_init": lambda: tiny_llama()}, **SETTINGS)


def by_model_init_and_callback(folder):
    options = {"model_init": lambda: tiny_llama(), "callbacks": [GrassCallback(CONFIG)]}
    return trainer(folder, trainer_options=options, optim="adamw_torch", optim_args=None, **SETTINGS)


@pytest.mark.parametrize(
    "way", [by_model_init_and_callback, by_callback, by_factory, by_optimizer, by_class, by_model_init]
)
def test_every_way_into_the_trainer_trains_the_same(tmp_path, way):
    first, other = by_name(tmp_path), way(tmp_path)
    for job in (first, other):
        job.train()
        assert is_converted(job.model)
        assert job.optimizer.optimizer.grass.step == 6
    assert_same_weights(other.model, first.model)
    assert (plain_state(first.model)["lm_head.weight"] != tiny_llama().lm_head.weight).any()


def assert_same_weights_differ(ours, theirs, part):
    theirs = plain_state(theirs)
    assert all((value != theirs[name]).any() for name, value in plain_state(ours).items() if part in name)


def batches(count=6, size=4):
    return [torch.stack([Sequences()[i]["input_ids"] for i in range(k * size, (k + 1) * size)]) for k in range(count)]


def test_plain_and_accelerate_loops_train_the_same(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain = convert_to_grass(tiny_llama(), CONFIG)
    optimizer = grass_optimizer(plain, torch.optim.AdamW, **ADAMW)
    other = convert_to_grass(tiny_llama(), CONFIG)
    prepared, prepared_optimizer = accelerator.prepare(other, grass_optimizer(other, torch.optim.AdamW, **ADAMW))
    losses = []
    for tokens in batches():
        loss = plain(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.backward(prepared(input_ids=tokens, labels=tokens).loss)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same_weights(restore_model(plain), restore_model(accelerator.unwrap_model(prepared)))


def test_start_table_and_logs(tmp_path, capsys):
    job = trainer(
        tmp_path,
        optim_args="rank=20,side=output,update_interval=3,base=adamw_torch,scale=0.5",
        lr_scheduler_type="linear",
    )
    job.train()
    table = capsys.readouterr().err
    assert table.count("Grass trains a slice of") == 1
    for words in (
        "self_attn.q_proj",
        "32 x 32",
        "62.5%",
        "fewer than rank=20",
        "the output head",
        "full AdamW",
        "KiB",
    ):
        assert words in table
    entries = [entry for entry in job.state.log_history if "loss" in entry]
    assert len(entries) == 6
    coverage = [entry["grass/coverage"] for entry in entries]
    assert coverage == sorted(coverage) and 0 < coverage[0] < coverage[-1] <= 1
    for number, entry in enumerate(entries):
        assert 0 < entry["grass/energy"] <= 1 and entry["grad_norm"] > 0
        # the Trainer logs after the scheduler's step in some versions: the rate is on the schedule
        assert entry["learning_rate"] in [pytest.approx(1e-2 * (1 - (number + k) / 6)) for k in (0, 1)]
        assert entry["grass/learning_rate"] == pytest.approx(entry["learning_rate"] / 2)


def test_energy_is_the_selected_rows_share(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    convert_to_grass(model, GrassConfig(rank=2, selection="top_r", side="output", update_interval=5))
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=0.1)
    x = torch.randn(5, 6)
    before = model[0].weight.detach().clone().requires_grad_()
    (x @ before.t()).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    optimizer.step()
    norms = before.grad.pow(2).sum(1)
    assert optimizer.grass.metrics()["grass/energy"] == pytest.approx(float(norms.topk(2).values.sum() / norms.sum()))
    assert model[0].weight_slice.index.tolist() == norms.topk(2).indices.sort().values.tolist()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant, frozen):
    def job(**options):
        model = tiny_llama()
        model.model.embed_tokens.weight.requires_grad_(not frozen)
        if frozen:
            model.enable_input_require_grads()
        return trainer(tmp_path, model, **options)

    plain = job()
    saved = job(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for run in (plain, saved):
        run.train()
    assert_same_weights(saved.model, plain.model, atol=1e-6)


def test_slices_that_no_gradient_reaches_stop_the_run():
    """Reentrant checkpointing drops the gradients inside it when its input needs none: never silently."""
    body, head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)
    model = nn.Sequential(body, head)
    convert_to_grass(model, GrassConfig(rank=2, target_modules=["0.0"]))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    before = plain_state(model)
    head(torch.utils.checkpoint.checkpoint(body, torch.randn(3, 8), use_reentrant=True)).sum().backward()
    with pytest.raises(RuntimeError, match=r"no Grass layer received a gradient.*use_reentrant"):
        optimizer.step()
    for name, value in plain_state(model).items():
        assert torch.equal(value, before[name])


def test_slices_that_no_gradient_reaches_any_more_stop_the_run():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2))
    convert_to_grass(model, GrassConfig(rank=2, target_modules=["0.0"]))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model[1](torch.randn(3, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"no Grass layer received a gradient at optimizer step 1"):
        optimizer.step()


def test_accumulating_4_is_batch_4(tmp_path):
    options = {
        "optim_args": "density=0.25,update_interval=2,base=adamw_torch,selection=uniform_nr",
        "max_grad_norm": 0.5,
    }
    whole = trainer(tmp_path, per_device_train_batch_size=4, **options)
    split = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for job in (whole, split):
        job.train()
    assert_same_weights(split.model, whole.model, atol=1e-5)


def test_frozen_embeddings_stay_and_slices_train(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.clone()
    trainer(tmp_path, model).train()
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    assert_same_weights_differ(model, tiny_llama(), "q_proj")
