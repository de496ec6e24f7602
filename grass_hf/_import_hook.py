"""Registration with the Trainer, DeepSpeed, TRL and torch.distributed.checkpoint, when they are imported.

`register` is idempotent and cheap. What it does to them is in `grass_hf.integrations.registration`; here is only
when: at once for modules that are imported already, else right after their import, by a finder that wraps the loader
of just these modules. The start-up hook of ``grass-hf autoload on`` needs nothing more.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings

# The optimizer's name must exist before arguments are parsed, the Trainer's methods before one is built. They are
# patched separately, because transformers.trainer imports transformers.training_args in mid-import.
_PATCHES = {
    "transformers.training_args": "extend_optimizer_names",
    "transformers.trainer": "extend_trainer",
    "deepspeed": "extend_deepspeed",
    "torch.distributed.checkpoint.state_dict": "extend_distributed_checkpoint",
    "trl.trainer.callbacks": "extend_trl_callbacks",
    "trl.generation.vllm_generation": "extend_trl_vllm",
}


def register() -> None:
    """Teach the Hugging Face Trainer ``optim="grass"``: an optimizer name, its factory and a default callback; and
    `deepspeed.initialize` to leave the slices of a converted model to Grass.

    ``import grass_hf`` calls it; calling it again changes nothing. What is not imported yet is taught when it is.
    """
    waiting = False
    for module in _PATCHES:
        if _is_loaded(module):
            _patch(module)
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def _patch(module: str) -> None:
    try:
        from .integrations import registration

        getattr(registration, _PATCHES[module])(sys.modules[module])
    except Exception as error:  # they must stay importable for scripts that never heard of us
        warnings.warn(
            f"grass-hf could not register with {module} ({type(error).__name__}: {error}): --optim grass is not known "
            "there; install versions that grass-hf supports (transformers 4.57 or newer, torch 2.6 or newer).",
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _PATCHES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, and a patch after it. Everything else (source lines, resources) is the other's."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self._loader
        _patch(module.__name__)

    def __getattr__(self, name):
        return getattr(self._loader, name)
