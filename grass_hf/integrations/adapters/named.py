"""A checkpoint's tensors under the names that its model has for them.

transformers 5 stores some models otherwise than it builds them (a mixture's experts one by one, GPT-NeoX's head as
``embed_out``) and converts on loading and saving. Its own conversions are used here, tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import Checkpoint


class NamedWeights:
    """Weights of a checkpoint by parameter name; each is made when it is asked for.

    Args:
        checkpoint: the files.
        model: its model, on the meta device.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel):
        self._makers = _converted(checkpoint, model)

    @property
    def names(self) -> list[str]:
        return list(self._makers)

    def get(self, name: str) -> Tensor | None:
        return self._makers[name]() if name in self._makers else None


def _converted(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 builds models as it stores them
        return {_prefixed(name, model): partial(checkpoint.tensor, name) for name in checkpoint.names}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = model.state_dict()
    makers: dict[str, Callable[[], Tensor]] = {}
    joined: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(checkpoint.names, key=_natural):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if pattern is None:
            makers[name] = partial(checkpoint.tensor, stored)
        else:
            joined.setdefault(name, []).append((stored, pattern))

    def convert(name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        entry = copy.deepcopy(by_pattern[joined[name][0][1]])
        for stored, pattern in joined[name]:
            later = partial(read, stored)
            entry.add_tensor(name, stored, pattern, later)  # type: ignore[arg-type]  # it may be any callable
        made = entry.convert(name, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def shape_of(stored: str) -> Tensor:
        return torch.empty(checkpoint.shape(stored), device="meta")

    def converted(name: str, target: str) -> Tensor:
        return convert(name, checkpoint.tensor)[target]

    for name in joined:
        for target in convert(name, shape_of):  # one stored tensor may become several
            makers[target] = partial(converted, name, target)
    return makers


def _prefixed(name: str, model: PreTrainedModel) -> str:
    prefix = model.base_model_prefix + "."
    known = model.state_dict()
    return next((tried for tried in (name, prefix + name, name.removeprefix(prefix)) if tried in known), name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
