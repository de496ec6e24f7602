"""What the Makefile and the continuous integration promise, as far as it is cheap to check."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ci_runs_make_test_and_make_quality_and_nothing_else():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test", "make quality"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_make_lists_every_target():
    # `make test` runs this test: without its variables, or the inner make would announce its folder
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    listed = subprocess.run(["make"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    phony = (
        re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text().replace("\\\n", ""), flags=re.M).group(1).split()
    )
    assert [line.split()[1] for line in listed.splitlines() if line.startswith("  make ")] == phony


def test_constraints_pin_torch_and_every_line_is_a_pin():
    lines = (ROOT / "constraints/dev.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
