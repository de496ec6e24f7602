"""Lightning's Trainer trains as a plain loop does: the closure, accumulation, clipping, precision, a resumed run."""

import contextlib

import pytest
import torch
from helpers import assert_same_weights, plain_state, tiny_llama
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LambdaLR

from grass_hf.convert.conversion import grass_slices, is_converted

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning_runs import Manual, Module, assert_close, assert_same_run, fit, grass_steps, loader, loop, quiet  # noqa: E402

pytestmark = pytest.mark.usefixtures(quiet.__name__)


# -- as the plain loop


@pytest.mark.parametrize("where", ["__init__", "configure_model", "configure_optimizers"])
@pytest.mark.parametrize("kind", [Module, Manual])
def test_equals_the_plain_loop(kind, where):
    module = kind(where)
    fit(module, max_epochs=2)
    assert_same_run(module, loop(Module(where), epochs=2))
    assert grass_steps(module) == 12


CASES = {
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "norm": ({"gradient_clip_val": 0.1}, {"clip": lambda params: clip_grad_norm_(params, 0.1)}),
    "value": (
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"clip": lambda params: clip_grad_value_(params, 1e-3)},
    ),
    "bfloat16": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
    "float16 on a CPU": ({"precision": "16-mixed"}, {"dtype": torch.bfloat16}),  # Lightning takes bfloat16
}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_options_equal_the_plain_loop(case, resident):
    options, same = CASES[case]
    module = Module(resident=resident)
    fit(module, **options)
    assert_same_run(module, loop(Module(resident=resident), **same))


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_equals_the_plain_loop(interval):
    def factor(step):
        return 0.7**step

    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": interval}]

    settings = {"scale": 0.5, "scale_warmup": 3}
    module = Scheduled(**settings)
    fit(module, max_epochs=2)
    schedule = factor if interval == "step" else lambda step: factor(step // 6)
    assert_same_run(module, loop(Module(**settings), epochs=2, schedule=schedule))


def test_float16_with_a_scaler_skips_what_overflows():
    class Spoiled(Module):
        def loss(self, batch, number):
            return super().loss(batch, number) * (float("inf") if number == 2 else 1.0)

    def plugin():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def without_the_third(kind, **settings):
        module = kind(selection="top_r", **settings)
        batches = loader(leave_out=lambda number: kind is Module and number == 2)
        fit(module, data=batches, plugins=plugin(), gradient_clip_val=1.0)
        return module

    spoiled, clean = without_the_third(Spoiled), without_the_third(Module)
    assert len(spoiled.seen) == 6 and grass_steps(spoiled) == grass_steps(clean) == 5
    for slice_, other in zip(grass_slices(spoiled.model), grass_slices(clean.model), strict=True):
        assert torch.equal(slice_.index, other.index), "what an overflow observed chooses no rows"
    # the scale is halved by then, so other digits round
    assert_same_weights(spoiled.model, clean.model, atol=2e-3)


def test_a_training_step_that_returns_nothing_is_no_step():
    class Skipping(Module):
        def training_step(self, batch, number):
            return super().training_step(batch, number) if number % 2 else None

    module, reference = Skipping(), Module()
    fit(module)
    fit(reference, data=loader(leave_out=lambda number: number % 2 == 0))
    assert_same_run(module, reference)
    assert grass_steps(module) == 3


# -- as plain AdamW


@pytest.mark.parametrize("kind", [Module, Manual])
@pytest.mark.parametrize("side", ["output", "input"])
def test_rank_m_is_adamw(kind, side):
    settings = {"density": 1.0, "side": side, "target_modules": "all-matrices"}
    module, plain = kind(dtype=torch.float64, **settings), kind(None, torch.float64)
    for each in (module, plain):
        clipping = {} if kind is Manual else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
        fit(each, max_epochs=2, **clipping)
    assert is_converted(module.model) and not is_converted(plain.model)
    assert_same_weights(module.model, plain.model, atol=1e-12)


# -- checkpoints


class Halves(Module):
    """Validates between; for the resumed run, with a schedule."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda step: 0.9**step), "interval": "step"}]


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, {"ema": True}])
@pytest.mark.parametrize("where", ["__init__", "configure_model", "configure_optimizers"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, where, options):
    options = dict(options)
    ema = options.pop("ema", False)
    if ema and where == "configure_optimizers":
        pytest.skip("it stops: test_lightning_guards.py")

    def run(epochs, **more):
        module = Halves(where, selection="top_r")
        saver = ModelCheckpoint(tmp_path / str(epochs), save_top_k=-1, filename="{epoch}")
        callbacks = [EMAWeightAveraging(decay=0.8)] if ema else []
        settings = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [*callbacks, saver]}
        fit(module, more, val_dataloaders=loader(4), **settings, **options)
        return module

    straight = run(4)
    run(2)
    resumed = run(4, ckpt_path=tmp_path / "2" / "epoch=1.ckpt")
    assert resumed.seen == straight.seen[-len(resumed.seen) :] and len(resumed.seen) == 12
    assert_same_weights(resumed.model, straight.model)
    for slice_, other in zip(grass_slices(resumed.model), grass_slices(straight.model), strict=True):
        assert ema or torch.equal(slice_.index, other.index)
    saved = torch.load(tmp_path / "2" / "epoch=1.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state") if ema else ("state_dict",):
        assert saved[key].keys() == {f"model.{name}" for name in tiny_llama().state_dict()}


# -- other ways to train


def test_two_optimizers_of_which_one_drives_slices():
    class Two(Module):
        automatic_optimization = False

        def __init__(self, where):
            super().__init__(where)
            torch.manual_seed(1)
            self.critic = torch.nn.Linear(32, 1)

        def configure_optimizers(self):
            return self.optimizer(), torch.optim.SGD(self.critic.parameters(), lr=1e-2)

        def training_step(self, batch, number):
            ours, other = self.optimizers() if self._trainer else self.both
            hidden = self.model.model(batch["input_ids"]).last_hidden_state
            for optimizer, sign in ((other, 1.0), (ours, -1.0)):
                with optimizer.toggle_model() if self._trainer else contextlib.nullcontext():
                    loss = sign * self.critic(hidden.detach() if sign == 1.0 else hidden).sigmoid().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                self.seen.append(loss.item())

    module, reference = Two("__init__"), Two("__init__")
    fit(module)
    reference.both = reference.configure_optimizers()
    for number, batch in enumerate(loader()):
        reference.training_step(batch, number)
    assert_same_run(module, reference)
    assert torch.equal(module.critic.weight, reference.critic.weight)


def test_norms_of_gradients_that_are_dropped_choose_no_rows():
    class Dropping(Manual):
        def training_step(self, batch, number):
            optimizer = self.optimizers()
            if self.drops:
                self.manual_backward(self.model(**{key: value.flip(0, 1) for key, value in batch.items()}).loss * 100)
                optimizer.zero_grad(set_to_none=False)
            self.manual_backward(self.loss(batch, number))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    runs = []
    for drops in (True, False):
        module = Dropping(selection="top_r")
        module.drops = drops
        fit(module)
        runs.append(module)
    for slice_, other in zip(*(grass_slices(module.model) for module in runs), strict=True):
        assert torch.equal(slice_.index, other.index)
    assert_same_run(*runs)


def test_test_and_validation_between_change_nothing():
    class Tested(Module):
        def on_train_epoch_end(self):
            self.eval()
            with torch.no_grad():
                self.model(**next(iter(loader())))
            self.train()

    module = Tested()
    trainer = fit(module, max_epochs=2, val_dataloaders=loader(8), val_check_interval=2)
    assert_same_run(module, loop(Module(), epochs=2))
    before = plain_state(module.model)
    trainer.test(module, loader(8), verbose=False)
    trainer.validate(module, loader(8), verbose=False)
    assert_close(plain_state(module.model), before, atol=0.0)


def test_a_model_in_evaluation_mode_trains_as_a_plain_one_does(tmp_path):
    runs = []
    for where, density in (("__init__", 1.0), (None, 1.0)):
        module = Module(where, torch.float64, density=density)
        module.model.config.attention_dropout = 0.5
        module.model.eval()
        fit(module, val_dataloaders=loader(4), val_check_interval=2)
        assert not module.model.training
        runs.append(module)
    assert_same_weights(runs[0].model, runs[1].model, atol=1e-12)


def test_a_checkpoint_is_read_by_plain_modules_and_by_converted_ones(tmp_path):
    module = Module()
    fit(module).save_checkpoint(tmp_path / "run.ckpt")
    for where in (None, "__init__", "configure_model"):
        read = Module.load_from_checkpoint(tmp_path / "run.ckpt", where=where)
        assert_same_weights(read.model, module.model)
        assert is_converted(read.model) == (where is not None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_equals_the_plain_loop(precision):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    module = Module("__init__", selection="top_r")
    model, optimizer = fabric.setup(module.model, module.optimizer())
    for batch in fabric.setup_dataloaders(loader()):
        fabric.backward(model(**batch).loss * 100)
        optimizer.zero_grad(set_to_none=False)  # an evaluation of gradients that is thrown away
        loss = model(**batch).loss
        module.seen.append(loss.item())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    reference = Module(selection="top_r")
    assert_same_run(module, loop(reference, dtype=dtype, clip=lambda params: clip_grad_norm_(params, 0.1)))
    assert optimizer.state_dict()["param_groups"][-1]["grass"]


def test_a_state_dict_of_lightnings_wrapper_has_all():
    class Saving(Manual):
        def on_train_end(self):
            self.saved = self.optimizers().state_dict()

    module = Saving()
    fit(module)
    other = Module("__init__")
    other.model.load_state_dict(module.model.state_dict())
    optimizer = other.optimizer()
    optimizer.load_state_dict(module.saved)
    assert optimizer.grass.step == 6
    for slice_, source in zip(grass_slices(other.model), grass_slices(module.model), strict=True):
        assert torch.equal(slice_.index, source.index) and torch.equal(slice_.active, source.active)
