"""What `grass_hf.register` changes: in transformers an enum member, some wrapped methods and a default callback, in
DeepSpeed the function `deepspeed.initialize`, in torch.distributed.checkpoint what loads and saves models, in TRL what
walks over a model's parameters."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

from .marks import is_marked, marked
from .optimizer_name import NAME


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
    if is_marked(trainer):
        return
    marked(trainer)
    trainer.__init__ = _init(trainer.__init__)
    trainer.get_optimizer_cls_and_kwargs = staticmethod(_optimizer_factory(trainer.get_optimizer_cls_and_kwargs))
    trainer.create_optimizer = _create_optimizer(trainer.create_optimizer)
    trainer.train = _train(trainer.train)
    trainer._save_checkpoint = _save_checkpoint(trainer._save_checkpoint)
    trainer._save_rng_state = _save_rng_state(trainer._save_rng_state)
    trainer._load_from_checkpoint = _load_weights(trainer._load_from_checkpoint)
    trainer._load_optimizer_and_scheduler = _load_optimizer(trainer._load_optimizer_and_scheduler)

    from .trainer import FollowTraining

    trainer_module.DEFAULT_CALLBACKS.append(FollowTraining)


def extend_deepspeed(deepspeed: Any) -> None:
    """Let `deepspeed.initialize` leave the slices of a converted model to Grass."""
    original = deepspeed.initialize
    if is_marked(original):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize(*args, **kwargs):
        from .deepspeed import take_over

        return take_over(signature.bind(*args, **kwargs).arguments, original)

    deepspeed.initialize = marked(initialize)


def extend_distributed_checkpoint(state_dict: Any) -> None:
    """Let torch.distributed.checkpoint load and save models whose state dicts have no slices."""
    from .distributed_checkpoint import get_model_state, load_model_state

    if not is_marked(state_dict):
        marked(state_dict)
        state_dict._load_model_state_dict = load_model_state(state_dict._load_model_state_dict, state_dict._get_fqns)
        state_dict._get_model_state_dict = get_model_state(state_dict._get_model_state_dict)


def extend_trl_callbacks(callbacks: ModuleType) -> None:
    """See `trl_callbacks.extend_callbacks`."""
    from . import trl_callbacks

    trl_callbacks.extend_callbacks(callbacks)


def extend_trl_vllm(generation: ModuleType) -> None:
    """See `trl_callbacks.extend_vllm` and `rollouts.trl.extend_generation`."""
    from . import trl_callbacks
    from .rollouts import trl

    trl_callbacks.extend_vllm(generation)
    trl.extend_generation(generation)


def extend_trl_async(trainer_module: ModuleType) -> None:
    """See `rollouts.trl.extend_async`."""
    from .rollouts import trl

    trl.extend_async(trainer_module)


def extend_trl_async_distillation(trainer_module: Any) -> None:
    """See `trl_callbacks.plain_walk`."""
    from .trl_callbacks import plain_walk

    trainer_module._iter_vllm_named_params = plain_walk(trainer_module._iter_vllm_named_params)


def extend_trl_online_dpo(trainer_module: ModuleType) -> None:
    """See `trl_callbacks.extend_online_dpo`."""
    from . import trl_callbacks

    trl_callbacks.extend_online_dpo(trainer_module)


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


def _init(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        from . import trainer

        original(self, *args, **kwargs)
        trainer.follow(self)

    return __init__


def _train(original):
    @functools.wraps(original)
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        from . import checkpoints, first_loss, other_engine, trainer

        if resume_from_checkpoint and trainer.is_grass_run(self):
            resume_from_checkpoint = checkpoints.resume_point(resume_from_checkpoint, self.args.output_dir)
            if isinstance(resume_from_checkpoint, str):
                other_engine.check_engine(self, resume_from_checkpoint)
        if not trainer.may_train_slices(self):
            return original(self, resume_from_checkpoint, *args, **kwargs)
        first_loss.watch_first_step(self)
        try:
            return original(self, resume_from_checkpoint, *args, **kwargs)
        finally:
            first_loss.end_watch(self)

    return train


def _save_checkpoint(original):
    @functools.wraps(original)
    def _save_checkpoint(self, model, trial=None, *args, **kwargs):
        from . import checkpoints, trainer

        if trainer.is_grass_run(self):
            checkpoints.begin_save(self, trial)
        return original(self, model, trial, *args, **kwargs)

    return _save_checkpoint


def _save_rng_state(original):
    @functools.wraps(original)
    def _save_rng_state(self, *args, **kwargs):
        from . import checkpoints, trainer

        original(self, *args, **kwargs)
        if trainer.is_grass_run(self):
            checkpoints.end_save(self)

    return _save_rng_state


def _load_weights(original):
    @functools.wraps(original)
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        from . import other_engine, trainer

        if not trainer.is_grass_run(self):
            return original(self, resume_from_checkpoint, model)
        return other_engine.load_weights(self, resume_from_checkpoint, model, functools.partial(original, self))

    return _load_from_checkpoint


def _load_optimizer(original):
    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self, checkpoint):
        from . import checkpoints, other_engine, trainer

        if checkpoint is None or not trainer.is_grass_run(self):
            return original(self, checkpoint)
        checkpoints.warn_without_optimizer(checkpoint)
        return other_engine.load_optimizer(self, checkpoint, functools.partial(original, self))

    return _load_optimizer_and_scheduler
