"""Between an optimizer and the model whose slices it drives.

A copy of both, by `copy.deepcopy` or pickle, must end up linked with each other and not with the originals, in whatever
order they are copied. So a copied optimizer knows nothing of a model at first; when it is needed it looks for the model
that holds the very slices it steps over. There is none if it was copied alone, and then it refuses to step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..convert.record import Conversion, conversion_over, find_later, grass_slices
from ..slices.slice import Slice, living_slices
from .driving import controller_of, plain_class


class Link:
    """What an optimizer knows of the model whose slices it drives.

    Args:
        conversion: of the model.
        optimizer: the optimizer.

    Attributes:
        conversion: None for a copy that has not found its model.
        optimizer: as above; a copied one says itself whose link this is.
    """

    def __init__(self, conversion: Conversion, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._take(conversion)

    def _take(self, conversion: Conversion) -> None:
        self.conversion: Conversion | None = conversion
        conversion.claim(self)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self._count if self.conversion is None else len(self.slices)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._count, self.conversion = state["count"], None
        self._slices: list[Slice] = []
        find_later(self)

    def refresh(self) -> None:
        """Look for the model's slices anew, after some were taken off."""
        self._slices = [] if self.model is None else list(grass_slices(self.model))

    def find(self) -> None:
        """Let a copy look for its model."""
        if self.conversion is not None or not hasattr(self, "optimizer"):  # a link that is being copied has none yet
            return
        held = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        own = [slice_ for slice_ in living_slices() if id(slice_.active) in held]
        conversion = conversion_over(own) if len(own) == self._count else None
        if conversion is not None and conversion.driver is None:
            self._take(conversion)

    @property
    def model(self) -> nn.Module | None:
        """The model, None for a copy that has not found it."""
        return None if self.conversion is None else self.conversion.model

    @property
    def driven(self) -> nn.Module:
        """The model whose slices are stepped, where `require` has found nothing wrong."""
        assert self.conversion is not None
        return self.conversion.model

    @property
    def is_stepping(self) -> bool:
        """Whether the optimizer's own step runs now."""
        return controller_of(self.optimizer).is_stepping

    @property
    def slices(self) -> list[Slice]:
        """The model's slices; none once `restore_model` was called, or where the model is not known."""
        if self.conversion is None:
            self.find()
        return self._slices if self.conversion is not None and self.conversion.is_current else []

    def require(self) -> None:
        """Stop an optimizer that does not drive any slices now.

        Raises:
            RuntimeError: it was copied without its model, the model was restored, or another one drives its slices.
        """
        kind = plain_class(self.optimizer).__name__
        if self.conversion is None:
            raise RuntimeError(
                f"this {kind} is a copy, and the model whose slices it drives was not copied with it: copy both in "
                "one call, copy.deepcopy((model, optimizer)) or pickle.dumps((model, optimizer)), or make an optimizer "
                "for the model that you have: grass_optimizer(model, ...)."
            )
        if not self.conversion.is_current:
            raise RuntimeError(
                f"this {kind} drove slices that restore_model has taken off {type(self.model).__name__}: make a new "
                "optimizer over model.parameters(), or convert the model again and call grass_optimizer(model, ...)."
            )
        if not self.conversion.is_driven_by(self):
            raise RuntimeError(
                f"another optimizer has taken over the slices of {type(self.model).__name__} from this {kind}: step "
                "with that one."
            )
