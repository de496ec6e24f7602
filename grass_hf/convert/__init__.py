"""From a plain model to one with slices and back: which weights, the surgery, and the audit of its first forward."""

from __future__ import annotations

from typing import Any

__all__ = ["convert_to_grass", "grass_slices", "is_converted", "restore_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
