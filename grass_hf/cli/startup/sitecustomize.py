"""What Python runs first in a process that a script under `grass-hf run` starts: it teaches the name "grass" there too.

A launcher (`trl sft`, accelerate, torchrun, multiprocessing with spawn) trains in new processes of Python. They inherit
PYTHONPATH, whose first folder is this one, and Python imports `sitecustomize` from it before anything else.

Any Python may meet this file, of another environment and of another version too. So its syntax is that of all of them,
and where the environment is not the one of `grass-hf run`, it does nothing but call the next `sitecustomize`.
"""

import os
import sys

# What grass_hf.cli.run sets: the sys.prefix of the environment in which `grass-hf run` was called.
VARIABLE = "GRASS_HF_RUN"


def register(package):
    """Import the package of that folder, the same that the parent process has, wherever it was found."""
    if "grass_hf" in sys.modules:
        return
    from importlib import util

    spec = util.spec_from_file_location(
        "grass_hf", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
    )
    assert spec is not None and spec.loader is not None  # the file's name ends in .py
    module = util.module_from_spec(spec)
    sys.modules["grass_hf"] = module
    try:
        spec.loader.exec_module(module)  # which registers
    except BaseException:
        del sys.modules["grass_hf"]
        raise


def is_our_environment():
    """Whether this Python is the one that `grass-hf run` was called with."""
    prefix = os.environ.get(VARIABLE, "")
    return bool(prefix) and sys.version_info >= (3, 10) and os.path.realpath(prefix) == os.path.realpath(sys.prefix)


def call_next(here):
    """Import the `sitecustomize` that this one stands before, if there is one; Python then takes it for the module."""
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or os.curdir) != here]
    own = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401 - there may be none
    except ImportError:
        if sys.modules.get("sitecustomize") is None and own is not None:
            sys.modules["sitecustomize"] = own
        if getattr(sys.exc_info()[1], "name", "sitecustomize") != "sitecustomize":
            raise


HERE = os.path.dirname(os.path.realpath(__file__))
if __name__ == "sitecustomize":
    try:
        if is_our_environment():
            register(os.path.dirname(os.path.dirname(HERE)))
    except Exception:  # every Python starts, whatever happens to us
        pass
    call_next(HERE)
