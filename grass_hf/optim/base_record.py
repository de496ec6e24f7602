"""The optimizer that stepped over the slices, as a checkpoint remembers it: may this run's go on from its state?

Optimizers load any state dict that has as many parameters: torch's take up foreign state, and overwrite the settings of
their parameter groups by those of the checkpoint, without a word. So a run that asks for other betas than the
checkpoint's would go on with the checkpoint's. Here both are compared before anything is loaded:

    the class, and how many bits its state has     another one keeps other state: the run stops
    settings of the slices' parameter groups       the checkpoint's would win: the run stops
    the learning rate                              a schedule's: the checkpoint's goes on, with a warning
    fused, foreach and the like                    only say how a step is computed: any go

What is compared is what either run *asked for* when it made its optimizer: a schedule may have changed a group since.
"""

from __future__ import annotations

import collections
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from .controller_protocol import Controller
from .driving import plain_class
from .parameter_groups import ordinary

logger = logging.getLogger(__name__)

KEY = "base"
_LR = "lr"
# Of a parameter group: what says whose it is, and how a step is computed but not what.
_NOT_COMPARED = {"params", "param_names", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
# Attributes by which classes of torchao and bitsandbytes keep their state in other bits.
_BITS = ("optim_bits", "min_8bit_size", "block_wise", "block_size")
# Packages whose steps may be tried on a small parameter: no kernel is compiled for it, no device is needed.
_TRIED = {"torch", "transformers", "grass_hf"}
_ANEW = "or start anew from its weights (model_name_or_path)"


def asked(controller: Controller) -> dict[str, dict[str, Any]]:
    """Settings of every slice by its name, as plain types: those of its parameter group, as they are now."""
    settings = {}
    groups = controller.groups()
    for slice_ in controller.slices:
        group = groups[id(slice_.active)]
        own = {key: _plain(value) for key, value in group.items() if not _is_ours(key) and key not in _NOT_COMPARED}
        if "weight_decay" in own:
            own["weight_decay"] = ordinary(group, controller.config.scale)["weight_decay"]
        settings[slice_.state.name] = own
    return settings


def record(controller: Controller, names: list[str | None]) -> dict[str, Any]:
    """What a checkpoint says of the optimizer, in plain types.

    Args:
        names: of the slices that are spoken of; ``of`` numbers their settings in this order.
    """
    distinct: list[dict[str, Any]] = []
    numbers = []
    for name in names:
        settings = {} if name is None else controller.asked[name]  # of a weight that stays among slices
        if settings not in distinct:
            distinct.append(settings)
        numbers.append(distinct.index(settings))
    base = controller.base
    return {
        "class": _name(base),
        "bits": _bits(base),
        "dtypes": _dtypes(controller),
        "settings": distinct,
        "of": numbers,
    }


def by_layer(meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that `record` wrote, by the names of the slices; nothing of a checkpoint before there was one."""
    saved = meta.get(KEY)
    if not saved:
        return {}
    return {name: saved["settings"][number] for name, number in zip(meta["layers"], saved["of"], strict=True)}


def check(meta: dict[str, Any], settings: dict[str, dict[str, Any]], controller: Controller) -> None:
    """Compare a checkpoint's optimizer with this run's; see the table above.

    Args:
        meta: what the checkpoint has in common for all slices.
        settings: by the names of slices, `by_layer` of all its parts.

    Raises:
        ValueError: the run asks for something else than would run.
    """
    saved = meta.get(KEY)
    if not saved:
        return
    name_now = _name(controller.base)
    if not _same_class(saved["class"], name_now):
        raise ValueError(
            f"the checkpoint's optimizer state is that of {saved['class']}, and this run has {name_now}, which "
            f"keeps other state: resume with the base optimizer that wrote it, {_ANEW}."
        )
    changes = _changes(saved["bits"], _bits(controller.base))
    rates: dict[str, tuple[Any, Any]] = {}
    for name, before in settings.items():
        for key, pair in _changes(before, controller.asked.get(name, before)).items():
            (rates if key == _LR else changes).setdefault(key, pair)
    if changes:
        wanted = ", ".join(f"{key}={_shown(here)}" for key, (_, here) in changes.items())
        written = ", ".join(f"{key}={_shown(there)}" for key, (there, _) in changes.items())
        raise ValueError(
            f"resuming with {wanted}, and the checkpoint was written with {written}, with which its optimizer state "
            f"would go on: resume with the same, {_ANEW}."
        )
    for there, here in rates.values():
        logger.warning(
            "resuming with lr=%s, and the checkpoint was written with lr=%s: the checkpoint's learning rate and its "
            "schedule go on. For another one change optimizer.param_groups after loading, or start anew from its "
            "weights.",
            here,
            there,
        )


def take_up(settings: dict[str, dict[str, Any]], controller: Controller) -> None:
    """Remember that the checkpoint's learning rate goes on, so that it is said again when this run is resumed."""
    for name, own in controller.asked.items():
        if _LR in settings.get(name, {}):
            own[_LR] = settings[name][_LR]


def keep_dtypes(state_dict: dict[str, Any], meta: dict[str, Any] | None, controller: Controller) -> None:
    """Give optimizer state back the digits with which it was saved, after the optimizer has loaded it.

    torch casts state to its parameter's dtype, and so takes digits from what an optimizer keeps in float32 over
    parameters in half precision (Adafactor's statistics, NAdam's product of momenta): its plain resume is not exact.
    """
    base = controller.base
    if not meta or meta.get(KEY, {}).get("dtypes") != _dtypes(controller):
        return  # it belongs to parameters of another dtype
    for own, saved in zip(base.param_groups, state_dict["param_groups"], strict=True):
        for param, number in zip(own["params"], saved["params"], strict=True):
            state = base.state.get(param, {})
            for key, value in state_dict["state"].get(number, {}).items():
                loaded = state.get(key)
                if type(loaded) is type(value) and isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    state[key] = value.detach().to(loaded.device, copy=True)


def _dtypes(controller: Controller) -> list[str]:
    groups = controller.base.param_groups
    return sorted({str(controller.stepped_dtype(param)) for group in groups for param in group["params"]})


def check_state(state_dict: dict[str, Any], key: str, controller: Controller) -> None:
    """Compare the state itself, for a checkpoint that does not say which optimizer wrote it.

    Args:
        state_dict: of the optimizer.
        key: the first letters of what Grass added to the state of a slice, which is passed over.

    Raises:
        ValueError: the state of a parameter has other names than this run's optimizer would give it.
    """
    base, saved = controller.base, state_dict["param_groups"]
    own = base.param_groups
    if plain_class(base).__module__.partition(".")[0] not in _TRIED:
        return
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
        return  # torch has a sentence for this
    # the first parameter of a group speaks for it
    dims = [group["params"][0].dim() for group in own]
    # settings of another class may be of no use to this one
    names = _state_names(base, [{**ours, **theirs} for ours, theirs in zip(own, saved, strict=True)], dims)
    for group, expected in zip(saved, names or _state_names(base, own, dims) or (), strict=False):
        state = state_dict["state"].get(group["params"][0], {})
        kept = {str(name) for name in state if not str(name).startswith(key)}
        if kept and kept != expected:
            raise ValueError(
                f"the checkpoint's optimizer state has {', '.join(sorted(kept))}, and that of {_name(base)} has "
                f"{', '.join(sorted(expected)) or 'nothing'}: resume with the base optimizer that wrote it, {_ANEW}."
            )


def _state_names(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], dims: list[int]
) -> list[set[str]] | None:
    """Names of the state that an optimizer makes under these groups' settings, by one step of a copy of it over a small
    parameter for each, of so many dimensions; None where that fails."""
    cls: Any = plain_class(optimizer)
    params = [nn.Parameter(torch.ones((2,) * number)) for number in dims]
    for param in params:
        param.grad = torch.ones_like(param)
    copy = cls.__new__(cls)
    copy.__dict__.update({key: value for key, value in vars(optimizer).items() if key not in ("step", "grass")})
    copy._optimizer_step_pre_hooks, copy._optimizer_step_post_hooks = collections.OrderedDict(), {}
    copy.state = collections.defaultdict(dict)
    copy.param_groups = [{**group, "params": [param]} for group, param in zip(groups, params, strict=True)]
    try:
        cls.step(copy)
    except Exception:
        return None
    return [set(copy.state[param]) for param in params]


def _name(optimizer: torch.optim.Optimizer) -> str:
    cls = plain_class(optimizer)
    return f"{cls.__module__}.{cls.__qualname__}"


def _same_class(saved: str, now: str) -> bool:
    """Whether two full names are one class: packages move their modules, and a script is ``__main__`` or imported."""
    roots = {name.partition(".")[0] for name in (saved, now)}
    return saved.rpartition(".")[2] == now.rpartition(".")[2] and (len(roots) == 1 or "__main__" in roots)


def _bits(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    places = (optimizer, getattr(optimizer, "args", None))
    return {key: _plain(getattr(place, key)) for key in _BITS for place in places if hasattr(place, key)}


def _changes(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two records have both, and of different values; what only one has, another version of a package added."""
    return {key: (there[key], here[key]) for key in there if key in here and not _equal(there[key], here[key])}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    numbers = all(isinstance(value, (int, float)) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else one == other


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back; what has no form there is the name of its class."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def _shown(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list) else repr(value)


def _is_ours(key: str) -> bool:
    return str(key).startswith("grass")
