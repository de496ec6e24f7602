"""skorch's NeuralNet, whose steps are step(closure): trains as a plain loop does, pickles, saves, clones and tunes."""

import copy
import pickle

import numpy
import pytest
import torch
from helpers import plain_state
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices, is_converted

skorch = pytest.importorskip("skorch")
from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from skorch.callbacks import (  # noqa: E402
    Checkpoint,
    EarlyStopping,
    GradientNormClipping,
    LoadInitState,
    LRScheduler,
)

SETTINGS = {"update_interval": 2, "stagger": 1, "selection": "top_r"}
OPTIONS = {"lr": 1e-2, "optimizer__weight_decay": 0.1, "batch_size": 8, "train_split": None, "verbose": 0}


class Net(nn.Module):
    """Two layers; converted unless density is None."""

    def __init__(self, density=0.25, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        if density is not None:
            convert_to_grass(self, GrassConfig(**{**SETTINGS, "density": density, **settings}))

    def forward(self, x):
        return self.last(self.first(x).tanh())


class GrassNet(skorch.NeuralNetClassifier):
    """As the docs have it: the optimizer is made over the module."""

    def initialize_optimizer(self, *args, **kwargs):
        args, kwargs = self.get_params_for_optimizer("optimizer", self.get_all_learnable_params())
        self.optimizer_ = grass_optimizer(self.module_, self.optimizer, params=args[0], **kwargs)
        return self


def data():
    generator = numpy.random.default_rng(0)
    x = generator.standard_normal((48, 6)).astype("float32")
    return x, (x[:, 0] > 0).astype("int64") + (x[:, 1] > 0)


def net(kind=GrassNet, **options):
    return kind(
        Net, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, **{**OPTIONS, "max_epochs": 3, **options}
    )


def loop(epochs=3, clip=None, schedule=None, density=0.25, **settings):
    model = Net(density, **settings)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    x, y = (torch.from_numpy(each) for each in data())
    for _ in range(epochs):
        for start in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[start : start + 8]), y[start : start + 8]).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= schedule or 1.0
    return model


