"""Writing patches into a replica."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def apply_patches(
    state: dict[str, Tensor],
    patches: Iterable[tuple[str, Tensor | None, Tensor]],
    aliases: dict[str, str] | None = None,
) -> None:
    """Write patches into a replica's state dict, in place.

    Args:
        state: tensors by name, contiguous, on any device; `model.state_dict()` of a model with the same weights.
        patches: as `WeightDelta.patches` gives them.
        aliases: `WeightDelta.aliases`, where names that are tied in the trainer have tensors of their own here.

    Raises:
        ValueError: a name is not in the state, or its dtype or shape is another; nothing of that patch is written.
    """
    for name, indices, values in patches:
        targets = _targets(state, name, aliases)
        for target in targets:
            _check(name, target, indices, values)
        for target in targets:
            if indices is None:
                target.copy_(values)
            else:
                target.view(-1)[indices.to(target.device, torch.int64)] = values.to(target.device)


def check_patches(
    state: dict[str, Tensor],
    patches: Iterable[tuple[str, Tensor | None, Tensor]],
    aliases: dict[str, str] | None,
    source: object,
) -> None:
    """What `apply_patches` would raise, for all patches together and with the name of where they come from."""
    for name, indices, values in patches:
        try:
            for target in _targets(state, name, aliases):
                _check(name, target, indices, values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def _targets(state: dict[str, Tensor], name: str, aliases: dict[str, str] | None) -> list[Tensor]:
    names = [name, *(other for other, first in (aliases or {}).items() if first == name)]
    targets = [state[each] for each in names if each in state]
    if not targets:
        raise ValueError(
            f"the replica has no {name}: it is of another model than the trainer's, load it with the trainer's model."
        )
    return targets


def _check(name: str, target: Tensor, indices: Tensor | None, values: Tensor) -> None:
    fits = target.shape == values.shape if indices is None else _reaches(target, indices)
    if target.dtype != values.dtype or not fits:
        raise ValueError(
            f"{name} is {target.dtype} {tuple(target.shape)} in the replica, and a patch of {values.dtype} "
            f"{tuple(values.shape)} does not fit it: load the replica with the trainer's model and dtype."
        )


def _reaches(target: Tensor, indices: Tensor) -> bool:
    return not indices.numel() or (int(indices.min()) >= 0 and int(indices.max()) < target.numel())
