"""What a run must remember to resume bit for bit, inside the optimizer's own state dict.

It travels with the state of each slice's parameter, as the tensors ``grass_*``, and in the parameter groups, as the
JSON text ``grass``: tensors and plain types, so that ``torch.load(weights_only=True)`` reads it, and of a form that
torch.distributed.checkpoint shards, gathers and redistributes like any optimizer state. The model's own checkpoint
stays plain: it holds the weights exactly as the next forward pass would use them.

An engine that keeps slices and optimizer state in files of its own takes the rest with `remember` and `recall`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import Tensor

from ..convert.audit.freeing import freed
from ..convert.record import conversion_of
from ..slices.ops.selection import aligned, strided
from ..slices.ops.sharding import is_sharded, local, shape_of, shard_range, shards, whole, world_size
from ..slices.part import local_part
from ..slices.released import unreleased
from ..slices.slice import Slice
from . import base_record, delta_state
from .controller_protocol import Controller
from .parameter_groups import free_as

logger = logging.getLogger(__name__)

KEY = "grass"
PREFIX = "grass_"
VERSION = 5  # 4 had no "low": whole slices, or none beside the weights
_READ = (4, VERSION)
# Of what is read, and not of what is written: the settings of each slice's parameter group.
ASKED = "asked"


def add(state_dict: dict[str, Any], controller: Controller) -> dict[str, Any]:
    """Add what Grass remembers to an optimizer's state dict; its tensors are references, as the optimizer's own are."""
    slices = {id(slice_.active): slice_ for slice_ in controller.slices}
    state = dict(state_dict["state"])
    for group, packed in zip(controller.optimizer.param_groups, state_dict["param_groups"], strict=True):
        names: list[str | None] = []
        for param, key in zip(group["params"], packed["params"], strict=True):
            slice_ = slices.get(id(param))
            names.append(None if slice_ is None else slice_.state.name)  # a weight that was freed may be among slices
            if slice_ is not None:
                state[key] = {**state.get(key, {}), **_entry(slice_)}
        if any(names):
            packed[KEY] = _meta(controller, names)
    state_dict["state"] = state
    return state_dict


def remember(controller: Controller) -> dict[str, Any]:
    """What Grass remembers beside the slices and the optimizer state; its tensors are references."""
    slices = {}
    for slice_ in controller.slices:
        entry = {key.removeprefix(PREFIX): value for key, value in _entry(slice_).items()}
        slices[slice_.state.name] = {**entry, "active": torch.empty(shape_of(slice_.active), device="meta")}
    return {KEY: _meta(controller, list(slices)), "slices": slices}


def recall(saved: dict[str, Any] | None, controller: Controller) -> None:
    """Put back what `remember` returned; None stands for a checkpoint without it.

    Raises:
        ValueError: as `restore` does.
    """
    meta, entries = _remembered(saved)
    free_as(meta, controller)
    _take_up(_check(meta, entries, controller), entries, controller)


def check_remembered(saved: dict[str, Any] | None, controller: Controller) -> None:
    """What `recall` would raise, for an engine that loads the rest first."""
    _check(*_remembered(saved), controller)


def _remembered(saved: dict[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, dict[str, Tensor]]]:
    if not saved:
        return None, {}
    return read_meta([saved]), saved["slices"]


def restore(state_dict: dict[str, Any], controller: Controller) -> dict[str, Any]:
    """Put it back into the model and the controller, before the optimizer loads the rest.

    Returns:
        The state dict without it.

    Raises:
        ValueError: the state dict was not written by Grass, or by another shape of run. Nothing is changed then.
    """
    meta, entries = read(state_dict)
    free_as(meta, controller)
    unaligned = _take_up(_check(meta, entries, controller, state_dict), entries, controller)
    if unaligned:
        logger.warning(
            "the rows of %d slices do not lie evenly in this run's shards (%s, ...): they start from evenly strided "
            "rows again, without their optimizer state. row_blocks=%d before saving keeps them.",
            len(unaligned),
            unaligned[0],
            max(shards(slice_.active) for slice_ in controller.slices),
        )
    return _stripped(state_dict, set(unaligned))


def read(state_dict: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, dict[str, Tensor]]]:
    """What Grass wrote into a state dict: the common part, None if it wrote nothing, and the tensors by slice."""
    entries: dict[str, dict[str, Tensor]] = {}
    for group in state_dict["param_groups"]:
        if KEY in group:
            slices = (state_dict["state"].get(key, {}) for key in group["params"])
            own = [{k.removeprefix(PREFIX): v for k, v in s.items() if str(k).startswith(PREFIX)} for s in slices]
            names = json.loads(group[KEY])["layers"]
            entries.update((name, entry) for name, entry in zip(names, own, strict=True) if name is not None)
    return read_meta(state_dict["param_groups"]), entries


def read_meta(groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The common part of what Grass wrote into parameter groups, None if it wrote nothing."""
    metas = [json.loads(group[KEY]) for group in groups if KEY in group]
    asked = {name: settings for meta in metas for name, settings in base_record.by_layer(meta).items()}
    return {**metas[-1], ASKED: asked} if metas else None


