"""What the modules below `grass_hf.optim.controller` know of a controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..config.settings import GrassConfig
from ..slices.slice import Slice


class Controller(Protocol):
    """A `GrassController`, or an engine's own; the attributes are documented there."""

    optimizer: torch.optim.Optimizer
    base: torch.optim.Optimizer
    replicas: dist.ProcessGroup | None
    config: GrassConfig
    step: int
    due: set[str]
    is_stepping: bool
    asked: dict[str, dict[str, Any]]

    @property
    def model(self) -> nn.Module | None: ...

    @property
    def slices(self) -> list[Slice]: ...

    def groups(self) -> dict[int, dict[str, Any]]: ...

    def parameters(self) -> list[nn.Parameter]: ...

    def stepped_dtype(self, param: nn.Parameter) -> torch.dtype: ...

    def look_ahead(self) -> None: ...

    def let_go(self, slices: list[Slice]) -> None: ...

    # what the optimizer's own methods call, see `driving`

    def follows(self, optimizer: object) -> bool: ...

    def around(self, original: Callable, *args: Any, **kwargs: Any) -> Any: ...

    def saved(self, state_dict: dict[str, Any]) -> dict[str, Any]: ...

    def loading(self, state_dict: dict[str, Any]) -> dict[str, Any]: ...

    def loaded(self, state_dict: dict[str, Any]) -> None: ...

    def forget_norms(self) -> None: ...

    def belongs_to(self, optimizer: torch.optim.Optimizer) -> None: ...
