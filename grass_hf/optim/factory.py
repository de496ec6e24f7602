"""`grass_optimizer`: a stock optimizer over the slices and the ordinary parameters of a converted model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..convert.audit import watching
from ..convert.audit.freeing import freed
from ..convert.conversion import grass_slices, is_converted
from ..convert.record import conversion_of
from ..slices.drift import check_shape
from .controller import GrassController
from .parameter_groups import GROUP_KEY, VOCABULARY_KEY


def grass_optimizer(
    model: nn.Module,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    params: Iterable[Any] | None = None,
    replicas: dist.ProcessGroup | None = None,
    replace: bool = False,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer for a converted model; its `step` also writes the slices back and selects rows.

    Args:
        model: converted by `convert_to_grass`, not yet wrapped.
        optimizer_class: any `torch.optim.Optimizer` class whose state is per parameter.
        params: parameter groups, to give some parameters other settings; None means all trainable parameters.
        replicas: process group of the ranks that hold this same model, where not all do: for the stages of a pipeline
            ``mesh["dp"].get_group()``. They choose rows together. None means all ranks.
        replace: take the slices over from the optimizer that drives them, which refuses to step from then on.
        kwargs: of the class: ``lr``, ``weight_decay`` and so on.

    Returns:
        An instance of `optimizer_class` (of a subclass of it that drives slices, see `optim.driving`); its attribute
        ``grass`` is the `GrassController`.

    Raises:
        ValueError: the model is not converted, another optimizer drives its slices, or this one cannot.
    """
    _require_converted(model)
    _refuse(optimizer_class)
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    if not replace:
        conversion_of(model).refuse_second()
    optimizer = optimizer_class(params, **kwargs)
    attach(optimizer, model, replicas, replace=replace)
    return optimizer


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    replicas: dist.ProcessGroup | None = None,
    *,
    replace: bool = False,
) -> GrassController:
    """Let an optimizer made over a converted model's parameters drive its slices; once is enough.

    The slices move to parameter groups of their own, after the ordinary ones, with ``lr * scale`` and
    ``weight_decay / scale``: alpha multiplies what the gradient does, not the decay. An optimizer that is of another
    kind over slices of embeddings and heads says so by ``vocabulary_apart = True``; theirs is the ordinary rate then.

    Raises:
        ValueError: the model is not converted, the optimizer lacks the slices, it cannot drive them, or another one
            does and is not to be replaced.
    """
    _require_converted(model)
    existing = getattr(optimizer, "grass", None)
    if existing is not None:
        if existing.link.conversion is not conversion_of(model):
            raise ValueError(
                "this optimizer already drives another model's slices, or those that this model had before it was "
                "restored: make one optimizer per model, with grass_optimizer(model, ...)."
            )
        return existing
    _refuse(type(optimizer))
    _check_holds(optimizer, model)
    if not replace:
        conversion_of(model).refuse_second()
    watching.begin(model)
    _split_groups(optimizer, model)
    return GrassController(model, optimizer, replicas, replace=replace)


def _check_holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that an optimizer holds every slice, and every weight that was freed."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for slice_ in grass_slices(model):
        check_shape(slice_)
        if not slice_.active.requires_grad:
            raise ValueError(
                f"{slice_.state.name} was frozen after the conversion, and its slice with it: freeze what is not to be "
                "trained before convert_to_grass (before the Trainer is made), which leaves it out then; or name it in "
                "exclude_modules, and freeze it."
            )
        if id(slice_.active) not in held:
            raise ValueError(
                f"the optimizer does not hold the slice of {slice_.state.name}: make it after convert_to_grass, "
                "over the model's trainable parameters."
            )
        slice_.check_sharding()
        slice_.check_rows()
    for name, weight in freed(model).items():
        if id(weight) not in held:
            raise ValueError(
                f"the optimizer does not hold the weight of {name}, which is trained in full since the model's first "
                "forward: make it after that, over the model's trainable parameters."
            )


def _split_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    config = conversion_of(model).config
    # Staggered layers warm up at different times, and a learning rate belongs to a group.
    per_phase = config.stagger > 1 and config.state_policy == "reset_warmup"
    apart = getattr(optimizer, "vocabulary_apart", False)
    kinds = {
        id(slice_.active): (apart and slice_.vocabulary, slice_.state.phase if per_phase else -1)
        for slice_ in grass_slices(model)
    }
    frozen = {id(slice_.weight) for slice_ in grass_slices(model)}
    for group in list(optimizer.param_groups):
        # model.parameters() has the weights of slices too, and so do tools that ask for it (skorch)
        _take_out(group, frozen)
        slices = defaultdict(list)
        for param in group["params"]:
            if id(param) in kinds:
                slices[kinds[id(param)]].append(param)
        if not slices:
            continue
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        scaled = settings | _scaled(group, config)
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        _take_out(group, kinds.keys())
        for (is_vocabulary, phase), members in sorted(slices.items()):
            own = {**settings, VOCABULARY_KEY: True} if is_vocabulary else scaled
            params = [(names[id(param)], param) for param in members] if names else members
            optimizer.add_param_group({**own, "params": params, GROUP_KEY: phase})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _take_out(group: dict[str, Any], gone: Container[int]) -> None:
    kept = [number for number, param in enumerate(group["params"]) if id(param) not in gone]
    for key in group.keys() & {"params", "param_names"}:
        group[key] = [group[key][number] for number in kept]


def _scaled(group: dict[str, Any], config) -> dict[str, Any]:
    if group.get("lr") is None:
        for name, neutral in (("scale", 1.0), ("scale_warmup", 0)):
            if (value := getattr(config, name)) != neutral:
                raise ValueError(
                    f"{name}={value} changes a learning rate, and this optimizer sets its own (lr=None): give a "
                    f"learning rate, or {name}={neutral}."
                )
        if config.decay == "all" and group.get("weight_decay"):
            raise ValueError(
                "decay='all' needs to know the learning rate, and this optimizer sets its own (lr=None): give a "
                "learning rate, or decay='active'."
            )
        return {}
    if config.scale == 1.0:
        return {}
    scaled = {"lr": group["lr"] * config.scale}
    if group.get("weight_decay"):
        scaled["weight_decay"] = group["weight_decay"] / config.scale
    return scaled


def _require_converted(model: nn.Module) -> None:
    if not is_converted(model):
        raise ValueError(
            f"{type(model).__name__} is not converted: call convert_to_grass(model, GrassConfig(...)) first, on the "
            "model itself, before any wrapper."
        )


def _refuse(optimizer_class: type) -> None:
    name = getattr(optimizer_class, "__name__", str(optimizer_class))
    module = getattr(optimizer_class, "__module__", "") or ""
    reason = None
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        reason = "is not a torch.optim.Optimizer class, so nothing can follow its step"
    elif issubclass(optimizer_class, torch.optim.LBFGS):
        reason = "keeps one flat history over all parameters, so rows cannot be exchanged"
    elif module.startswith("schedulefree") or "ScheduleFree" in name:
        reason = "moves parameters outside its step, so the slices and the weights would part"
    elif "offload" in name.lower():
        reason = "steps on CPU copies of the parameters and runs no hooks"
    elif any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in optimizer_class.__mro__):
        reason = "steps on each rank over some parameters only, in groups that it has made when it was made"
    elif "lomo" in name.lower():
        reason = "updates weights during backward from their full gradients, which Grass never forms"
    if reason:
        raise ValueError(f"{name} {reason}: use AdamW, Adafactor, Lion, SGD, an 8-bit AdamW or the like.")
