"""Any base optimizer: every name the installed Trainer knows trains, or is refused with a sentence."""

import pytest
import torch
from helpers import tiny_llama, trainer
from torch import nn
from transformers.training_args import OptimizerNames

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim.driving import plain_class

# name -> what happens on this machine; a word that the refusal must hold, or None where it trains
TRAINS, PACKAGE, DEVICE = "trains", "package", "device"
NAMES = {
    "adamw_torch": TRAINS,
    "adamw_torch_fused": TRAINS,
    "adafactor": TRAINS,
    "sgd": TRAINS,
    "adagrad": TRAINS,
    "rmsprop": TRAINS,
    "adamw_bnb_8bit": TRAINS,
    "adamw_8bit": TRAINS,
    "ademamix": TRAINS,
    "ademamix_8bit": TRAINS,
    "lion_8bit": TRAINS,
    "lion_32bit": TRAINS,
    "paged_adamw_32bit": TRAINS,
    "paged_adamw_8bit": TRAINS,
    "paged_ademamix_32bit": TRAINS,
    "paged_ademamix_8bit": TRAINS,
    "paged_lion_32bit": TRAINS,
    "paged_lion_8bit": TRAINS,
    "rmsprop_bnb": TRAINS,
    "rmsprop_bnb_8bit": TRAINS,
    "rmsprop_bnb_32bit": TRAINS,
    "adamw_torch_8bit": "compiles",
    "adamw_torch_4bit": "compiles",
    "grokadamw": PACKAGE,
    "stable_adamw": PACKAGE,
    "adamw_anyprecision": PACKAGE,
    "adamw_torch_xla": DEVICE,
    "adamw_torch_npu_fused": DEVICE,
    "grass": "base optimizer of itself",
    "galore_adamw": "full gradients",
    "galore_adamw_8bit": "full gradients",
    "galore_adafactor": "full gradients",
    "galore_adamw_layerwise": "full gradients",
    "galore_adamw_8bit_layerwise": "full gradients",
    "galore_adafactor_layerwise": "full gradients",
    "apollo_adamw": "full gradients",
    "apollo_adamw_layerwise": "full gradients",
    "lomo": "during backward",
    "adalomo": "during backward",
    "schedule_free_radam": "outside its step",
    "schedule_free_adamw": "outside its step",
    "schedule_free_sgd": "outside its step",
}
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_key_value_heads": 4,
}  # slices large enough to quantise


def base_names():
    import grass_hf

    grass_hf.register()
    return [name.value for name in OptimizerNames if name.value != "adamw_hf"]


def train(tmp_path, base, **options):
    optim_args = f"density=0.5,update_interval=2,selection=multinomial_norm_nr,base={base}"
    job = trainer(
        tmp_path, tiny_llama(**WIDE), optim_args=optim_args, max_steps=5, **{"learning_rate": 1e-3, **options}
    )
    job.train()
    return job


@pytest.mark.parametrize("base", base_names())
def test_every_name_trains_or_says_why_not(tmp_path, base):
    kind = NAMES[base]  # a new name of a newer Trainer must be classified here
    if kind == "compiles":
        pytest.skip("compiles for minutes: test_torchao_trains, marked slow")
    if kind == TRAINS:
        if base not in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
            pytest.importorskip("bitsandbytes")
        job = train(tmp_path, base, **({"learning_rate": 0.1} if base == "sgd" else {}))
        assert job.optimizer.optimizer.grass.step == 5
        losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
        assert min(losses[1:]) < losses[0]
        assert len({tuple(layer.index.tolist()) for layer in grass_slices(job.model)}) > 1
    elif kind in (PACKAGE, DEVICE):
        with pytest.raises((ValueError, ImportError), match=r"[Ii]nstall|requires|available|import|\b(apex|npu|xla)\b"):
            train(tmp_path, base)
    else:
        with pytest.raises(ValueError, match=kind):
            train(tmp_path, base)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchao_trains(tmp_path, base):
    pytest.importorskip("torchao")
    job = train(tmp_path, base)
    assert job.optimizer.optimizer.grass.step == 5


def test_settings_of_the_training_arguments_reach_the_base(tmp_path):
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.3}
    for base, fused in (("adamw_torch", None), ("adamw_torch_fused", True)):
        job = trainer(tmp_path, optim_args=f"rank=8,base={base}", **options)
        optimizer = job.create_optimizer()
        assert plain_class(optimizer) is torch.optim.AdamW
        for group in optimizer.param_groups:
            assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.95), 1e-6, fused)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]
        slices = {id(layer.active) for layer in grass_slices(job.model)}
        assert {id(p) for p in optimizer.param_groups[-1]["params"]} == slices


def test_arguments_of_the_base_itself(tmp_path):
    job = trainer(tmp_path, optim_args="rank=8,base=sgd,base.momentum=0.9,base.nesterov=true,base.dampening=0")
    group = job.create_optimizer().param_groups[0]
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)
    job = trainer(tmp_path, optim_args="rank=8,base=adamw_torch,base.amsgrad=true")
    assert job.create_optimizer().param_groups[0]["amsgrad"] is True


@pytest.mark.parametrize(
    "text, words",
    [
        ("rank=8,base=adamw_troch", ["adamw_troch", "did you mean adamw_torch"]),
        ("rank=8,base=sgd,base.momentun=0.9", ["momentun", "SGD", "did you mean momentum"]),
    ],
)
def test_unknown_bases_and_arguments_stop(tmp_path, text, words):
    job = trainer(tmp_path, optim_args=text)
    with pytest.raises(ValueError) as error:
        job.train()
    for word in words:
        assert word in str(error.value)
    assert job.state.global_step == 0