def assert_same(ours, theirs, atol=0.0):
    ours, theirs = plain_state(ours), plain_state(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("resident", [True, False])
def test_fit_equals_the_plain_loop(resident):
    trained = net(module__resident=resident).fit(*data())
    assert_same(trained.module_, loop(resident=resident))
    assert trained.optimizer_.grass.step == 18
    losses = trained.history[:, "train_loss"]
    assert losses[-1] < losses[0]
    trained.optimizer_.grass.settle()  # the weight decay that rows outside the slices are owed
    predicted = trained.predict_proba(data()[0])
    restore_model(trained.module_)
    numpy.testing.assert_array_equal(predicted, trained.predict_proba(data()[0]))


def test_callbacks_equal_the_plain_loop():
    callbacks = [GradientNormClipping(0.05), LRScheduler("StepLR", step_size=1, gamma=0.5), EarlyStopping("train_loss")]
    trained = net(callbacks=callbacks).fit(*data())
    assert_same(trained.module_, loop(clip=0.05, schedule=0.5))


def test_rank_m_is_adamw():
    trained = net(module__density=1.0).fit(*data())
    plain = net(skorch.NeuralNetClassifier, module__density=None).fit(*data())
    assert is_converted(trained.module_) and not is_converted(plain.module_)
    assert_same(trained.module_, plain.module_, atol=1e-6)


def test_validation_within_changes_nothing():
    split = skorch.dataset.ValidSplit(4, stratified=False)
    trained, again = net(train_split=split), net(train_split=split)
    trained.fit(*data())
    again.partial_fit(*data(), epochs=1).predict(data()[0])
    again.partial_fit(*data(), epochs=2)
    assert_same(trained.module_, again.module_)


def test_fit_twice_begins_anew():
    trained = net().fit(*data()).fit(*data())
    assert_same(trained.module_, loop())


COPIES = {
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
    "deepcopy": copy.deepcopy,
    "warm start": lambda each: each.set_params(warm_start=True),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_net_trains_on_as_the_original_does(how):
    trained = net(max_epochs=2).fit(*data())
    other = COPIES[how](trained)
    (other.fit if how == "warm start" else other.partial_fit)(*data())
    assert_same(other.module_, loop(epochs=4))
    assert other.optimizer_.grass.step == 24


@pytest.mark.parametrize("safetensors", [False, True])
def test_saved_files_are_plain_and_resume_exactly(tmp_path, safetensors):
    files = {"f_params": tmp_path / "params", "f_history": tmp_path / "history"}
    if not safetensors:  # which has no optimizers, says skorch
        files["f_optimizer"] = tmp_path / "optimizer"
    trained = net(max_epochs=2).fit(*data())
    trained.save_params(**files, use_safetensors=safetensors)
    plain = net(skorch.NeuralNetClassifier, module__density=None).initialize()
    plain.load_params(f_params=files["f_params"], use_safetensors=safetensors)
    assert_same(plain.module_, trained.module_)
    resumed = net().initialize()
    resumed.load_params(**files, use_safetensors=safetensors)
    assert_same(resumed.module_, trained.module_)
    if not safetensors:
        assert_same(resumed.partial_fit(*data()).module_, loop(epochs=5))


def test_checkpoints_of_callbacks_resume_exactly(tmp_path):
    saver = Checkpoint(dirname=str(tmp_path), monitor=None)
    net(max_epochs=2, callbacks=[saver]).fit(*data())
    resumed = net(callbacks=[LoadInitState(Checkpoint(dirname=str(tmp_path), monitor=None))]).fit(*data())
    assert_same(resumed.module_, loop(epochs=5))


def test_clones_and_searches():
    x, y = data()
    search = GridSearchCV(net(max_epochs=1), {"module__density": [0.25, 1.0], "lr": [1e-2]}, cv=2, refit=True)
    search.fit(x, y)
    assert is_converted(search.best_estimator_.module_)
    assert_same(clone(net()).fit(x, y).module_, loop())


def test_a_loss_that_is_not_finite_stops_before_a_weight_changes():
    x, y = data()
    trained = net().fit(x, y)
    before = plain_state(trained.module_)
    x[20, 0] = numpy.nan
    with pytest.raises(FloatingPointError, match="not finite at optimizer step 20, and training stopped before any"):
        trained.partial_fit(x, y)
    assert trained.optimizer_.grass.step == 20
    assert all(value.isfinite().all() for value in plain_state(trained.module_).values())
    assert not torch.equal(plain_state(trained.module_)["first.weight"], before["first.weight"]), "two steps"


def test_a_plain_optimizer_stops_at_the_first_step():
    trained = net(skorch.NeuralNetClassifier).initialize()
    before = plain_state(trained.module_)
    with pytest.raises(RuntimeError, match=r"this AdamW holds the slice of .*grass_optimizer"):
        trained.partial_fit(*data())
    assert all(torch.equal(value, before[name]) for name, value in plain_state(trained.module_).items())


def test_new_settings_of_the_optimizer_reach_it():
    trained = net(max_epochs=1).fit(*data())
    trained.set_params(lr=5e-3)
    trained.partial_fit(*data())
    trained.set_params(optimizer__lr=2.5e-3)
    trained.partial_fit(*data())
    assert_same(trained.module_, loop(schedule=0.5))


def test_the_rate_of_the_slices_alone_can_be_set():
    trained = net(max_epochs=1, module__scale=0.5).fit(*data())
    trained.set_params(lr=4e-3)
    trained.set_params(optimizer__param_groups__1__lr=2e-3)
    assert [group["lr"] for group in trained.optimizer_.param_groups] == [4e-3, 2e-3]


def test_slices_choose_by_the_norms_of_closures():
    before = [slice_.index.clone() for slice_ in grass_slices(Net())]
    trained = net(max_epochs=1).fit(*data())
    assert any(
        not torch.equal(slice_.index, old) for slice_, old in zip(grass_slices(trained.module_), before, strict=True)
    )
