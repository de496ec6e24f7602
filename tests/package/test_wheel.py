"""The wheel in an environment without the checkout, and the sdist that makes the same wheel.

By default the environment has this one's packages but not its grass_hf. `make test-wheel` names an empty one, into
which the wheel and its extra were installed, by GRASS_HF_WHEEL_PYTHON.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
SMALL = "--max_steps 2 --eval_steps 2 --max_train_rows 6 --max_eval_rows 2 --tokenizer_vocab_size 300"
SMALL += " --sequence_length 32"


def build(kind, source, out):
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=source, env=clean(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def clean():
    """The environment without what would lead to the checkout."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GRASS_HF_QUIET")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel of a copy of the checkout, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    return build("wheel", folder / "source", folder), build("sdist", folder / "source", folder)


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    if "GRASS_HF_WHEEL_PYTHON" in os.environ:
        return os.environ["GRASS_HF_WHEEL_PYTHON"]
    folder = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    zipfile.ZipFile(built[0]).extractall(packages)
    # a plain line: the .pth files there, of an editable install, are not read
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(folder / "bin" / "python")


def call(python, folder, *words):
    env = {**clean(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run([python, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def contents(wheel):
    with zipfile.ZipFile(wheel) as files:
        return {name: files.read(name) for name in files.namelist() if not name.endswith("RECORD")}


def test_the_wheel_has_all_that_is_shipped_and_the_sdist_makes_the_same(built, tmp_path):
    wheel, sdist = built
    names = set(contents(wheel))
    for folder in ("configs", "recipes"):
        for path in (path for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"):
            assert f"grass_hf/config/shipped/{path.relative_to(ROOT)}" in names
    assert "grass_hf/py.typed" in names
    assert {f"grass_hf/{path.relative_to(ROOT / 'grass_hf')}" for path in (ROOT / "grass_hf").rglob("*.py")} <= names
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path, filter="data")
    again = build("wheel", next(tmp_path.glob("grass_hf-*")), tmp_path)
    assert contents(again) == contents(wheel)


def test_it_is_the_wheel_that_runs(python, tmp_path):
    found = call(python, tmp_path, "-c", "import grass_hf; print(grass_hf.__file__)").stdout
    assert "site-packages" in found and str(ROOT / "grass_hf") not in found


def test_recipes_are_listed_shown_and_copied(python, tmp_path):
    listed = call(python, tmp_path, "-m", "grass_hf", "recipes", "list").stdout
    for path in (*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "configs/accelerate").glob("*.yaml")):
        assert f"  {path.stem}\n" in listed
    shown = call(python, tmp_path, "-m", "grass_hf", "recipes", "show", "llama_demo_sotu").stdout
    assert shown == (ROOT / "recipes/pretrain/llama_demo_sotu.yaml").read_text()
    for name in ("llama_1b_c4", "zero3_8gpu", "qwen3_0b6_gsm8k"):
        assert call(python, tmp_path, "-m", "grass_hf", "recipes", "copy", name, "mine").returncode == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "llama_1b_c4.yaml",
        "ddp_8gpu.yaml",
        "zero3_8gpu.yaml",
        "zero3.json",
        "qwen3_0b6_gsm8k.yaml",
        "gsm8k_rewards.py",
    }
    command = (tmp_path / "mine/llama_1b_c4.yaml").read_text().splitlines()[0]
    assert command == "# accelerate launch --config_file mine/ddp_8gpu.yaml -m grass_hf train mine/llama_1b_c4.yaml"
    assert "deepspeed_config_file: mine/zero3.json" in (tmp_path / "mine/zero3_8gpu.yaml").read_text()
    again = call(python, tmp_path, "-m", "grass_hf", "recipes", "copy", "llama_1b_c4", "mine")
    assert again.returncode == 2 and "is there already" in again.stderr
    near = call(python, tmp_path, "-m", "grass_hf", "recipes", "show", "llama_demo_soto")
    assert near.returncode == 2 and "did you mean llama_demo_sotu?" in near.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        ("estimate llama_1b --sequence 16 --method frozen", "peak"),
        (f"validate llama_demo_sotu --no-memory {SMALL}", "llama_demo_sotu: nothing is wrong with it"),
        (f"train llama_demo_sotu {SMALL} --prompts null", "perplexity: untrained"),
    ],
    ids=lambda words: words.split()[0],
)
def test_commands_run_without_a_checkout_and_say_nothing_of_other_packages(python, tmp_path, words, says):
    done = call(python, tmp_path, "-m", "grass_hf", *words.split())
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    for noise in ("Failed to load", "Enum subclass", "kernels-community", "bitsandbytes"):
        assert noise not in done.stdout + done.stderr
