"""Resuming under another base optimizer, or other settings of it: a sentence, before anything is changed."""

import copy
import io
import json
import logging

import pytest
import torch
from forks import ranks
from helpers import trainer
from jobs import ENGINES
from safetensors.torch import load_file
from torch import nn
from transformers.optimization import Adafactor

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim import base_record

BASES = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "muon": (MuonAdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "plain sgd": (torch.optim.SGD, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "torch's adafactor": (torch.optim.Adafactor, {}),
}
NAMES = sorted(BASES.keys() - {"plain sgd"})


def make(base, config=None, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    convert_to_grass(model, GrassConfig(update_interval=3, **(config or {})))
    cls, own = BASES[base] if isinstance(base, str) else (base, {})
    return model, grass_optimizer(model, cls, **{"lr": 1e-2, **own, **settings})


def steps(model, optimizer, first, last):
    for step in range(first, last):
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model, optimizer):
    """Both state dicts, as a file gives them back."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(model, optimizer):
    """All that loading an optimizer's state may change."""
    controller = optimizer.grass
    progress = (controller.step, sorted(controller.due), [copy.deepcopy(vars(p.state)) for p in grass_slices(model)])
    index = [slice_.index.clone() for slice_ in grass_slices(model)]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), index, progress))


def flat(value):
    """A nested state as one list of plain values."""
    if isinstance(value, torch.Tensor):
        return [("tensor", str(value.dtype), value.tolist())]
    if isinstance(value, dict):
        return [entry for key in value for entry in [key, *flat(value[key])]]
    if isinstance(value, (list, tuple)):
        return [entry for slice_ in value for entry in flat(slice_)]
    return [repr(value)]


def refused(state, model, optimizer):
    """The sentence with which loading stops; nothing may have changed."""
    before = flat(everything(model, optimizer))
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(state)
    assert flat(everything(model, optimizer)) == before
    return str(error.value)


@pytest.fixture(scope="module")
def states():
    made = {}
    for name in BASES:
        model, optimizer = make(name)
        steps(model, optimizer, 0, 4)
        made[name] = saved(model, optimizer)
    return made


@pytest.mark.parametrize("there, here", [(a, b) for a in NAMES for b in NAMES if a != b], ids=lambda name: name)
def test_another_base_stops(states, there, here):
    model, optimizer = make(here)
    model.load_state_dict(states[there][0])
    sentence = refused(states[there][1], model, optimizer)
    for name in (there, here):
        assert f"{BASES[name][0].__module__}.{BASES[name][0].__name__}" in sentence
    assert "resume with the base optimizer that wrote it" in sentence


OTHER = [
    (
        "adamw",
        {},
        {"betas": (0.9, 0.95)},
        "with betas=(0.9, 0.95), and the checkpoint was written with betas=",
    ),
    ("adamw", {}, {"eps": 1e-6}, "with eps=1e-06, and the checkpoint was written with eps=1e-08"),
    ("adamw", {"amsgrad": True}, {}, "with amsgrad=False, and the checkpoint was written with amsgrad=True"),
    (
        "adamw",
        {"weight_decay": 0.1},
        {},
        "with weight_decay=0.01, and the checkpoint was written with weight_decay=",
    ),
    ("sgd", {}, {"nesterov": True}, "with nesterov=True"),
    ("sgd", {}, {"momentum": 0.8}, "with momentum=0.8, and the checkpoint was written with momentum=0.9"),
    ("plain sgd", {}, {"momentum": 0.9}, "with momentum=0.9, and the checkpoint was written with momentum=0"),
    ("rmsprop", {"centered": True}, {}, "with centered=False"),
    ("muon", {}, {"ns_steps": 3}, "with ns_steps=3, and the checkpoint was written with ns_steps=5"),
    ("adafactor", {"beta1": 0.9}, {}, "with beta1=None, and the checkpoint was written with beta1=0.9"),
]


