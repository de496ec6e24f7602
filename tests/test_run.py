"""`grass-hf run`: a script's errors are its own, any console script runs, and the processes that it starts know us."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from recipe_files import causal_folder, chats, write_lines
from test_cli import FLAGS, ROOT, SCRIPT, call, checked, environment, grass

from grass_hf import GrassConfig, fields
from grass_hf.cli import autoload, errors, main

STARTUP = ROOT / "grass_hf" / "cli" / "startup"


def console_script(name: str) -> Path:
    """What `which` finds."""
    path = Path(sysconfig.get_path("scripts")) / name
    return path if path.exists() else pytest.skip(f"{name} is not installed here")


def written(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- errors: as Python itself shows them, but our own sentences

ENDINGS = {
    "other's ValueError": "def read(text):\n    return int(text)\n\nread('x')\n",
    "own ValueError": "raise ValueError('mine')\n",
    "from ours": "import grass_hf\ntry:\n    grass_hf.GrassConfig(rank=0)\nexcept ValueError as e:\n    raise ValueError('mine') from e\n",
    "called by ours": "import grass_hf.fields as f\nf.kinds_of(3)\n",
    "exit code": "import sys; sys.exit(7)\n",
    "last words": "import sys; sys.exit('bye')\n",
    "well": "print('well')\n",
    "Ctrl-C": "raise KeyboardInterrupt\n",
    "syntax": "x = (\n",
    "a pipe": "raise BrokenPipeError(32, 'Broken pipe')\n",
    "end of file": "raise EOFError('no more')\n",
    "a hook of its own": "import sys\nsys.excepthook = lambda *e: print('hook', e[0].__name__, e[2].tb_frame.f_code.co_name)\n1 / 0\n",
    "at exit": "import atexit\natexit.register(lambda: print('late', __import__('__main__').x))\nx = 3\nraise OSError('x')\n",
}


@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_script_ends_as_under_python_itself(tmp_path, text):
    script = written(tmp_path, text)
    ours, pythons = grass("run", script), call(script)
    assert (ours.returncode, ours.stdout, ours.stderr) == (pythons.returncode, pythons.stdout, pythons.stderr)
    written(tmp_path, text, "job.py")
    path = f"{ROOT}:{tmp_path}"
    ours, pythons = call("-m", "grass_hf", "run", "-m", "job", PYTHONPATH=path), call("-m", "job", PYTHONPATH=path)
    if "excepthook" in text:  # whose traceback Python begins in its own runpy
        assert ours.stdout == "hook ZeroDivisionError <module>\n"
        return
    assert (ours.returncode, ours.stdout) == (pythons.returncode, pythons.stdout)
    frozen = ("runpy", "importlib")
    kept = [line for line in pythons.stderr.splitlines() if not any(f"<frozen {name}" in line for name in frozen)]
    assert [line for line in ours.stderr.splitlines() if "<frozen importlib" not in line] == kept


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
        "from grass_hf.optim_args import *\nparse_optim_args('rank=0')\n",
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


# -- processes that the script starts

CHILD = """
import multiprocessing, os, subprocess, sys
def known(queue): queue.put("grass_hf" in sys.modules)
if __name__ == "__main__":
    for method in ("spawn", "forkserver", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=known, args=(queue,))
        process.start()
        print(method, queue.get(timeout=60))
        process.join()
    code = "import sys, os; print('grass_hf' in sys.modules, 'torch' in sys.modules, [p for p in sys.path if 'startup' in p])"
    grandchild = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", code])
    subprocess.run([sys.executable, "-c", grandchild, code])
    os.execv(sys.executable, [sys.executable, "-c", code])
"""


def test_children_know_the_name(tmp_path):
    done = grass("run", written(tmp_path, CHILD))
    lines = done.stdout.splitlines()
    assert lines[:3] == ["spawn True", "forkserver True", "fork True"], done.stderr
    assert lines[3:] == ["True False []"] * 3


def python_starts(python, tmp_path, words=("-c", "print('ok')"), **more):
    """A start of Python as a child of `grass-hf run` has it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GRASS"))}
    env |= {"PYTHONPATH": str(STARTUP), "GRASS_HF_RUN": sys.prefix, **more}
    return subprocess.run([str(python), *words], capture_output=True, text=True, env=env, cwd=tmp_path)


KNOWN = "import sys; print('grass_hf' in sys.modules)"


def test_other_pythons_start_as_if_nothing_had_been(tmp_path):
    other = environment(tmp_path / "env")  # it has our packages, but it is another environment
    for python, words, said in (
        (sys.executable, ("-c", KNOWN), "True\n"),
        (other, ("-c", KNOWN), "False\n"),
        (sys.executable, ("-I", "-c", KNOWN), "False\n"),
        (sys.executable, ("-S", "-c", KNOWN), "False\n"),
    ):
        done = python_starts(python, tmp_path, words)
        assert (done.stdout, done.stderr) == (said, ""), (python, words)
    compile((STARTUP / "sitecustomize.py").read_text(), "sitecustomize.py", "exec")
    for older in ("python2", "python3.8", "python3.9"):
        if found := [Path(p) / older for p in os.environ["PATH"].split(":") if (Path(p) / older).exists()]:
            done = python_starts(found[0], tmp_path, ("-c", "print('ok')"))
            assert done.returncode or (done.stdout, done.stderr) == ("ok\n", "")


