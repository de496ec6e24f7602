"""The parameter groups in which slices are stepped, and how a weight takes its slice's place among them.

Slices have groups of their own, with ``lr * scale`` and ``weight_decay / scale``. Schedulers keep lists as long as the
list of groups, so a weight that is trained in full later must find a group that exists: the ordinary one that its slice
came from, known by its settings; its slice's own, which becomes ordinary if all of its slices go; or its slice's own as
it is, where that has an ordinary parameter's settings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config.settings import GrassConfig
from ..convert.audit.freeing import free, freed
from ..slices.slice import Slice
from .controller_protocol import Controller
from .driving import plain_class
from .link import Link

# A parameter group that holds slices carries this key; its value is the phase of its layers, or -1 for any.
GROUP_KEY = "grass_phase"
# Beside it, in a group of slices of embeddings and heads where they are stepped as ordinary parameters are.
VOCABULARY_KEY = "grass_vocabulary"

Group = dict[str, Any]


def check(optimizer: torch.optim.Optimizer, config: GrassConfig, leaving: set[nn.Parameter]) -> None:
    """Check that there is a group for every weight whose slice is to leave.

    Args:
        optimizer: that drives the slices.
        config: of the run.
        leaving: the slices' parameters.

    Raises:
        ValueError: there is none.
    """
    for group, members in _leaving(optimizer, leaving):
        _place(optimizer, config, group, members)


def replace(optimizer: torch.optim.Optimizer, config: GrassConfig, weights: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put weights in place of their slices; the number of groups stays, and what the slices' state was is dropped.

    Args:
        optimizer, config: as for `check`.
        weights: by the parameter of its slice.

    Raises:
        ValueError: as `check`.
    """
    places = [
        (group, members, _place(optimizer, config, group, members))
        for group, members in _leaving(optimizer, set(weights))
    ]
    for group, members, place in places:
        if place is group:
            if len(members) == len(group["params"]):
                _make_ordinary(group, config)
            group["params"] = [weights.get(param, param) for param in group["params"]]
        else:
            gone = set(members)
            group["params"] = [param for param in group["params"] if param not in gone]
            place["params"] = [*place["params"], *(weights[param] for param in members)]
        for param in members:
            if optimizer.state.pop(param, None) and (made := _made_with(optimizer, weights[param])):
                optimizer.state[weights[param]] = made


def _made_with(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, Any]:
    """The state that this class gives a parameter when it is made, as Adagrad does; others do it in the first step."""
    kind: Any = plain_class(optimizer)
    known = inspect.signature(kind).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known}
    return kind([weight], **settings).state.get(weight, {})


def _leaving(optimizer: torch.optim.Optimizer, leaving: set[nn.Parameter]) -> list[tuple[Group, list[nn.Parameter]]]:
    found = [(group, [p for p in group["params"] if p in leaving]) for group in optimizer.param_groups]
    return [(group, members) for group, members in found if members]


def _place(optimizer: torch.optim.Optimizer, config: GrassConfig, group: Group, members: list[nn.Parameter]) -> Group:
    if len(members) == len(group["params"]):
        return group
    wanted = ordinary(group, config.scale)
    for other in optimizer.param_groups:
        if GROUP_KEY not in other and _alike(other, wanted):
            return other
    warms_up = config.scale_warmup or config.state_policy == "reset_warmup"
    apart = getattr(optimizer, "vocabulary_apart", False)  # such a one steps slices in another way than the rest
    if config.scale == 1.0 and not warms_up and not apart:
        return group
    raise ValueError("the optimizer has no parameter group with an ordinary parameter's settings")


def ordinary(group: Group, scale: float) -> Group:
    """The settings that the parameters of a slices' group would have without Grass.

    Args:
        group: as it is in an optimizer, or was in a saved one.
        scale: `GrassConfig.scale` of that run.
    """
    settings = {key: value for key, value in group.items() if key not in ("params", GROUP_KEY, VOCABULARY_KEY)}
    if VOCABULARY_KEY in group or scale == 1.0:
        return settings
    for key in ("lr", "initial_lr"):
        if settings.get(key) is not None:
            settings[key] = settings[key] / scale
    if settings.get("weight_decay"):
        settings["weight_decay"] = settings["weight_decay"] * scale
    return settings


def distinct(groups: Iterable[Group]) -> list[Group]:
    """Each group once."""
    return list({id(group): group for group in groups}.values())


def _make_ordinary(group: Group, config: GrassConfig) -> None:
    settings = ordinary(group, config.scale)
    for key in (GROUP_KEY, VOCABULARY_KEY):
        group.pop(key, None)
    group.update(settings)


def _alike(group: Group, wanted: Group) -> bool:
    """Whether a group has these settings, rates up to rounding."""
    if group.keys() - {"params"} != wanted.keys() - {"params"}:
        return False
    return all(_same(group[key], wanted[key]) for key in wanted if key != "params")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        one, other = (v.tolist() if isinstance(v, torch.Tensor) else v for v in (one, other))
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


class LettingGo:
    """The part of `grass_hf.optim.controller.GrassController` by which weights leave Grass."""

    optimizer: torch.optim.Optimizer
    base: torch.optim.Optimizer
    config: GrassConfig
    step: int
    due: set[str]
    link: Link

    def _rounding_seed(self, slice_: Slice) -> str | None:
        if self.config.rounding == "nearest":
            return None
        return f"{self.config.seed}:{self.step}:{slice_.state.name}:rounding"

    def check_let_go(self, slices: list[Slice]) -> None:
        """Check that the weights of these slices can be trained in full from here on.

        Raises:
            ValueError: they cannot; it says why, and nothing has been changed.
        """
        if self.optimizer is not self.base:
            raise ValueError("an engine steps its own copies of the parameters")
        check(self.optimizer, self.config, {slice_.active for slice_ in slices})

    def let_go(self, slices: list[Slice]) -> None:
        """Train the weights of these slices in full from here on, as ordinary parameters.

        Raises:
            ValueError: as `check_let_go`.
        """
        self.check_let_go(slices)
        assert self.link.model is not None  # whose slices they are
        for slice_ in slices:
            slice_.settle_decay(self._rounding_seed(slice_))
        replace(self.optimizer, self.config, dict(free(self.link.model, slices)))
        self.due -= {slice_.state.name for slice_ in slices}
        self.link.refresh()


def free_as(meta: dict[str, Any] | None, controller: Controller) -> None:
    """Free the weights that the saved run had freed (`convert.audit.weight_reads`), so that both have the same slices.

    Raises:
        ValueError: this run cannot, or has them in another place of its optimizer.
    """
    own = {} if controller.model is None else freed(controller.model)
    wanted = set(meta.get("freed", ()) if meta else ()) - own.keys()
    if not wanted:
        return
    slices = [slice_ for slice_ in controller.slices if slice_.state.name in wanted]
    if lacking := sorted(wanted - {slice_.state.name for slice_ in slices}):
        raise ValueError(
            f"{lacking[0]} was a Grass layer when the checkpoint's run began, and it was trained in full because its "
            "model reads it without calling it: resume with the target_modules and exclude_modules of that run."
        )
    try:
        controller.let_go(slices)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint's run has trained {slices[0].state.name} in full, because its model reads it without "
            f"calling it, and this run cannot ({error}): resume as that run was, or start anew from its weights."
        ) from error
