"""`grass-hf run`: a script's errors are its own, any console script runs, and the processes that it starts know us."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import ROOT, call, grass

from grass_hf import GrassConfig
from grass_hf.cli import autoload, errors, main
from grass_hf.config import fields


def written(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- errors: as Python itself shows them, but our own sentences

ENDINGS = {
    "other's ValueError": "def read(text):\n    return int(text)\n\nread('x')\n",
    "own ValueError": "raise ValueError('mine')\n",
    "from ours": "from grass_hf.config.fields import *\ntry: check_choice(1, 2, ())\nexcept ValueError: raise OSError",
    "called by ours": "import grass_hf.config.fields as f\nf.kinds_of(3)\n",
    "exit code": "import sys; sys.exit(7)\n",
    "last words": "import sys; sys.exit('bye')\n",
    "well": "print('well')\n",
    "Ctrl-C": "raise KeyboardInterrupt\n",
    "syntax": "x = (\n",
    "a pipe": "raise BrokenPipeError(32, 'Broken pipe')\n",
    "end of file": "raise EOFError('no more')\n",
    "hook": "import sys\nsys.excepthook = lambda *e: print('hook', e[0], e[2].tb_frame.f_code.co_name)\n1 / 0\n",
    "at exit": "import atexit\natexit.register(lambda: print(__import__('__main__').x))\nx = 3\nraise OSError('x')\n",
}


@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_script_ends_as_under_python_itself(tmp_path, text):
    script = written(tmp_path, text)
    ours, pythons = grass("run", script), call(script)
    assert (ours.returncode, ours.stdout, ours.stderr) == (pythons.returncode, pythons.stdout, pythons.stderr)


@pytest.mark.parametrize("text", [ENDINGS[name] for name in ("other's ValueError", "exit code", "at exit", "hook")])
def test_a_module_does_too(tmp_path, text):
    written(tmp_path, text, "job.py")
    path = f"{ROOT}:{tmp_path}"
    ours, pythons = call("-m", "grass_hf", "run", "-m", "job", PYTHONPATH=path), call("-m", "job", PYTHONPATH=path)
    if "excepthook" in text:  # whose traceback Python begins in its own runpy
        assert ours.stdout == "hook <class 'ZeroDivisionError'> <module>\n"
        return
    assert (ours.returncode, ours.stdout) == (pythons.returncode, pythons.stdout)
    kept = [line for line in pythons.stderr.splitlines() if "<frozen runpy" not in line]
    assert ours.stderr.splitlines() == kept


def test_killed_by_the_terminal(tmp_path):
    """Ctrl-C ends the process by the signal, which a shell shows as 130 and stops its own script for."""
    script = written(tmp_path, "import time\nprint('on', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "grass_hf", "run", str(script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert job.stdout.readline() == "on\n"
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=30)
    assert job.returncode == -signal.SIGINT
    assert said.splitlines()[-1] == "KeyboardInterrupt" and "grass_hf" not in said and "Aborted" not in said


@pytest.mark.parametrize(
    "text",
    [
        "import grass_hf\ngrass_hf.GrassConfig(rank=0)\n",
        "from grass_hf.config.optim_args import *\nparse_optim_args('rank=0')\n",
    ],
)
def test_our_own_errors_are_one_line(tmp_path, text):
    done = grass("run", written(tmp_path, text))
    assert done.returncode == 2 and done.stderr.startswith("grass-hf: rank=0 is not a positive number of rows")
    assert len(done.stderr.splitlines()) == 1


def test_what_is_ours():
    def raised(call, *args):
        try:
            call(*args)
        except Exception as error:
            return error

    assert errors.is_ours(raised(GrassConfig, -1))
    assert errors.is_ours(raised(fields.parse, "rank", "x", (int,), "here"))  # the remedy for int("x")
    assert not errors.is_ours(raised(fields._pair, "name", 3, "here"))  # no line of ours has raised it
    assert not errors.is_ours(raised(int, "x"))
    assert not errors.is_ours(ValueError("never raised"))


def test_errors_of_others_are_theirs_in_every_command(monkeypatch, capsys):
    monkeypatch.setattr(autoload, "path", lambda: int("x"))
    monkeypatch.setattr(sys, "argv", ["grass-hf", "autoload", "status"])
    with pytest.raises(ValueError, match="invalid literal"):
        main()
    monkeypatch.setattr(autoload, "path", lambda: GrassConfig(rank=0))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and capsys.readouterr().err.startswith("grass-hf: rank=0 is not")


# -- what is a script

REFUSED = {
    "shell": ('#!/bin/sh\nexec python "$@"\n', "is a script for /bin/sh and not a Python file"),
    "perl": ("#!/usr/bin/env perl\nprint 1;\n", "is a script for /usr/bin/env perl and not a Python file"),
    "binary": ("\x7fELF\x02\x01\x01\0\0\0", "is a binary and not a Python file"),
}


@pytest.mark.parametrize("text, words", REFUSED.values(), ids=REFUSED.keys())
def test_other_programs_are_refused(tmp_path, text, words):
    done = grass("run", written(tmp_path, text, "program"))
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert "give the path of a Python script, or -m and a module's name" in done.stderr


@pytest.mark.parametrize(
    "words, said",
    [(["-m"], "give the name"), (["-m", "no.such"], "no.such: there is no such module"), (["no_file"], "no_file")],
)
def test_what_is_not_there_is_said(words, said):
    done = grass("run", *words)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_modules_and_packages_are_mains(tmp_path):
    """What Python's own -m gives them: names, arguments, and a place to be found again by spawned processes."""
    (tmp_path / "tool" / "sub").mkdir(parents=True)
    body = "import sys\nprint(sorted(sys.argv), __name__, __package__, __spec__.name, __file__, sys.path[0])\n"
    for name in ("job.py", "tool/__init__.py", "tool/__main__.py", "tool/sub/__init__.py", "tool/one.py"):
        written(tmp_path, "" if "init" in name else body, name)
    for name in ("job", "tool", "tool.one"):
        path = f"{ROOT}:{tmp_path}"
        ours = call("-m", "grass_hf", "run", "-m", name, "-m", "x", PYTHONPATH=path)
        assert ours.stdout == call("-m", name, "-m", "x", PYTHONPATH=path).stdout != "", ours.stderr
    for name, package in (
        ("tool.sub", "a package without"),
        ("tool.none", "no such module"),
        ("tool.one.x", "no such"),
    ):
        done = call("-m", "grass_hf", "run", "-m", name, PYTHONPATH=path)
        assert done.returncode == 2 and f"run -m {name}: " in done.stderr and package in done.stderr
        assert len(done.stderr.splitlines()) == 1
    written(tmp_path, "import no_such_dependency\n", "tool/__init__.py")
    done = call("-m", "grass_hf", "run", "-m", "tool.one", PYTHONPATH=path)
    assert done.returncode == 1 and "tool/__init__.py" in done.stderr and "no_such_dependency" in done.stderr


def test_console_scripts_of_every_form(tmp_path):
    body = "import sys\nprint(sys.argv[1:], __name__, __file__, 'grass_hf' in sys.modules)\n"
    heads = [
        f"#!{sys.executable}\n",
        "#!/usr/bin/env python3\n",
        f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n",  # pip's, where the path is long
        "from __future__ import annotations\n",
        "",
    ]
    for number, head in enumerate(heads):
        script = written(tmp_path, head + body, f"tool{number}")
        done = grass("run", script, "--flag", "-m")
        assert done.stdout.split("\n")[0] == f"['--flag', '-m'] __main__ {script} True", done.stderr
    written(tmp_path, "x: undefined = 3\n", "annotated.py")  # our own future flags are not the script's
    assert "NameError: name 'undefined'" in grass("run", tmp_path / "annotated.py").stderr
