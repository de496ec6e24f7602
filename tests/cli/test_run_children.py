"""Processes that a script under `grass-hf run` starts, by whatever launcher, know the name "grass" too."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from recipe_files import causal_folder, chats, write_lines
from test_cli import FLAGS, ROOT, SCRIPT, call, checked, environment, grass
from test_run import written

STARTUP = ROOT / "grass_hf" / "cli" / "startup"


def console_script(name: str) -> Path:
    """What `which` finds."""
    path = Path(sysconfig.get_path("scripts")) / name
    return path if path.exists() else pytest.skip(f"{name} is not installed here")


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
    code = "import sys; print('grass_hf' in sys.modules, 'torch' in sys.modules, 'startup' in str(sys.path))"
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
    assert lines[3:] == ["True False False"] * 3


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
    words = [console_script("trl"), "sft", *trl, *launch]
    done = call("-m", "grass_hf", "run", *words, HF_HUB_OFFLINE="1")
    trained(done, tmp_path)
    assert "'epoch': '2'" in done.stdout  # of one process two steps would be one
