"""Sizes of memory, as they are typed and as they are printed."""

from __future__ import annotations

import re

_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size with a unit; `option` is named in errors."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{option} {text!r} is not a size: write 40GB (10^9 bytes each) or 40GiB (2^30).")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def shown_bytes(count: int | None) -> str:
    """A size in a unit to read."""
    if count is None:
        return "known after the first step"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