def test_the_trainers_own_default_is_the_default_base(tmp_path):
    job = trainer(tmp_path, optim_args="rank=8")
    plain = trainer(tmp_path, optim_args=None, optim=type(job.args).default_optim)
    fused = [bool(j.create_optimizer().param_groups[0]["fused"]) for j in (job, plain)]
    assert fused[0] == fused[1]


def test_plain_pytorch_refusals():
    model = convert_to_grass(tiny_llama(), GrassConfig(rank=8))

    class AdamWScheduleFree(torch.optim.AdamW):
        pass

    class CPUOffloadOptimizer:
        pass

    for cls, word in (
        (torch.optim.LBFGS, "flat history"),
        (AdamWScheduleFree, "outside its step"),
        (CPUOffloadOptimizer, "not a torch.optim.Optimizer"),
    ):
        with pytest.raises(ValueError, match=word):
            grass_optimizer(model, cls, lr=1e-3)


def test_scale_multiplies_the_rate_and_not_the_decay():
    model = convert_to_grass(tiny_llama(), GrassConfig(rank=8, scale=0.5))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.2)
    ordinary, slices = optimizer.param_groups
    assert (ordinary["lr"], ordinary["weight_decay"]) == (1e-2, 0.2)
    assert slices["lr"] == 5e-3 and slices["lr"] * slices["weight_decay"] == pytest.approx(1e-2 * 0.2)


def dequantised(state, shape):
    """The optimizer's per-element state in plain floats, whatever it is kept in."""
    import bitsandbytes.functional as bnb

    found = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.numel() == 1 or key.startswith(("qmap", "absmax")):
            continue
        if value.dtype == torch.uint8:
            number = key[-1]
            parts = zip(
                value.view(-1, *shape),
                state["absmax" + number].view(
                    -1, value[0].numel() // 256 if value.dim() == 3 else value.numel() // 256
                ),
                strict=True,
            )
            value = torch.stack(
                [bnb.dequantize_blockwise(v, absmax=a, code=state["qmap" + number], blocksize=256) for v, a in parts]
            )
        found[key] = value.clone()
    return found


CARRIED = {
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "adafactor_torch": (torch.optim.Adafactor, {}),
    "adafactor": ("transformers.Adafactor", {"relative_step": False, "scale_parameter": False, "beta1": 0.9}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "lion8bit": ("bitsandbytes.optim.Lion8bit", {}),
    "ademamix8bit": ("bitsandbytes.optim.AdEMAMix8bit", {}),
}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("base", CARRIED)
def test_state_follows_its_rows(base, side):
    """Row by row: what stays keeps its state, what is fresh starts clean; columns' statistics stay."""
    cls, settings = CARRIED[base]
    if isinstance(cls, str):
        module, _, name = cls.rpartition(".")
        cls = getattr(pytest.importorskip(module), name)
    pytest.importorskip("bitsandbytes")
    # a square slice (64 x 64) on purpose: Adafactor's row and column statistics have the same shape there
    model = nn.Sequential(nn.Linear(64, 128, bias=False) if side == "output" else nn.Linear(128, 64, bias=False))
    rules = {"selection": "uniform_nr", "state_policy": "carry"}
    convert_to_grass(model, GrassConfig(rank=64, side=side, update_interval=2, **rules))
    optimizer = grass_optimizer(model, cls, lr=1e-3, **settings)
    layer = model[0].weight_slice
    carry_calls = []
    original = layer.load_selection

    def spy(selection, seed):
        before = dequantised(optimizer.state[layer.active], layer.active.shape)
        source = original(selection, seed)
        carry_calls.append((before, source))
        return source

    layer.load_selection = spy
    for _ in range(3):
        model(torch.randn(32, model[0].in_features)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before, source = carry_calls[-1]
    after = dequantised(optimizer.state[layer.active], layer.active.shape)
    stays = source >= 0
    assert 0 < stays.sum() < 64
    for key, value in after.items():
        old = before[key]
        if "row" in key or "col" in key:
            along = -2 if "row" in key else -1
            old, value = old.flatten(), value.flatten()
            expected = torch.where(stays, old[source.clamp(min=0)], 0.0) if along == layer.dim else old
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
            continue
        axis = layer.dim
        kept, fresh = stays.nonzero().squeeze(1), (~stays).nonzero().squeeze(1)
        moved = old.index_select(axis, source[kept])
        tolerance = 0.05 * float(old.abs().max()) if "8bit" in base else 0.0  # one more rounding to 8 bits
        torch.testing.assert_close(value.index_select(axis, kept), moved, rtol=0, atol=tolerance)
        clean = settings.get("initial_accumulator_value", 0.0) if key == "sum" else 0.0
        assert (value.index_select(axis, fresh) == clean).all()


def test_state_that_cannot_be_carried_says_so():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["sketch"] = torch.zeros(3, 5)

    def step(policy):
        model = nn.Sequential(nn.Linear(8, 8))
        convert_to_grass(model, GrassConfig(rank=4, state_policy=policy))
        optimizer = grass_optimizer(model, Odd, lr=1e-3)
        model(torch.randn(3, 8)).sum().backward()
        optimizer.step()

    step("reset")
    with pytest.raises(ValueError, match=r"'sketch' of shape \(3, 5\).*state_policy='reset'"):
        step("carry")
