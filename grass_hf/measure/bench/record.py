"""One benchmark row: what was measured, on what, with which versions. Appended as a line of JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("grass-hf", "torch", "transformers", "accelerate")


def machine(*packages: str) -> dict[str, Any]:
    """The commit, the device and the versions that a figure depends on; of more packages too."""
    return {
        "commit": _commit(),
        "device": device(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *packages)},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device() -> str:
    """The name of the GPU, or of the CPU where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def append(path: str | os.PathLike, row: dict[str, Any]) -> None:
    """Append a row to a JSON-lines file, made with its folder if it does not exist."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def _commit() -> str | None:
    """The commit of the code that runs, with "+" behind it if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[3]
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return said if (root / ".git").exists() else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