@pytest.mark.parametrize("base, there, here, words", OTHER, ids=lambda v: "" if isinstance(v, str) else str(v))
def test_other_settings_stop(base, there, here, words):
    """torch would take up the checkpoint's, and train with what nobody asked for."""
    model, optimizer = make(base, **there)
    steps(model, optimizer, 0, 4)
    weights, state = saved(model, optimizer)
    again, its_optimizer = make(base, **here)
    again.load_state_dict(weights)
    assert words in refused(state, again, its_optimizer)
    same, its_optimizer = make(base, **there)
    same.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    steps(model, optimizer, 4, 8)
    steps(same, its_optimizer, 4, 8)
    assert torch.equal(model[0].weight, same[0].weight)


@pytest.mark.parametrize(
    "there, here", [({}, {"fused": True}), ({"fused": True}, {"foreach": True}), ({"foreach": False}, {})]
)
def test_how_a_step_is_computed_does_not_matter(there, here):
    model, optimizer = make("adamw", **there)
    steps(model, optimizer, 0, 4)
    weights, state = saved(model, optimizer)
    again, its_optimizer = make("adamw", **here)
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    steps(again, its_optimizer, 4, 6)
    assert its_optimizer.grass.step == 6


@pytest.fixture
def warnings(caplog):
    """The texts of ours; the handler may be taken from the root by others' logging."""
    logger = logging.getLogger("grass_hf")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_another_learning_rate_is_said_every_time(warnings):
    model, optimizer = make("adamw")
    steps(model, optimizer, 0, 2)
    state = saved(model, optimizer)[1]
    for _ in range(2):  # a run that was resumed so, and one that is resumed from it
        warnings.clear()
        model, optimizer = make("adamw", lr=1e-3)
        optimizer.load_state_dict(state)
        assert "resuming with lr=0.001, and the checkpoint was written with lr=0.01" in warnings.text
        assert optimizer.param_groups[-1]["lr"] == 1e-2
        state = saved(model, optimizer)[1]
    model, optimizer = make("adamw")
    warnings.clear()
    optimizer.load_state_dict(state)
    assert not warnings.text


def test_what_a_schedule_has_changed_is_no_other_setting(warnings):
    def build():
        model, optimizer = make("adamw", config={"scale": 0.3}, weight_decay=0.1)
        rates = [group["lr"] for group in optimizer.param_groups]
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=20)

    model, optimizer, schedule = build()
    for step in range(4):
        steps(model, optimizer, step, step + 1)
        schedule.step()
    state = saved(model, optimizer)[1]
    _, again, _ = build()
    assert again.param_groups[-1]["betas"] != optimizer.param_groups[-1]["betas"]
    again.load_state_dict(state)
    assert again.param_groups[-1]["betas"] == optimizer.param_groups[-1]["betas"]
    assert not warnings.text
    # another alpha changes the groups' decay, but not what was asked for
    _, other = make("adamw", config={"scale": 0.7}, weight_decay=0.1)
    other.load_state_dict(state)
    assert "scale=0.7 (was 0.3)" in warnings.text and "resuming with lr=" in warnings.text


class Mine(torch.optim.AdamW):
    pass


def test_a_class_of_a_script_is_the_same_under_another_module_name(monkeypatch):
    state = make(Mine)[1].state_dict()
    monkeypatch.setattr(Mine, "__module__", "__main__")
    _, again = make(Mine)
    again.load_state_dict(state)
    assert "keeps other state" in refused(state, *make("adamw"))


