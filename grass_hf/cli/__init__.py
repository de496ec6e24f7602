"""The command ``grass-hf``."""

from .entry import main

__all__ = ["main"]
