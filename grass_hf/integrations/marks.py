"""A mark on functions and classes of other libraries that Grass has wrapped, so that it wraps them once."""

from __future__ import annotations

from typing import Any, TypeVar

_MARK = "_grass_hf"

Marked = TypeVar("Marked")


def marked(wrapped: Marked, original: Any = True) -> Marked:
    """The same, with the mark; `original` is what `original_of` is to give back."""
    setattr(wrapped, _MARK, original)
    return wrapped


def is_marked(owner: Any) -> bool:
    """Whether Grass has wrapped it."""
    return hasattr(owner, _MARK)


def original_of(wrapped: Any) -> Any:
    """What a wrapped function was before, None for one that is not wrapped."""
    return getattr(wrapped, _MARK, None)