def _take_up(meta: dict[str, Any], entries: dict[str, dict[str, Tensor]], controller: Controller) -> list[str]:
    """Names of the slices whose rows could not be taken up."""
    ranks = world_size(controller.replicas)
    if (saved := meta.get("ranks", ranks)) != ranks:
        logger.warning(
            "this state was saved by %d rank(s) and goes on on %d: rows and optimizer state go on, the ranks' random "
            "states (dropout) start anew, and batches are the same only if all ranks together take as many sequences.",
            saved,
            ranks,
        )
    controller.step = meta["step"]
    controller.due = set(meta["due"])
    base_record.take_up(meta[ASKED], controller)
    names = {slice_: slice_.state.name for slice_ in controller.slices}
    unaligned = [name for slice_, name in names.items() if not _restore_slice(slice_, entries[name])]
    controller.look_ahead()
    if controller.model is not None:
        delta_state.take_up(meta.get(delta_state.KEY), conversion_of(controller.model))
    return unaligned


def _meta(controller: Controller, names: list[str | None]) -> str:
    meta = {"version": VERSION, "config": controller.config.to_dict(), "step": controller.step}
    if controller.model is not None and (gone := freed(controller.model)):
        meta["freed"] = list(gone)
    meta |= {"due": sorted(controller.due), "layers": names, "ranks": world_size(controller.replicas)}
    if controller.model is not None and (sent := delta_state.saved(conversion_of(controller.model))) is not None:
        meta[delta_state.KEY] = sent
    return json.dumps(meta | {base_record.KEY: base_record.record(controller, names)})


def _stripped(state_dict: dict[str, Any], without_state: set[str]) -> dict[str, Any]:
    state, groups = dict(state_dict["state"]), []
    for group in state_dict["param_groups"]:
        groups.append({k: v for k, v in group.items() if k != KEY})
        names = json.loads(group[KEY])["layers"] if KEY in group else [None] * len(group["params"])
        for name, key in zip(names, group["params"], strict=True):
            rest = {k: v for k, v in state.pop(key, {}).items() if not str(k).startswith(PREFIX)}
            if rest and name not in without_state:
                state[key] = rest
    return {**state_dict, "state": state, "param_groups": groups}


def _entry(slice_: Slice) -> dict[str, Tensor]:
    state, device = slice_.state, slice_.index.device
    held, seen = state.energy or (-1.0, -1.0)  # no energy is negative
    numbers = [state.owed, held, seen, -1.0 if state.reset_step is None else float(state.reset_step)]
    entry = {
        "active": slice_.active.detach(),
        "index": slice_.index,
        # on one device with the rest, which torch.distributed.checkpoint insists on
        "trained": state.trained.to(device),
        "numbers": torch.tensor(numbers, dtype=torch.float64, device=device),
    }
    if slice_.rho is not None and slice_.write is not None:
        entry |= {"rho": slice_.rho, "write": slice_.write}
    if slice_.low is not None:
        entry["low"] = slice_.low
    return {PREFIX + key: value for key, value in entry.items()}


