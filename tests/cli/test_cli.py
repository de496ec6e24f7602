"""The command line as a user types it, and an unmodified script started in three ways."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from grass_hf.measure.bench import record

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/distributed/scripts/run_clm_tiny.py"
FLAGS = [
    "--optim",
    "grass",
    "--optim_args",
    "rank=8,update_interval=2,base=adamw_torch",
    "--max_steps",
    "4",
    "--report_to",
    "none",
    "--use_cpu",
    "--save_strategy",
    "no",
    "--logging_steps",
    "1",
]


def call(*words, python=sys.executable, **environment):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "NO_COLOR": "1",
        **environment,
    }
    return subprocess.run([python, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def grass(*words):
    return call("-m", "grass_hf", *words)


def checked(result):
    """The script's own last line, after asserting that it trained with Grass."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert "world 1 optim grass" in result.stdout
    assert "grass/coverage" in result.stdout and "Grass trains a slice of" in result.stderr
    return re.search(r"checksum (\S+)", result.stdout).group(1)


def test_unmodified_script_run_three_ways_trains_the_same(tmp_path):
    python = environment(tmp_path / "env")
    out = ["--output_dir", tmp_path / "out"]
    first = checked(grass("run", SCRIPT, *FLAGS, *out))
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "grass_hf",
        "run",
        SCRIPT,
    ]
    assert checked(call(*launch, *FLAGS, *out)) == first

    refused = call(SCRIPT, *FLAGS, *out, python=python)
    assert refused.returncode != 0 and "grass" in refused.stderr  # not a name the Trainer knows
    on = call("-m", "grass_hf", "autoload", "on", python=python)
    assert on.returncode == 0 and "autoload is on" in on.stdout
    assert checked(call(SCRIPT, *FLAGS, *out, python=python)) == first
    assert "autoload is on" in call("-m", "grass_hf", "autoload", "status", python=python).stdout
    assert "autoload is off" in call("-m", "grass_hf", "autoload", "off", python=python).stdout
    assert call(SCRIPT, *FLAGS, *out, python=python).returncode != 0
    assert not list(tmp_path.glob("env/**/grass_hf_autoload.pth"))


def environment(folder: Path) -> str:
    """A throwaway environment that sees this one's packages, so that autoload touches nothing of the developer's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(folder / "bin" / "python")


def test_autoload_never_breaks_python(tmp_path):
    python = environment(tmp_path / "env")
    assert call("-m", "grass_hf", "autoload", "on", python=python).returncode == 0
    code = "import sys; print('grass_hf' in sys.modules, 'torch' in sys.modules)"
    assert call("-c", code, python=python).stdout.split() == ["True", "False"]
    # grass_hf is gone, or broken: Python starts as if nothing had been
    next(tmp_path.glob("env/lib/python*/site-packages/parent.pth")).unlink()
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import importlib.util, sys; print(importlib.util.find_spec('grass_hf'), 'ok')"
    gone = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert (gone.stdout, gone.stderr) == ("None ok\n", "")
    (tmp_path / "broken" / "grass_hf").mkdir(parents=True)
    (tmp_path / "broken" / "grass_hf" / "__init__.py").write_text("raise RuntimeError('broken')")
    broken = call("-c", "print('ok')", python=python, PYTHONPATH=str(tmp_path / "broken"))
    assert (broken.stdout, broken.stderr) == ("ok\n", "")


def test_modules_run_too(tmp_path):
    (tmp_path / "job.py").write_text("import sys\nprint(__name__, sys.argv[1:], 'grass_hf' in sys.modules)")
    result = call("-m", "grass_hf", "run", "-m", "job", "--flag", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert result.stdout.split() == ["__main__", "['--flag']", "True"], result.stderr


@pytest.mark.parametrize(
    "words, mentions",
    [
        ([], ["run", "autoload", "bench", "--optim grass"]),
        (["run"], ["accelerate launch -m grass_hf run", "Run an unmodified training script"]),
        (["autoload"], ["start-up line", "on, off, or status"]),
        (["estimate"], ["without allocating weights", "--fit", "--slice-dtype", "--gradient-checkpointing"]),
        (["bench"], ["speed"]),
        (["bench", "speed"], ["frozen limit", "--rank", "--json", "--side"]),
    ],
    ids=lambda v: " ".join(v) or "grass-hf",
)
def test_help_teaches(words, mentions):
    result = grass(*words, "--help")
    assert result.returncode == 0
    for mention in mentions:
        assert mention in result.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["run", "no_such_script.py"], "no_such_script.py is not a file"),
        (["autoload", "maybe"], "maybe"),
        (["bench", "speed", "--dtype", "int3"], "dtype='int3' is not known"),
        (["bench", "speed", "--side", "top", "--dtype", "float32"], "side='top' is not known"),
        (["bench", "speed", "--method", "grass", "--method", "galor"], "--method 'galor'"),
        (
            ["bench", "speed", "--base", "muonn"],
            "--base: 'muonn' is not an optimizer of the installed Trainer: did you",
        ),
        (["bench", "speed", "--device", "tpu"], "--device 'tpu' is not known: give cpu or cuda"),
        (["bench", "speed", "--method", "adamw"], "--method adamw: name grass, and what it is compared with"),
        (["brew"], "brew"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_get_a_sentence_and_exit_code_2(words, sentence):
    result = grass(*words)
    assert result.returncode == 2
    assert sentence in result.stderr and "Traceback" not in result.stderr


SMALL = ["--layers", 1, "--hidden", 64, "--vocabulary", 64, "--rank", 16, "--batch", 1, "--sequence", 16, "--rounds", 2]


def test_bench_speed_prints_ratios_and_files_a_row(tmp_path):
    methods = ["adamw", "grass", "frozen", "galore", "apollo", "lora"]
    words = [word for name in methods for word in ("--method", name)]
    file = tmp_path / "rows" / "speed.json"
    result = grass("bench", "speed", *SMALL, *words, "--dtype", "float32", "--json", file)
    assert result.returncode == 0, result.stderr
    assert "Grass / it" in result.stdout and all(f" {name} " in result.stdout for name in methods)
    row = json.loads(file.read_text())
    assert row["setting"]["rank"] == 16 and row["setting"]["methods"] == methods
    assert {name: len(times) for name, times in row["seconds"].items()} == dict.fromkeys(methods, 2)
    assert set(row["reselecting"]) == {"grass", "galore", "apollo"}
    for name in methods:
        assert row["grass_over"][name] == pytest.approx(row["median"]["grass"] / row["median"][name])
    assert row["peak_bytes"] == {}  # there is no allocator to ask on a CPU
    assert row["device"] and row["versions"]["torch"] and row["versions"]["galore-torch"]
    assert row["commit"] == record.machine()["commit"]  # None where there is no checkout


def test_unpack_says_what_is_known_and_writes_nothing(tmp_path):
    done = grass("unpack", "smollm2-135m", tmp_path / "base")
    assert done.returncode == 2 and "did you mean smollm2-135m-instruct?" in done.stderr
    assert not (tmp_path / "base").exists()
