"""Lines that other packages log while they are imported, and that say nothing about a user's run.

A command of grass-hf leaves them out, in its own process and in those that it starts: `VARIABLE` tells these. Whoever
imports grass_hf in a script of their own sees what those packages say.
"""

from __future__ import annotations

import logging
import os

VARIABLE = "GRASS_HF_QUIET"

# By logger: how the lines begin, or what stands in them.
_LINES = {
    # compiled parts for other Pythons and devices, and for kernels from the hub: torch's own are used
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU ",),
    "bitsandbytes.cextension": ("was compiled without GPU support",),
    # torchao registers its enums in the way of an earlier torch
    "torch.utils._pytree": ("is an Enum subclass",),
}


def quiet() -> None:
    """Leave those lines out, here and in processes that this one starts. Calling it again changes nothing."""
    os.environ[VARIABLE] = "1"
    for name, starts in _LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(starts))


class _Without(logging.Filter):
    def __init__(self, parts: tuple[str, ...]):
        super().__init__()
        self._parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in str(record.msg) for part in self._parts)
