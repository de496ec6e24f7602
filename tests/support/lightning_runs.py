"""A module for Lightning, its fit, and the plain loop that does the same; the tests of Lightning share them."""

import logging
import warnings

import lightning
import pytest
import torch
from helpers import Sequences, assert_same_weights, plain_state, tiny_llama
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import is_converted

SETTINGS = {"density": 0.25, "update_interval": 2, "stagger": 1}
WEIGHT = "model.layers.0.mlp.down_proj.weight"


class Module(lightning.LightningModule):
    """A LLaMA that is converted in one of Lightning's hooks, or not at all.

    Args:
        where: name of the hook; None for a plain model with a plain AdamW.
        dtype: of the model.
        settings: of the config; those of `SETTINGS` are the defaults.
    """

    def __init__(self, where="configure_model", dtype=torch.float32, **settings):
        super().__init__()
        self.where, self.settings = where, {**SETTINGS, **settings}
        self.model = tiny_llama().to(dtype)
        self.seen = []
        self._reach("__init__")

    def _reach(self, hook):
        if hook == self.where and not is_converted(self.model):
            convert_to_grass(self.model, GrassConfig(**self.settings))

    def configure_model(self):
        self._reach("configure_model")

    def optimizer(self):
        if self.where is None:
            return torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        return grass_optimizer(self.model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

    def configure_optimizers(self):
        self._reach("configure_optimizers")
        return self.optimizer()

    def loss(self, batch, number):
        loss = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch, number):
        return self.loss(batch, number)

    def validation_step(self, batch, _):
        self.model(**batch)

    test_step = validation_step


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, number))
        optimizer.step()


def loader(count=24, leave_out=lambda number: False):
    """Batches of four, without some."""
    batches = [*DataLoader(Sequences(count), batch_size=4)]
    return DataLoader([batch for number, batch in enumerate(batches) if not leave_out(number)], batch_size=None)


def fit(module, fit_options=None, data=None, val_dataloaders=None, **options):
    defaults = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**{**defaults, **quiet, **options})
    trainer.fit(module, data or loader(), val_dataloaders, **(fit_options or {}))
    return trainer


def loop(module, epochs=1, accumulate=1, clip=lambda params: None, dtype=None, schedule=None):
    """The plain loop: what Lightning must do."""
    for hook in ("configure_model", "configure_optimizers"):
        module._reach(hook)
    optimizer = module.optimizer()
    scheduler = schedule and LambdaLR(optimizer, schedule)
    for number, batch in enumerate([*loader()] * epochs):
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = module.training_step(batch, number)
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            clip([param for group in optimizer.param_groups for param in group["params"]])
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
    return module


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        yield


def assert_same_run(module, reference):
    assert module.seen == reference.seen
    assert_same_weights(module.model, reference.model)
    assert not torch.equal(plain_state(module.model)[WEIGHT], tiny_llama().state_dict()[WEIGHT]), "nothing was trained"


def grass_steps(module):
    return module.model.grass.driver().optimizer.grass.step


def assert_close(state, expected, atol=1e-6):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
