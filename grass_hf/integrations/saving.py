"""Writing a plain checkpoint one shard at a time.

`save_pretrained` asks a model for its whole state dict first. Weights in int8 become plain ones there, all of them at
once: of 13 billion parameters 26 GB, beside the 13 GB that are trained. Here modules are asked one after the other, and
no more than a shard of plain tensors exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..convert.conversion import grass_slices
from ..slices.ops.grouping import groups_by_size
from ..slices.ops.sharding import is_partitioned, is_sharded

_NAME, _INDEX = "model.safetensors", "model.safetensors.index.json"


def save_plain(model: nn.Module, folder: str | Path, *, max_shard_size: int = 2 * 10**9) -> None:
    """Write the checkpoint that `save_pretrained` would write, with one shard in memory.

    Args:
        model: a `PreTrainedModel` in one process, converted or not; it is left as it is.
        folder: made if need be; a checkpoint in it is replaced once the new one is complete.
        max_shard_size: bytes of a file, and of plain tensors that exist at a time (twice: safetensors copies them once
            more); a larger tensor gets a file of its own.

    Raises:
        ValueError: the model is no `PreTrainedModel`, it is sharded, or transformers stores its weights under
            other names than the model has.
    """
    _check(model)
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} is not a positive number of bytes: 2 * 10**9 is 2 GB.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names: list[list[str]] = []
    size = 0
    for shard in _shards(_tensors(model), max_shard_size):
        save_file(shard, folder / f".part-{len(names)}", metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in shard.values())
        names.append(list(shard))
    for old in (*folder.glob("model*.safetensors"), folder / _INDEX):
        old.unlink(missing_ok=True)
    files = [f"model-{n + 1:05}-of-{len(names):05}.safetensors" for n in range(len(names))] if names[1:] else [_NAME]
    for number, file in enumerate(files):
        (folder / f".part-{number}").rename(folder / file)
    if len(files) > 1:
        places = {name: file for file, own in zip(files, names, strict=True) for name in own}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _save_configs(model, folder)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and plain tensors as in the state dict, a tied one under its first name; made as they are asked for."""
    ignored = set(model._keys_to_ignore_on_save or ())
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        again = {leaf for leaf, param in module._parameters.items() if id(param) in seen}
        seen.update(id(param) for param in module._parameters.values() if param is not None)
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, prefix and f"{prefix}.", False)
        for name in list(own):
            tensor = own.pop(name)
            if name not in ignored and name.rpartition(".")[2] not in again:
                yield name, tensor


def _shards(tensors: Iterator[tuple[str, Tensor]], largest: int) -> Iterator[dict[str, Tensor]]:
    contiguous = ((name, tensor.contiguous()) for name, tensor in tensors)
    return map(dict, groups_by_size(contiguous, lambda named: named[1].nbytes, largest))


def _save_configs(model: Any, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _check(model: Any) -> None:
    kind = type(model).__name__
    if not all(hasattr(model, name) for name in ("config", "can_generate", "_keys_to_ignore_on_save")):
        raise ValueError(f"{kind} is no model of transformers: save its state_dict() instead.")
    if any(is_sharded(slice_.active) or is_partitioned(slice_.active) for slice_ in grass_slices(model)):
        raise ValueError(f"{kind} is sharded, and a rank has only its part of it: use save_pretrained.")
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return  # before transformers 5 models were stored as they are
    names = {name: torch.empty(0, device="meta") for name, _ in model.named_parameters()}
    try:
        same = revert_weight_conversion(model, dict(names)).keys() == names.keys()
    except Exception:  # it takes tensors apart that are none
        same = False
    if not same:
        raise ValueError(
            f"transformers stores the weights of {kind} under other names than the model has: use save_pretrained."
        )