@torch.no_grad()
def _restore_slice(slice_: Slice, entry: dict[str, Tensor]) -> bool:
    """Whether the rows could be taken up; if not, evenly strided ones are."""
    state = slice_.state
    state.owed, held, seen, reset_step = whole(entry["numbers"]).tolist()
    state.recalled = True
    state.trained = whole(entry["trained"]).cpu().clone()
    state.energy = None if held < 0 else (held, seen)
    state.reset_step = None if reset_step < 0 else int(reset_step)
    blocks = slice_.blocks()
    index = whole(entry["index"])
    if blocks > 1 and not aligned(index.cpu(), state.size, blocks):
        slice_.index.copy_(strided(state.size, state.rank, blocks).index)
        if slice_.rho is not None and slice_.write is not None:
            slice_.rho.fill_(1.0)
            slice_.write.fill_(1.0)
        state.reset_step = None
        slice_.reload()
        return False
    slice_.index.copy_(index)
    if slice_.rho is not None and slice_.write is not None:
        slice_.rho.copy_(whole(entry["rho"]))
        slice_.write.copy_(whole(entry["write"]))
    saved = entry["active"]
    if not slice_.resident:
        slice_.take_saved(None if saved.is_meta else whole(saved), entry.get("low"))
        return True
    if saved.is_meta:
        return True  # an engine brings it
    own = local_part(slice_)
    if is_sharded(slice_.active):
        saved = local(saved) if is_sharded(saved) else saved[slice(*shard_range(slice_.active))]
    saved = whole(saved)
    if saved.flatten()[:1].isnan().any():  # it was released when it was saved, so the weight has its values
        saved = unreleased(slice_, own, entry.get("low"))
    own.active.copy_(saved)
    slice_.drift.forget()  # whether they belong to these weights shows when both are loaded
    return True


def check_meta(meta: dict[str, Any] | None, controller: Controller) -> dict[str, Any]:
    """What can be said of a checkpoint without its tensors: by whom it was written, and over which optimizer.

    Returns:
        `meta`, which is not None then.

    Raises:
        ValueError: as `restore` does.
    """
    if meta is None:
        raise ValueError(
            "this optimizer state was not written by a Grass run, it has no 'grass' entry: resume from a checkpoint of "
            "one, or start anew from its weights alone (model_name_or_path)."
        )
    if meta["version"] not in _READ:
        raise ValueError(
            f"this optimizer state has Grass format {meta['version']}, and this grass-hf reads "
            f"{' and '.join(map(str, _READ))}: "
            "resume with the version that wrote it."
        )
    base_record.check(meta, meta[ASKED], controller)
    return meta


def _check(
    meta: dict[str, Any] | None,
    entries: dict[str, dict[str, Tensor]],
    controller: Controller,
    state_dict: dict[str, Any] | None = None,
) -> dict[str, Any]:
    meta = check_meta(meta, controller)
    if base_record.KEY not in meta and state_dict is not None:
        base_record.check_state(state_dict, PREFIX, controller)
    slices = {slice_.state.name: slice_ for slice_ in controller.slices}
    if entries.keys() != slices.keys():
        name = sorted(entries.keys() ^ slices.keys())[0]
        where = "the checkpoint and not in this run" if name in entries else "this run and not in the checkpoint"
        raise ValueError(f"{name} is a Grass layer in {where}: resume with the same target_modules, rank and model.")
    for name, slice_ in slices.items():
        if not {"active", "index", "trained", "numbers"} <= entries[name].keys():
            raise ValueError(
                f"{name} has no rows in this optimizer state, which is incomplete: resume from another one."
            )
        shape = entries[name]["active"].shape
        if shape != (own := shape_of(slice_.active)):
            raise ValueError(
                f"{name} has a slice of shape {tuple(own)} on side={slice_.side!r}, the checkpoint one of "
                f"{tuple(shape)}: resume with the same rank and side."
            )
        if ("rho" in entries[name]) != (slice_.rho is not None):
            raise ValueError(
                f"{name}: the checkpoint was written with selection={meta['config']['selection']!r}, this run has "
                f"{controller.config.selection!r}, and one of them weights its rows: resume with the same selection."
            )
    now = controller.config.to_dict()
    if meta["config"]["side"] != now["side"]:
        raise ValueError(
            f"the checkpoint has slices on side={meta['config']['side']!r}, this run on side={now['side']!r}: resume "
            "with the same rank and side."
        )
    changed = [key for key, value in meta["config"].items() if now.get(key) != value]
    if changed:
        logger.warning(
            "resuming with other settings than the checkpoint's: %s",
            ", ".join(f"{key}={now.get(key)!r} (was {meta['config'][key]!r})" for key in changed),
        )
    return meta
