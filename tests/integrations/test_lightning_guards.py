"""Lightning's averages of weights are the true ones, and what would train wrongly stops before a weight changes."""

import pytest
import torch
from helpers import assert_same_weights, plain_state

from grass_hf import restore_model
from grass_hf.slices import parted

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning_runs import Manual, Module, assert_close, fit, loader, loop, quiet  # noqa: E402

pytestmark = pytest.mark.usefixtures(quiet.__name__)


# -- averages


class Trace(lightning.pytorch.Callback):
    """The weights after every step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append(plain_state(module.model))


@pytest.mark.parametrize("selection", ["top_r", "multinomial_norm"])
@pytest.mark.parametrize("decay", [0.8, None])
def test_an_average_is_the_true_one(decay, selection):
    average = WeightAveraging() if decay is None else EMAWeightAveraging(decay=decay)
    module, trace = Module("__init__", selection=selection), Trace()
    fit(module, max_epochs=2, val_dataloaders=loader(4), callbacks=[trace, average])
    assert module.seen == loop(Module(selection=selection), epochs=2).seen, "training is not disturbed"
    expected = trace.states[0]
    for number, state in enumerate(trace.states[1:], 2):
        keep = 1 - 1 / number if decay is None else decay
        expected = {name: keep * value + (1 - keep) * state[name] for name, value in expected.items()}
    assert_close(plain_state(module.model), expected)
    assert_close(plain_state(restore_model(module.model)), expected)


def test_stochastic_weight_averaging_at_rank_m_is_adamws():
    modules = Module("__init__", density=1.0, dtype=torch.float64), Module(None, dtype=torch.float64)
    for module in modules:
        fit(module, max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)])
    assert_same_weights(restore_model(modules[0].model), modules[1].model, atol=1e-12)


def test_an_average_that_is_made_before_the_conversion_stops():
    with pytest.raises(RuntimeError, match="must match the size"):  # torch's words
        fit(Module("configure_optimizers"), callbacks=[EMAWeightAveraging()])


def test_training_goes_on_from_an_average_in_a_checkpoint_and_says_so(tmp_path, caplog):
    trainer = fit(Module("__init__"), callbacks=[EMAWeightAveraging(decay=0.8)])
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    parted._warn_of_other_weights.cache_clear()  # it is said once
    fit(Module("__init__"), {"ckpt_path": tmp_path / "average.ckpt"}, max_epochs=2)
    assert "training goes on from the weights that are here" in caplog.text


# -- what stops, before a weight changes


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}]
)
@pytest.mark.parametrize("kind", [Module, Manual])
def test_a_loss_that_is_not_finite_stops_before_a_weight_changes(kind, options):
    if kind is Manual and options.keys() & {"gradient_clip_val", "accumulate_grad_batches"}:
        pytest.skip("Lightning has these for automatic optimisation only")

    class Spoiled(kind):
        def loss(self, batch, number):
            if number == 4:
                self.before = plain_state(self.model)
            return super().loss(batch, number) * (float("nan") if number == 4 else 1.0)

    module = Spoiled()
    with pytest.raises(FloatingPointError, match="is not finite at optimizer step"):
        fit(module, **options)
    assert_close(plain_state(module.model), module.before, atol=0.0)
    assert len(module.seen) == (6 if "accumulate_grad_batches" in options else 5)


@pytest.mark.parametrize("made", ["after", "before"])
def test_a_plain_optimizer_stops_at_the_first_step(made):
    class Plain(Module):
        def optimizer(self):
            return torch.optim.AdamW([param for param in self.model.parameters() if param.requires_grad], lr=1e-2)

        def configure_optimizers(self):
            optimizer = self.optimizer()
            self._reach("configure_optimizers")
            return optimizer

    module = Plain("__init__" if made == "after" else "configure_optimizers")
    before = plain_state(module.model)
    words = "holds the slice of" if made == "after" else "was made before the conversion"
    with pytest.raises(RuntimeError, match=rf"this AdamW {words}.*grass_optimizer"):
        fit(module)
    assert_close(plain_state(module.model), before, atol=0.0)


def test_a_second_fit_says_that_the_slices_are_driven():
    module = Module("__init__")
    fit(module)
    with pytest.raises(ValueError, match=r"driven by an optimizer already.*replace=True"):
        fit(module)
