"""What is said where a slice and its weight have parted; see `grass_hf.slices.drift`."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .slice import Slice

logger = logging.getLogger(__name__)

_REMEDY = (
    "Make one optimizer with grass_optimizer(model, ...) and let nothing else move the parameters; or call "
    "restore_model(model), which keeps the weights, and convert the model again."
)


def sentence(slice_: Slice, moved: set[str]) -> str:
    """The error for a slice, by which of the two was moved."""
    if moved == {"slice"}:
        return (
            f"the slice of {slice_.state.name} was changed and its weight was not, so the model does not compute with "
            "what is trained: an optimizer that does not drive the slices took a step, or one that moves parameters "
            f"itself (SAM, an average of parameters, local SGD). {_REMEDY}"
        )
    return (
        f"the slice of {slice_.state.name} and its weight hold different values: something moved them on its own (an "
        f"average of parameters, a copy, an optimizer that does not drive the slices). {_REMEDY}"
    )


def warn_of_other_weights(slice_: Slice) -> None:
    """Say that a slice that came with an optimizer's state follows a weight that did not; once for layers of a kind."""
    _warn_of_other_weights(re.sub(r"\d+", "*", slice_.state.name))


@functools.cache
def _warn_of_other_weights(kind: str) -> None:
    logger.warning(
        "%s: the optimizer's state was saved with other weights than those that are here (an average was saved in "
        "their place, or the model's state dict was not loaded): training goes on from the weights that are here.",
        kind,
    )
