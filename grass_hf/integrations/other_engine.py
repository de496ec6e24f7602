"""Resuming on another engine than the one that saved: one process and DDP, FSDP2 with full or with sharded state.

The three write the same things in three forms, which the Trainer does not read across:

    plain    model.safetensors         optimizer.pt     parameters by number
    full     pytorch_model_fsdp.bin    optimizer.bin    whole tensors by name
    sharded  pytorch_model_fsdp_0/     optimizer_0/     shards by name (torch.distributed.checkpoint)

Between full and sharded accelerate's own readers do, told which form they read. Else the checkpoint is read as whole
tensors by name, which torch.distributed.checkpoint's setters bring to any engine; what becomes of rows that do not
lie in the shards is decided where it always is (`grass_hf.optim.resume.restore`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from ..optim.resume import KEY, check_meta, read_meta

logger = logging.get_logger(__name__)

PLAIN, FULL, SHARDED = "plain", "full", "sharded"
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module"}


def check_engine(trainer, checkpoint: str) -> None:
    """Refuse to cross between DeepSpeed and the rest.

    Raises:
        ValueError: one of checkpoint and run is DeepSpeed's, and the other is not.
    """
    zero = os.path.exists(os.path.join(checkpoint, "latest"))
    if zero != trainer.is_deepspeed_enabled:
        wrote, runs = ("DeepSpeed", "without it") if zero else ("another engine", "with DeepSpeed")
        raise ValueError(
            f"{checkpoint} was saved by {wrote}, and this run is {runs}: resume on the engine that saved it, or start "
            "anew from its weights (model_name_or_path)."
        )


def load_weights(trainer, checkpoint: str, model: nn.Module | None, original: Callable) -> None:
    """The Trainer's ``_load_from_checkpoint``, for a checkpoint of any engine."""
    saved, runs = saved_as(checkpoint), runs_as(trainer)
    if saved == runs or runs is None:
        return original(checkpoint, model)
    logger.warning(
        f"{checkpoint} holds {saved} state and is resumed with {runs} state: "
        "rows and optimizer state go on as they were."
    )
    if PLAIN not in (saved, runs):
        with _reading(trainer, saved):
            return original(checkpoint, model)
    model = trainer.model if model is None else model
    weights = _weights(checkpoint, saved) if runs == PLAIN or dist.get_rank() == 0 else {}
    if runs == PLAIN:
        result = model.load_state_dict(weights, strict=False)
    else:
        # here and below not at the top: torch.distributed.checkpoint is not in every build of torch
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        result = set_model_state_dict(model, cast(dict[str, Any], weights), options=options)
    trainer._issue_warnings_after_load(result)


def load_optimizer(trainer, checkpoint: str, original: Callable) -> None:
    """The Trainer's ``_load_optimizer_and_scheduler``, for a checkpoint of any engine."""
    saved, runs = saved_as(checkpoint), runs_as(trainer)
    if saved != PLAIN and runs is not None:
        # torch.distributed.checkpoint looks for this run's state in it, and has no sentence for what is not there
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        check_meta(read_meta(_groups(checkpoint, saved)), optimizer.grass)
    if saved == runs or runs is None or not os.path.isfile(os.path.join(checkpoint, "scheduler.pt")):
        return original(checkpoint)
    if PLAIN not in (saved, runs):
        with _reading(trainer, saved):
            return original(checkpoint)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    model, optimizer = trainer.model_wrapped, trainer.optimizer
    whole = runs != PLAIN
    # with broadcast_from_rank0 the others have none
    state: Any = _optimizer_state(checkpoint, saved, model, optimizer) if not whole or dist.get_rank() == 0 else None
    options = StateDictOptions(full_state_dict=whole, broadcast_from_rank0=whole)
    set_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), state, options=options)
    scheduler = torch.load(os.path.join(checkpoint, "scheduler.pt"), map_location="cpu", weights_only=True)
    trainer.lr_scheduler.load_state_dict(scheduler)


