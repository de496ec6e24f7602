"""What `grass_hf.register` changes: in transformers an enum member, four wrapped methods and a default callback, in
DeepSpeed the function `deepspeed.initialize`."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType

NAME = "grass"


def extend_optimizer_names(training_args: ModuleType) -> None:
    """Add ``OptimizerNames.GRASS = "grass"``, which both argparse and TrainingArguments validate against."""
    names = training_args.OptimizerNames
    if NAME in names._value2member_map_:
        return
    member = str.__new__(names, NAME)
    member._name_, member._value_ = "GRASS", NAME
    # training_args.bin pickles the member; as the plain string it loads where grass_hf is not installed.
    member.__reduce_ex__ = lambda protocol: (str, (NAME,))
    names._member_names_.append("GRASS")
    names._member_map_["GRASS"] = member
    names._value2member_map_[NAME] = member
    type.__setattr__(names, "GRASS", member)


def extend_trainer(trainer_module: ModuleType) -> None:
    """Let the Trainer build Grass optimizers, and follow every training run of a converted model."""
    trainer = trainer_module.Trainer
    if getattr(trainer, "_grass_hf", False):
        return
    trainer._grass_hf = True
    trainer.get_optimizer_cls_and_kwargs = staticmethod(_optimizer_factory(trainer.get_optimizer_cls_and_kwargs))
    trainer.create_optimizer = _create_optimizer(trainer.create_optimizer)
    trainer._load_optimizer_and_scheduler = _load_optimizer(trainer._load_optimizer_and_scheduler)

    from .trainer import FollowTraining

    trainer_module.DEFAULT_CALLBACKS.append(FollowTraining)


def extend_deepspeed(deepspeed: ModuleType) -> None:
    """Let `deepspeed.initialize` leave the slices of a converted model to Grass."""
    original = deepspeed.initialize
    if hasattr(original, "_grass_hf"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize(*args, **kwargs):
        from .deepspeed import take_over

        return take_over(signature.bind(*args, **kwargs).arguments, original)

    initialize._grass_hf = True
    deepspeed.initialize = initialize


def _optimizer_factory(original):
    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args, model=None):
        from . import trainer

        if args.optim == NAME:
            return trainer.grass_class_and_kwargs(args, model, original)
        cls, kwargs = original(args, model)
        return trainer.driven_if_converted(cls, kwargs, model)

    return get_optimizer_cls_and_kwargs


def _create_optimizer(original):
    @functools.wraps(original)
    def create_optimizer(self, *args, **kwargs):
        from . import trainer

        trainer.convert_rebuilt_model(self)
        trainer.forget_evaluation_of(self)
        optimizer = original(self, *args, **kwargs)
        trainer.attach_if_converted(self)
        return optimizer

    return create_optimizer


def _load_optimizer(original):
    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self, checkpoint):
        from . import trainer

        trainer.check_optimizer_file(self, checkpoint)
        return original(self, checkpoint)

    return _load_optimizer_and_scheduler
