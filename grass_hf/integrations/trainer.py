"""Grass in the Hugging Face Trainer.

Order of events (transformers 4.57 and 5): on_init_end converts the model before anything wraps it, the optimizer
is built over its slices, a checkpoint's optimizer state brings rows and slices back, on_train_begin prints the
table, on_log adds coverage and energy, on_train_end settles the decay that is still owed.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from rich.console import Console
from torch import nn
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from ..config.optim_args import parse_optim_args
from ..config.settings import GrassConfig
from ..convert.conversion import convert_to_grass, converted_part, describe, describe_settings, is_converted
from ..convert.record import conversion_of
from ..optim.controller import GROUP_KEY
from ..optim.factory import attach, grass_optimizer
from ..optim.rate_warmup import scale_reached
from ..slices.ops.sharding import check_agreement
from .accelerate import adapt_to_engine, engine_kind, forget_evaluation, fsdp_version, refuse_parallelism
from .base import base_class_and_kwargs, default_base, driven
from .deepspeed import check_config
from .optimizer_name import NAME
from .start_table import render, start_report

logger = logging.get_logger(__name__)

# With more graphs than these and one or two of evaluation, torch stops compiling (its recompile_limit is 8).
_COMPILED_TURNS = 5
_ENGINES = {
    DistributedType.NO,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_HPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_SDAA,
}


class GrassCallback(TrainerCallback):
    """Converts the Trainer's model, for those who pass objects instead of ``optim="grass"``.

    ``Trainer(..., callbacks=[GrassCallback(GrassConfig(rank=64))])``; the base optimizer is then whatever
    ``TrainingArguments.optim`` or ``optimizer_cls_and_kwargs`` say.

    Args:
        config: settings; None takes the defaults.
    """

    def __init__(self, config: GrassConfig | None = None):
        self.config = config or GrassConfig()

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            _convert(model, self.config, args)


class GrassOptimizerFactory(torch.optim.Optimizer):
    """Builds a driven optimizer for ``Trainer(optimizer_cls_and_kwargs=(GrassOptimizerFactory, kwargs))``.

    The keyword arguments are ``model`` (the Trainer hands it on), ``config`` (a `GrassConfig`), ``base`` (an
    optimizer class, `torch.optim.AdamW` by default) and those of the base class. It is a class only because the
    Trainer wants one: what it returns is an instance of ``base``.

    Example:
        ``(GrassOptimizerFactory, {"model": model, "config": GrassConfig(rank=64), "lr": 1e-3})``
    """

    def __new__(
        cls,
        model: nn.Module,
        config: GrassConfig | None = None,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **kwargs: Any,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(
                "GrassOptimizerFactory needs the model and got parameters: add 'model': model to the keyword "
                "arguments in optimizer_cls_and_kwargs."
            )
        if not is_converted(model):
            convert_to_grass(model, config)
        return grass_optimizer(model, base, replace=True, **kwargs)


class FollowTraining(TrainerCallback):
    """In every Trainer once grass_hf is registered; does nothing for a model that is not converted."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if args.optim == NAME and model is not None:
            _convert(model, _parse(args).config, args)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        controller = _controller(optimizer)
        if not _is_model(model):
            if args.optim == NAME and controller is None:
                raise ValueError(
                    "optim='grass' was asked for, and the Trainer's optimizer drives no Grass slices: a subclass makes "
                    "an optimizer of its own. Let it call super().create_optimizer(), or build the optimizer with "
                    "grass_optimizer(model, ...) after convert_to_grass(model)."
                )
            return
        if controller is None:
            raise ValueError(
                "the model was converted by Grass, but the Trainer's optimizer does not drive its slices: build it "
                "with grass_optimizer(model, ...), or let the Trainer build it."
            )
        if state.is_world_process_zero:
            console = Console(stderr=True)
            if not console.is_terminal:
                console.width = 160  # a log file has no width; no column should wrap
            console.print(render(start_report(model, controller.optimizer, state.max_steps)))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # GradScaler may have skipped the step before, and the Trainer clears gradients through the model.
        controller = _controller(optimizer)
        if controller is not None:
            controller.forget_norms()

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs):
        controller = _controller(optimizer)
        if controller is None or not logs or "loss" not in logs:
            return
        metrics = {name: round(value, 4) for name, value in controller.metrics().items()}
        config = controller.config
        if (config.scale != 1.0 or config.scale_warmup) and "learning_rate" in logs:
            groups = controller.optimizer.param_groups
            slices = next(group["lr"] for group in groups if GROUP_KEY in group)
            # The Trainer logs the first group's rate, of the step just done; the groups hold the next step's by now.
            share = slices / groups[0]["lr"] if groups[0]["lr"] else config.scale
            share *= scale_reached(config.scale_warmup, controller.step - 1)
            metrics["grass/learning_rate"] = float(logs["learning_rate"] * share)
        logs.update(metrics)
        if state.log_history:  # the Trainer filed a copy before it called us
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        controller = _controller(optimizer)
        if controller is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # the Trainer has just put the best checkpoint's weights in place: what rows were owed since is void
            for part in controller.slices:
                part.state.owed = 1.0
        controller.settle()


