"""grass-hf: full-parameter training with structured sparse gradients (Grass, arXiv 2406.17660).

Importing the package teaches the Hugging Face Trainer the optimizer name "grass" (`register`); it costs
milliseconds, because torch and transformers are imported only when something of ours is used.
"""

from __future__ import annotations

import importlib
import os

from . import _import_hook

__version__ = "0.1.0"

_HOMES = {
    "GrassConfig": "config.settings",
    "convert_to_grass": "convert.conversion",
    "restore_model": "convert.conversion",
    "grass_optimizer": "optim.factory",
    "MuonAdamW": "optim.muon",
    "WeightDelta": "optim.weight_delta",
    "estimate_memory": "measure.estimate.memory",
    "save_plain": "integrations.saving",
    "summary": "integrations.start_table",
    "register": "_import_hook",
    "last_complete_checkpoint": "integrations.checkpoints",
    "GrassCallback": "integrations.trainer",
    "GrassOptimizerFactory": "integrations.trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_import_hook.register()
if os.environ.get("GRASS_HF_QUIET"):  # a process that a command of grass-hf has started
    from .config.quiet import quiet

    quiet()
    del quiet
