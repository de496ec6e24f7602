"""``grass-hf run``: another program's script, in this process, as Python itself would run it."""

from __future__ import annotations

import os
import runpy
import sys

import grass_hf


def run_script(script: str, args: list[str]) -> None:
    """Run a Python file or module as ``__main__`` with the Trainer taught the name "grass".

    Args:
        script: path of a Python file, or "-m" (the module's name is then the first of `args`).
        args: the script's own arguments.
    """
    grass_hf.register()
    if script == "-m":
        if not args:
            raise SystemExit("grass-hf run -m: give the name of a module to run.")
        sys.argv = list(args)
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(script):
        print(f"grass-hf run: {script} is not a file: give the path of a Python script.", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")
