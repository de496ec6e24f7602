"""The command ``grass-hf``."""

from .app import main

__all__ = ["main"]
