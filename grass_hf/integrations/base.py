"""Base optimizers by the Trainer's own names, built by the Trainer's own factory."""

from __future__ import annotations

import ast
import copy
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames, TrainingArguments

from ..config.fields import unknown_key
from ..config.optim_args import parse_optim_args
from ..optim.factory import attach
from ..optim.muon import MuonAdamW

# Families that cannot run over slices, by the start of their Trainer name.
_REFUSED = {
    "grass": "is not a base optimizer of itself",
    "galore": "projects full gradients itself, which Grass never forms",
    "apollo": "projects full gradients itself, which Grass never forms",
    "lomo": "updates weights during backward from their full gradients, which Grass never forms",
    "adalomo": "updates weights during backward from their full gradients, which Grass never forms",
    "schedule_free": "moves parameters outside its step, so the slices and the weights would part",
}
# Ours: the Trainer has no name for it.
MUON = "muon"
_ADVICE = "use adamw_torch, adamw_torch_8bit, adafactor, lion_32bit, sgd or the like"


def default_base() -> str:
    """The optimizer that the installed Trainer itself uses by default."""
    return str(getattr(TrainingArguments, "default_optim", "adamw_torch"))


def check_base(base: str, setting: str) -> None:
    """Refuse a base optimizer that is unknown or cannot run over slices; `setting` is what names it in the sentence."""
    for family, reason in _REFUSED.items():
        if base == family or base.startswith(family + "_"):
            raise ValueError(f"{setting}={base} {reason}: {_ADVICE}.")
    names = [name.value for name in OptimizerNames if not any(name.value.startswith(family) for family in _REFUSED)]
    names.append(MUON)
    if base not in names:
        raise ValueError(f"{setting}: " + unknown_key(base, names, "an optimizer of the installed Trainer"))


def base_class_and_kwargs(
    args: TrainingArguments, base: str, base_args: dict[str, str], factory: Callable
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and arguments of a base optimizer, with betas, eps and fused as the training arguments say.

    Args:
        args: of the run.
        base: a Trainer name, "adamw_torch" say, or "muon".
        base_args: its own arguments as text; those the Trainer's factory does not read are passed to the class.
        factory: the Trainer's ``get_optimizer_cls_and_kwargs``.

    Raises:
        ValueError: the name or an argument is unknown, or the optimizer cannot run over slices.
    """
    check_base(base, "optim_args: base")

    def build(base_args: dict[str, str]):
        plain = copy.copy(args)
        plain.optim = OptimizerNames("adamw_torch_fused" if base == MUON else base)
        plain.optim_args = ",".join(f"{key}={value}" for key, value in base_args.items()) or None
        cls, kwargs = factory(plain, None)
        return MuonAdamW if base == MUON else cls, dict(kwargs)

    cls, defaults = build({})
    accepted = inspect.signature(cls).parameters
    read, passed = {}, {}
    for key, text in base_args.items():
        # the Trainer's factory splits its text at every comma
        if "," not in text and build({key: text})[1] != defaults:
            read[key] = text
        elif key in accepted:
            passed[key] = _literal(text)
        else:
            raise ValueError(f"optim_args: base.{unknown_key(key, accepted, f'an argument of {cls.__name__}')}")
    return cls, build(read)[1] | passed


def with_base(settings: str | None, optim: str) -> str | None:
    """What ``--optim_args`` says, with the base optimizer that a tool's own ``--optim`` says, as in ms-swift.

    Args:
        settings: ``key=value,key=value``, or a mapping as JSON.
        optim: a Trainer name. The Trainer's default says nothing: then ``base=`` or a preset may name one.

    Raises:
        ValueError: both name one, or a setting is wrong.
    """
    base = parse_optim_args(settings).base
    if optim in (base, default_base()):
        return settings
    if base is not None:
        raise ValueError(f"--optim {optim} and base={base} in --optim_args name two base optimizers: keep one.")
    if settings and settings.lstrip().startswith("{"):
        return json.dumps({**json.loads(settings), "base": optim})
    return ",".join(filter(None, (settings, f"base={optim}")))


def driven(cls: Any, kwargs: dict[str, Any], model: nn.Module) -> type[torch.optim.Optimizer]:
    """A class to call in place of `cls`: the instance it returns is one of `cls` that drives the model's slices.

    A class because the Trainer takes any other callable for a factory over models.
    """
    is_optimizer = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if not is_optimizer or kwargs.keys() & {"params", "model", "optimizer_dict"}:
        name = getattr(cls, "__name__", cls)
        raise ValueError(f"{name} takes the model apart itself and cannot run over Grass slices: {_ADVICE}.")

    def __new__(_, params, **settings):
        optimizer = cls(params, **settings)
        attach(optimizer, model, replace=True)
        return optimizer

    # The module's name stays: by it the Trainer recognises bitsandbytes and keeps embeddings in 32 bits.
    return type(f"Grass{cls.__name__}", (torch.optim.Optimizer,), {"__new__": __new__, "__module__": cls.__module__})


def _literal(text: str) -> Any:
    if text.lower() == "null":  # a YAML file's None that a tool has made text of
        return None
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value  # betas