def _groups(checkpoint: str, form: str) -> list[dict[str, Any]]:
    """What Grass wrote into the optimizer's parameter groups of a checkpoint of FSDP2; no tensor is read."""
    if form == FULL:
        return _load(os.path.join(checkpoint, "optimizer.bin"))["param_groups"]
    import torch.distributed.checkpoint as dcp

    folder = os.path.join(checkpoint, "optimizer_0")
    paths = dcp.FileSystemReader(folder).read_metadata().planner_data
    texts: dict[str, Any] = {key: None for key, path in paths.items() if path[-1] == KEY}
    dcp.load(texts, checkpoint_id=folder)
    return [{KEY: text} for text in texts.values()]


def saved_as(checkpoint: str) -> str:
    """In which of the three forms a checkpoint is."""
    if os.path.isdir(os.path.join(checkpoint, "pytorch_model_fsdp_0")):
        return SHARDED
    return FULL if os.path.isfile(os.path.join(checkpoint, "pytorch_model_fsdp.bin")) else PLAIN


def runs_as(trainer) -> str | None:
    """The form that the Trainer's engine reads and writes; None for DeepSpeed, which has its own."""
    if trainer.is_deepspeed_enabled:
        return None
    if not trainer.is_fsdp_enabled:
        return PLAIN
    return FULL if "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type) else SHARDED


@contextlib.contextmanager
def _reading(trainer, form: str) -> Iterator[None]:
    """Let accelerate read the other of FSDP's two forms."""
    plugin = trainer.accelerator.state.fsdp_plugin
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {name: getattr(plugin, name) for name in names}
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(f"{form.upper()}_STATE_DICT")
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)


def _weights(checkpoint: str, form: str) -> dict[str, torch.Tensor]:
    if form == SHARDED:
        return read_sharded(os.path.join(checkpoint, "pytorch_model_fsdp_0"))["model"]
    if form == FULL:
        return _load(os.path.join(checkpoint, "pytorch_model_fsdp.bin"))
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(Path(checkpoint).glob("model*.safetensors")):
        weights.update(load_file(path))
    for path in sorted(Path(checkpoint).glob("pytorch_model*.bin")) if not weights else ():
        weights.update(_load(path))
    return weights


def _optimizer_state(checkpoint: str, form: str, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state with parameters by name."""
    if form == SHARDED:
        return read_sharded(os.path.join(checkpoint, "optimizer_0"))["optimizer"]
    if form == FULL:
        return _load(os.path.join(checkpoint, "optimizer.bin"))
    state = _load(os.path.join(checkpoint, "optimizer.pt"))
    names = {id(param): _plain_name(name) for name, param in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    by_number: dict[Any, str] = {}
    if [len(g["params"]) for g in state["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError(
            f"{checkpoint} was written with other parameter groups than this run has: resume with the same "
            "target_modules, rank and model."
        )
    for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
        by_number.update(zip(saved["params"], (names[id(param)] for param in ours["params"]), strict=True))
        groups.append({**saved, "params": [by_number[number] for number in saved["params"]]})
    return {"state": {by_number[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def read_sharded(folder: str) -> dict[str, Any]:
    """All that torch.distributed.checkpoint wrote into a folder, as whole tensors on the CPU; every rank reads all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(folder).read_metadata()
    flat: dict[str, Any] = {}
    for key, kind in metadata.state_dict_metadata.items():
        if isinstance(kind, TensorStorageMetadata):
            flat[key] = torch.empty(kind.size, dtype=kind.properties.dtype)
        else:
            flat[key] = None
    dcp.load(flat, checkpoint_id=folder)
    nested: dict[Any, Any] = {}
    for key, value in flat.items():
        *path, last = metadata.planner_data[key]
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return _with_lists(nested)


def _with_lists(value: Any) -> Any:
    """Mappings from 0, 1, 2, ... are what lists were flattened to."""
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(entry) for key, entry in value.items()}
    return [made[number] for number in sorted(made)] if made and all(isinstance(key, int) for key in made) else made


def _load(path: str | Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
