"""``grass-hf run``: another program's script, in this process, as Python itself would run it.

Processes that the script starts know the name "grass" too: `children_know` puts the folder ``startup`` on PYTHONPATH.

An error of the script ends the process as it would without us: the traceback begins in the script, and the exit code
is Python's. So the script runs after typer has returned, which has its own ways with Ctrl-C and broken pipes.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grass_hf

from .errors import is_ours
from .startup import sitecustomize as startup

STARTUP = str(Path(startup.__file__).parent)


class Script(Exception):
    """A script to run, on its way out of the command line's parser.

    Args:
        script: path of a Python file, or "-m" (the module's name is then the first of `args`).
        args: the script's own arguments.
    """

    def __init__(self, script: str, args: list[str]):
        super().__init__(script)
        self.script, self.words = script, list(args)


def run_script(script: str, args: list[str]) -> None:
    """Run a Python file or module as ``__main__`` with the Trainer taught the name "grass".

    Args:
        script: path of a Python file, or "-m" (the module's name is then the first of `args`).
        args: the script's own arguments.

    Raises:
        ValueError: there is no such file, or it is no Python file.
        SystemExit: the script's own, or with exit code 2 after a sentence of ours.
    """
    grass_hf.register()
    try:
        with children_know():
            if script == "-m":
                _run_module(args)
            else:
                _run_file(os.path.abspath(script), [script, *args])
    except BaseException as error:
        if not (isinstance(error, ValueError) and is_ours(error)):
            _show_from_the_script_on(error.__traceback__)
        raise


@contextlib.contextmanager
def children_know() -> Iterator[None]:
    """Let processes of Python that are started meanwhile begin with `grass_hf.cli.startup.sitecustomize`."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", startup.VARIABLE)}
    folders = [folder for folder in (before["PYTHONPATH"] or "").split(os.pathsep) if folder != STARTUP]
    # an empty PYTHONPATH has no folder, and an empty word in one stands for the working directory
    os.environ["PYTHONPATH"] = os.pathsep.join([STARTUP, *(folders if before["PYTHONPATH"] else ())])
    os.environ[startup.VARIABLE] = sys.prefix
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_file(path: str, argv: list[str]) -> None:
    code = _compiled(path)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(path))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    _run_as_main(code, __file__=path, __cached__=None, __loader__=loader, __package__=None, __spec__=None)


def _run_module(argv: list[str]) -> None:
    if not argv:
        raise ValueError("run -m: give the name of a module to run.")
    sys.argv = list(argv)
    sys.path.insert(0, os.getcwd())
    spec = _found(argv[0])
    if spec is not None and spec.submodule_search_locations is not None:  # a package
        spec = _found(f"{spec.name}.__main__")
    code = getattr(spec and spec.loader, "get_code", lambda _: None)(spec and spec.name)
    if spec is None or spec.origin is None or code is None:
        raise ValueError(f"run -m {argv[0]}: there is no such module, or it is a package without __main__.py.")
    sys.argv[0] = spec.origin
    names = {"__file__": spec.origin, "__cached__": spec.cached, "__loader__": spec.loader}
    _run_as_main(code, **names, __package__=spec.parent, __spec__=spec)


def _found(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):  # a package that it should be in
            return None
        raise


def _compiled(script: str) -> types.CodeType | str | bytes:
    """Its code; the source itself where Python will have something to say about it.

    Raises:
        ValueError: it is no Python file.
    """
    remedy = "give the path of a Python script, or -m and a module's name"
    if not os.path.isfile(script):
        raise ValueError(f"run: {script} is not a file: {remedy}.")
    with io.open_code(script) as file:
        source = file.read()
    if b"\0" in source:
        raise ValueError(f"run: {script} is a binary and not a Python file: {remedy}.")
    try:
        return compile(source, script, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        first = source.partition(b"\n")[0].decode(errors="replace").strip()
        if first.startswith("#!") and "python" not in first and "pypy" not in first:
            raise ValueError(
                f"run: {script} is a script for {first[2:].strip()} and not a Python file: {remedy}; or switch on "
                "`grass-hf autoload on`, which reaches every program of this Python environment."
            ) from None
        return source


def _run_as_main(code: types.CodeType | str | bytes, **names: Any) -> None:
    main = types.ModuleType("__main__")
    vars(main).update(names, __builtins__=builtins)
    sys.modules["__main__"] = main  # for good: threads and atexit may ask for it after the script's last line
    if not isinstance(code, types.CodeType):
        code = compile(code, names["__file__"], "exec", dont_inherit=True)  # and here is the SyntaxError
    exec(code, vars(main))


def _show_from_the_script_on(where: types.TracebackType | None) -> None:
    """Let Python show the error that is about to leave us without the frames that ran the script, which it would not
    have itself; by whatever hook the script has set."""
    while where is not None and where.tb_frame.f_globals.get("__name__") in (__name__, importlib.util.__name__):
        where = where.tb_next
    hook = sys.excepthook

    def show(kind, error, _):
        hook(kind, error.with_traceback(where), where)

    sys.excepthook = show
