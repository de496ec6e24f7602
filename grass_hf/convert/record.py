"""What `convert_to_grass` did to a model, and which optimizer drives its slices: one, and no other."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config.settings import GrassConfig
from ..slices.slice import Slice

if TYPE_CHECKING:
    from ..optim.weight_delta import WeightDelta


@dataclass(eq=False)
class Conversion:
    """What `convert_to_grass` did to a model; kept as its attribute ``grass``.

    Attributes:
        model: the model.
        config: the settings.
        left_out: reason by name, for each module the patterns matched that was not compressed.
        ddp_ignored: what the model's own ``_ddp_params_and_buffers_to_ignore`` was.
        driver: weak reference to the `grass_hf.optim.link.Link` of the optimizer that drives the slices; None before
            there is one, and in a copy of the model.
        delta: the `grass_hf.WeightDelta` that follows the model; None in a copy of the model.
        delta_saved: what an optimizer's state said of it, until there is one.
    """

    model: nn.Module
    config: GrassConfig
    left_out: dict[str, str]
    ddp_ignored: object
    driver: weakref.ref[Any] | None = None
    delta: WeightDelta | None = None
    delta_saved: dict[str, Any] | None = None

    def __post_init__(self):
        _CONVERSIONS.add(self)

    def __getstate__(self):
        return {**vars(self), "driver": None, "delta": None, "delta_saved": None}

    def __setstate__(self, state):
        vars(self).update(state)
        _CONVERSIONS.add(self)

    @property
    def is_current(self) -> bool:
        """Whether the model still has the slices that this conversion made."""
        return getattr(self.model, "grass", None) is self

    def refuse_second(self) -> None:
        """Stop where another optimizer drives the slices.

        Raises:
            ValueError: one does, or did: its state is what the slices' rows have been trained with.
        """
        if self.driver is not None:
            raise ValueError(
                f"the slices of this {type(self.model).__name__} are driven by an optimizer already: go on with that "
                "one; or pass replace=True to grass_optimizer, and the new one takes over, without the state of the "
                "old one, which refuses to step from then on."
            )

    @property
    def driving(self) -> Any:
        """The link that `driver` refers to, None if there is none; one of a copied optimizer is found here."""
        if self.driver is None:
            for link in list(_UNLINKED):
                link.find()
        return None if self.driver is None else self.driver()

    def claim(self, driver: object) -> None:
        """Let one optimizer drive the slices from now on."""
        self.driver = weakref.ref(driver)

    def is_driven_by(self, driver: object) -> bool:
        """Whether it is this optimizer's link to the slices that counts."""
        return self.driver is not None and self.driver() is driver


def find_later(link: object) -> None:
    """Note a copied optimizer's link, which looks for its model when one of them needs the other."""
    _UNLINKED.add(link)


_UNLINKED: weakref.WeakSet[Any] = weakref.WeakSet()
_CONVERSIONS: weakref.WeakSet[Conversion] = weakref.WeakSet()


def conversion_of(model: nn.Module) -> Conversion:
    """What was done to a converted model."""
    conversion: Any = model.grass
    return conversion


def conversion_over(slices: Iterable[Slice]) -> Conversion | None:
    """The conversion of the model that holds all of these slices, None if no model does."""
    wanted = set(slices)
    current = [conversion for conversion in _CONVERSIONS if conversion.is_current]
    return next((each for each in current if wanted and wanted <= set(grass_slices(each.model))), None)


def is_stepped(slice_: Slice) -> bool:
    """Whether the optimizer that drives a slice takes a step now."""
    links = [each.driver() for each in list(_CONVERSIONS) if each.driver is not None]
    return any(link is not None and link.is_stepping and slice_ in link.slices for link in links)


def grass_slices(model: nn.Module) -> Iterator[Slice]:
    """The slices of a converted model, in the model's order; one that several modules share comes once."""
    return (module for module in model.modules() if isinstance(module, Slice))