def without_record(state):
    """As a checkpoint was before it said which optimizer wrote it."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        if "grass" in group:
            meta = json.loads(group["grass"])
            del meta[base_record.KEY]
            group["grass"] = json.dumps(meta)
    return state


@pytest.mark.parametrize("there, here", [(a, b) for a in BASES for b in BASES], ids=lambda name: name)
def test_older_checkpoints_are_known_by_their_state(states, there, here):
    model, optimizer = make(here)
    model.load_state_dict(states[there][0])
    state = without_record(states[there][1])
    # nothing in the state tells these apart, as in plain torch
    alike = [{"adam", "adamw"}, {"sgd", "plain sgd"}, {there} if there == "plain sgd" else set()]
    if there == here or any({there, here} == pair or {there} == pair for pair in alike):
        optimizer.load_state_dict(state)
    else:
        assert "resume with the base optimizer that wrote it" in refused(state, model, optimizer)


def bitsandbytes_and_torchao():
    kinds = {
        "32 bits": ("bitsandbytes.optim", "AdamW", {"optim_bits": 32}),
        "8 bits": ("bitsandbytes.optim", "AdamW", {"optim_bits": 8}),
        "blocks of 256": ("torchao.optim", "AdamW8bit", {}),
        "blocks of 128": ("torchao.optim", "AdamW8bit", {"block_size": 128}),
        "4 bits": ("torchao.optim", "AdamW4bit", {}),
    }
    return kinds, [(a, b) for a in kinds for b in kinds if a != b and kinds[a][0] == kinds[b][0]]


KINDS, PAIRS = bitsandbytes_and_torchao()


@pytest.mark.parametrize("there, here", PAIRS, ids=lambda name: name)
def test_state_in_other_bits_stops(there, here):
    def build(kind):
        package, name, settings = KINDS[kind]
        return make(getattr(pytest.importorskip(package), name), **settings)

    state = saved(*build(there))[1]  # before a step: torchao would compile one
    sentence = refused(state, *build(here))
    assert "optim_bits=" in sentence or "block_size=" in sentence or "AdamW4bit" in sentence
    build(there)[1].load_state_dict(state)


def test_bitsandbytes_is_not_torch():
    bnb = pytest.importorskip("bitsandbytes.optim")
    state = saved(*make("adamw"))[1]
    assert "bitsandbytes.optim.adamw.AdamW" in refused(state, *make(bnb.AdamW))


def test_through_the_trainer(tmp_path):
    def job(name, base, **options):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
        return trainer(tmp_path / name, optim_args=f"density=0.25,update_interval=3,base={base}", **settings)

    job("first", "adamw_torch").train()
    checkpoint = tmp_path / "first" / "checkpoint-2"
    job("fused", "adamw_torch_fused").train(resume_from_checkpoint=str(checkpoint))
    for words, base, options in (
        ("torch.optim.sgd.SGD", "sgd", {}),
        ("betas=(0.9, 0.95)", "adamw_torch", {"adam_beta2": 0.95}),
        ("weight_decay=0.3", "adamw_torch", {"weight_decay": 0.3}),
    ):
        other = job("other", base, **options)
        with pytest.raises(ValueError) as error:
            other.train(resume_from_checkpoint=str(checkpoint))
        assert words in str(error.value)
        assert not list((tmp_path / "other").glob("checkpoint-*"))
        for name, weight in load_file(checkpoint / "model.safetensors").items():
            assert torch.equal(other.model.state_dict()[name], weight)


@pytest.mark.dist
@pytest.mark.parametrize(
    "saving, runs", [("sharded", "sharded"), ("full", "full"), ("full", "sharded"), ("ddp", "sharded")]
)
def test_under_fsdp2(tmp_path, saving, runs):
    def run(name, engine, resume, optim_args, **options):
        optim_args = f"density=0.5,update_interval=3,{optim_args}"
        arguments = (
            str(tmp_path / f"{name}.pt"),
            str(tmp_path / name),
            2,
            resume,
            {"optim_args": optim_args, **options},
        )
        return ranks(2, "train", *arguments, environment=ENGINES[engine])

    run("first", saving, None, "base=adamw_torch")
    checkpoint = str(tmp_path / "first" / "checkpoint-4")
    for optim_args, options, words in (
        ("base=sgd", {}, "that of torch.optim.adamw.AdamW, and this run has torch.optim.sgd.SGD"),
        ("base=adamw_torch", {"adam_beta2": 0.95}, r"resuming with betas=\(0.9, 0.95\)"),
    ):
        with pytest.raises(AssertionError, match=words):
            run("other", runs, checkpoint, optim_args, **options)
