"""Train two steps in the tools that people use, each in an environment of its own, through the tool's own entry point.

    test_tools.py [--tool NAME] [--json runs/test_tools.json]

tests/tools/tools.yaml lists the tools; tests/tools/try_NAME.py is the trial of one and runs in its environment. An
environment that cannot be made is a failure like any other. The last lines are a table; the exit code is 1 unless all
have passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TRIALS = ROOT / "tests" / "tools"
ENVIRONMENTS = ROOT / ".venv-tools"
INSTALL_SECONDS, TRIAL_SECONDS = 1800, 900


@dataclass(frozen=True)
class Tool:
    """A tool to try.

    Attributes:
        name: of its environment and its trial.
        package: the distribution whose version the table shows.
        pip: arguments of `pip install`, one command after another.
        remove: files to take out of the environment afterwards, as a pattern below it.
    """

    name: str
    package: str
    pip: list[str]
    remove: str = ""

    @property
    def trial(self) -> Path:
        return TRIALS / f"try_{self.name.replace('-', '_')}.py"

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python"

    def stamp(self) -> str:
        """Changes with everything that the environment is made from."""
        files = [ROOT / "setup.cfg", *(ROOT / name for name in re.findall(r"constraints/\S+", " ".join(self.pip)))]
        text = json.dumps([asdict(self), sys.version]) + "".join(path.read_text() for path in files)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Outcome:
    """A row of the table."""

    tool: str
    version: str = "-"
    transformers: str = "-"
    result: str = ""
    seconds: float = 0.0
    said: str = field(default="", repr=False)


def tools() -> list[Tool]:
    return [Tool(**entry) for entry in yaml.safe_load((TRIALS / "tools.yaml").read_text())]


def ran(command: list[str | Path], seconds: int, **options) -> tuple[int, str]:
    """Exit code and output of a command, which sees nothing of the environment that we run in."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, **options
        )
        return done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as late:
        return 124, (late.stdout or b"").decode(errors="replace") + f"\nlonger than {seconds} s"


def make_environment(tool: Tool) -> str:
    """Make it, or make it again where what it is made from has changed; what went wrong, or nothing."""
    folder = ENVIRONMENTS / tool.name
    mark = folder / "stamp"
    if mark.is_file() and mark.read_text() == tool.stamp():
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    commands = [[sys.executable, "-m", "venv", folder]]
    commands += [[tool.python, "-m", "pip", "install", "--quiet", *shlex.split(line)] for line in tool.pip]
    for command in commands:
        print("$", *command, flush=True)
        code, said = ran(command, INSTALL_SECONDS, cwd=ROOT)
        if code:
            return said
    for path in folder.glob(tool.remove) if tool.remove else ():
        path.unlink()
    mark.write_text(tool.stamp())
    return ""


def version(tool: Tool, package: str) -> str:
    code, said = ran([tool.python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], 60)
    return "-" if code else said.strip()


def tried(tool: Tool) -> Outcome:
    """Make its environment and run its trial in an empty folder."""
    outcome = Outcome(tool.name)
    begun = time.monotonic()
    wrong = make_environment(tool)
    if wrong:
        outcome.result, outcome.said = "NOT INSTALLED", wrong
    else:
        outcome.version, outcome.transformers = version(tool, tool.package), version(tool, "transformers")
        with tempfile.TemporaryDirectory(prefix="tool") as folder:
            code, outcome.said = ran([tool.python, tool.trial], TRIAL_SECONDS, cwd=folder)
        outcome.result = "passed" if code == 0 else f"FAILED ({code})"
    outcome.seconds = round(time.monotonic() - begun, 1)
    print(outcome.said[-8000:], flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", help="only this one")
    parser.add_argument("--json", type=Path, help="write the table here")
    given = parser.parse_args()
    chosen = [tool for tool in tools() if given.tool in (None, tool.name)]
    if not chosen:
        parser.error(f"--tool {given.tool}: choose one of {', '.join(tool.name for tool in tools())}")
    outcomes = []
    for tool in chosen:
        print(f"== {tool.name}", flush=True)
        outcomes.append(tried(tool))
    table = Table("tool", "version", "transformers", "result", "seconds", title="Two steps in each tool, CPU")
    for row in outcomes:
        table.add_row(row.tool, row.version, row.transformers, row.result, str(row.seconds))
    Console().print(table)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(row) for row in outcomes], indent=1) + "\n")
    return 0 if all(row.result == "passed" for row in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