def test_a_broken_package_breaks_no_child(tmp_path):
    package = tmp_path / "grass_hf"
    startup = package / "cli" / "startup"
    startup.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    (startup / "sitecustomize.py").write_text((STARTUP / "sitecustomize.py").read_text())
    done = python_starts(sys.executable, tmp_path, ("-c", KNOWN), PYTHONPATH=str(startup))
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_next_sitecustomize_is_called(tmp_path):
    written(tmp_path, "import sys\nMARK = 'theirs'\nprint(__name__, __file__)\n", "sitecustomize.py")
    path = os.pathsep.join([str(STARTUP), str(tmp_path)])
    code = "import sys, sitecustomize; print(sitecustomize.MARK, 'grass_hf' in sys.modules)"
    done = python_starts(sys.executable, tmp_path, ("-c", code), PYTHONPATH=path)
    assert done.stdout.splitlines() == [f"sitecustomize {tmp_path}/sitecustomize.py", "theirs True"], done.stderr
    # and what it raises is said as Python says it
    for text in ("raise RuntimeError('theirs')", "import no_such_module"):
        written(tmp_path, text, "sitecustomize.py")
        with_us = python_starts(sys.executable, tmp_path, ("-c", KNOWN), PYTHONPATH=path)
        without = python_starts(sys.executable, tmp_path, ("-c", KNOWN), PYTHONPATH=str(tmp_path))
        assert (with_us.returncode, with_us.stderr) == (without.returncode, without.stderr)
        if not with_us.returncode:
            assert with_us.stdout == "True\n"


def test_nothing_is_left_in_the_environment(monkeypatch):
    from grass_hf.cli.run import children_know

    for before in (None, "", "a:b", f"{STARTUP}:a"):
        monkeypatch.delenv("GRASS_HF_RUN", raising=False)
        monkeypatch.delenv("PYTHONPATH", raising=False)
        if before is not None:
            monkeypatch.setenv("PYTHONPATH", before)
        with pytest.raises(KeyError), children_know():
            words = os.environ["PYTHONPATH"].split(os.pathsep)
            assert words == [str(STARTUP), *[w for w in (before or "").split(":") if w and w != str(STARTUP)]]
            assert os.environ["GRASS_HF_RUN"] == sys.prefix
            raise KeyError
        assert os.environ.get("PYTHONPATH") == before and "GRASS_HF_RUN" not in os.environ


# -- the launchers that people use

LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""


def test_a_launcher_that_knows_nothing_of_us(tmp_path):
    launcher = written(tmp_path, LAUNCHER, "launcher")
    refused = call(launcher, SCRIPT, *FLAGS, "--output_dir", tmp_path / "out")
    assert refused.returncode != 0 and "grass" in refused.stderr
    checked(grass("run", launcher, SCRIPT, *FLAGS, "--output_dir", tmp_path / "out"))


@pytest.fixture
def trl(tmp_path):
    """Words of `trl sft` for two steps of a tiny model, settings in a YAML file with a mapping for optim_args."""
    pytest.importorskip("trl")
    causal_folder(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", chats(16))
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "optim": "grass",
        "optim_args": {"rank": 8, "update_interval": 2, "target_modules": ["q_proj", "v_proj"], "base": "adamw_torch"},
        "max_steps": 2,
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", tmp_path / "sft.yaml"]


def trained(done, tmp_path):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr.count("Grass trains a slice of") == 1
    table = done.stderr[done.stderr.index("Grass trains a slice of") :]
    assert "self_attn.q_proj" in table and "self_attn.v_proj" in table
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_trl_starts_a_child_that_knows(tmp_path, trl):
    trained(call("-m", "grass_hf", "run", console_script("trl"), "sft", *trl, HF_HUB_OFFLINE="1"), tmp_path)


@pytest.mark.slow
def test_trl_in_one_process(tmp_path, trl):
    trained(call("-m", "grass_hf", "run", "-m", "trl.scripts.sft", *trl, HF_HUB_OFFLINE="1"), tmp_path)


TWO = {
    "accelerate": ["launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    "torchrun": ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
}


@pytest.mark.dist
@pytest.mark.parametrize("launcher", TWO)
def test_two_processes_by_their_own_launcher(tmp_path, launcher):
    flags = [*FLAGS, "--output_dir", tmp_path / "out", "--ddp_backend", "gloo"]
    count = (
        ["--num_processes", "2", "--main_process_port", "29631"] if launcher == "accelerate" else ["--nproc_per_node=2"]
    )
    done = grass("run", console_script(launcher), *TWO[launcher], *count, SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("world 2 optim grass") == 2 and done.stderr.count("Grass trains a slice of") == 1


@pytest.mark.dist
def test_two_processes_by_torchs_module(tmp_path):
    flags = [*FLAGS, "--output_dir", tmp_path / "out", "--ddp_backend", "gloo"]
    words = ["-m", "torch.distributed.run", *TWO["torchrun"], "--nproc_per_node=2"]
    done = grass("run", *words, SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("world 2 optim grass") == 2


@pytest.mark.dist
def test_two_processes_by_trl(tmp_path, trl):
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "29632"]
    words = [console_script("trl"), "sft", *trl, *launch, "--ddp_backend", "gloo"]
    trained(call("-m", "grass_hf", "run", *words, HF_HUB_OFFLINE="1"), tmp_path)