def grass_class_and_kwargs(args, model: nn.Module | None, factory) -> tuple[type, dict[str, Any]]:
    """What the Trainer builds its optimizer from when ``optim="grass"``; converts the model if need be."""
    if model is None:
        raise ValueError("optim='grass' needs the model: call get_optimizer_cls_and_kwargs(args, model).")
    parsed = _parse(args)
    # sentence-transformers hands over its loss, which holds the model
    model = converted_part(model) or model
    _convert(model, parsed.config, args)
    cls, kwargs = base_class_and_kwargs(args, parsed.base or default_base(), parsed.base_args, factory)
    return driven(cls, kwargs, model), kwargs


def driven_if_converted(cls, kwargs: dict[str, Any], model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """Leave another optimizer's class alone, unless a `GrassCallback` has converted the model it is for."""
    part = converted_part(model) if isinstance(model, nn.Module) else None
    return (cls, kwargs) if part is None else (driven(cls, kwargs, part), kwargs)


def follow(trainer) -> None:
    """Give a new Trainer the callback that it lacks where a tool has put its own list in place of DEFAULT_CALLBACKS.

    ms-swift does.
    """
    if not any(isinstance(callback, FollowTraining) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(FollowTraining)
        FollowTraining().on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def convert_rebuilt_model(trainer) -> None:
    """Convert a model that the Trainer was given after it was made, by `model_init` or as ``trainer.model``, before its
    parameters are sorted into groups."""
    if not isinstance(trainer.model, nn.Module) or converted_part(trainer.model) is not None:
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (FollowTraining, GrassCallback)):
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def forget_evaluation_of(trainer) -> None:
    """See `accelerate.forget_evaluation`; for the Trainer's model."""
    if _is_model(trainer.model) and trainer.model_wrapped is trainer.model:
        forget_evaluation(trainer.accelerator, trainer.model)


def attach_if_converted(trainer) -> None:
    """Catch optimizers that came another way (``optimizers=``, ``optimizer_cls_and_kwargs``)."""
    if not _is_model(trainer.model) or _controller(trainer.optimizer) is not None:
        return
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "the optimizer in optimizers=(...) does not drive the Grass slices, and its scheduler is made already: "
            "build the optimizer with grass_optimizer(model, ...) and the scheduler over it."
        )
    attach(trainer.optimizer, trainer.model, replace=True)


def is_grass_run(trainer) -> bool:
    """Whether a Trainer trains, or is about to train, slices."""
    factory = getattr(trainer, "optimizer_cls_and_kwargs", None) or (None,)
    return _is_model(trainer.model) or _controller(trainer.optimizer) is not None or factory[0] is GrassOptimizerFactory


def may_train_slices(trainer) -> bool:
    """Whether a run that begins may be one of slices, `model_init`'s models included."""
    callbacks = trainer.callback_handler.callbacks
    asked = trainer.args.optim == NAME or any(isinstance(callback, GrassCallback) for callback in callbacks)
    return asked or is_grass_run(trainer)


def _parse(args):
    targets = {} if args.optim_target_modules is None else {"target_modules": args.optim_target_modules}
    return parse_optim_args(args.optim_args, **targets)


def _convert(model: nn.Module, config: GrassConfig, args) -> None:
    """Convert once: the Trainer asks when it is made, and again for a model that `model_init` rebuilt."""
    _refuse_engine(args, config)
    refuse_parallelism()
    config = adapt_to_engine(config, model)
    if is_converted(model):
        if conversion_of(model).config != config:
            raise ValueError(
                f"the model is converted with {conversion_of(model).config}, and now {config} is asked for: keep one."
            )
        return
    # before a model that ZeRO-3 has split up is gathered, module by module
    check_agreement("conversion", describe_settings(config))
    convert_to_grass(model, config)
    # before DDP or FSDP compare parameters in their own words, or wait for each other
    check_agreement("conversion", describe(model))


def _refuse_engine(args, config: GrassConfig) -> None:
    kind = engine_kind()
    if kind == DistributedType.DEEPSPEED:
        check_config(AcceleratorState().deepspeed_plugin.deepspeed_config, config)
    if kind == DistributedType.FSDP and fsdp_version() != 2:
        raise ValueError(
            "grass-hf does not run under FSDP1, which flattens parameters: use FSDP2 (fsdp_version: 2 in the "
            "accelerate config), or DDP."
        )
    elif kind not in _ENGINES:
        engine = str(kind.value)
    elif args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs and the Trainer would use nn.DataParallel, which copies slices to "
            "threads: start with `accelerate launch` (one process per GPU), or set CUDA_VISIBLE_DEVICES=0."
        )
    else:
        engine = None
    if engine:
        raise ValueError(f"grass-hf does not run under {engine} yet: use DDP (accelerate launch --multi_gpu) or FSDP2.")
    if not config.resident and args.torch_compile:
        raise ValueError(
            "resident=False with torch_compile=True would compile again for slices without memory: use resident=True."
        )
    if args.torch_compile and config.stagger > _COMPILED_TURNS:
        raise ValueError(
            f"stagger={config.stagger} with torch_compile=True would compile a graph for each of its steps, and torch "
            f"stops at 8: use stagger={GrassConfig.stagger}, or 1 for two graphs."
        )


def _is_model(model: Any) -> bool:
    return isinstance(model, nn.Module) and is_converted(model)


def _controller(optimizer: Any):
    """The controller of an optimizer, also behind accelerate's wrapper."""
    return getattr(optimizer, "grass", None) or getattr(getattr(optimizer, "optimizer", None), "grass", None)
