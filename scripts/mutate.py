"""Can the tests fail? Makes each mistake of mutate.yaml in a copy of the tree and runs the test that must find it.

    mutate.py [--only NAME] [--json runs/mutate.json]

Every test is run in the copy without a mistake first, where it must pass. One line per mistake: "caught" with what the
test said, "SURVIVED", or what went wrong. The exit code is 1 unless all were caught.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
# of one test; a mistake that makes it hang is not caught
SECONDS = 400
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that it ran nothing


@dataclass(frozen=True)
class Mutation:
    """A mistake to make: `old` becomes `new` in `file`, and `test`, arguments of pytest, must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def times(self, root: Path = ROOT) -> int:
        """How often `old` stands in the file: once, or the list has rotted."""
        return (root / self.file).read_text().count(self.old)


def mutations() -> list[Mutation]:
    return [Mutation(**entry) for entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]


def copy_tree(to: Path) -> None:
    """The files that git tracks, and new ones that it does not ignore, as they are now."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def in_copy(copy: Path, *arguments: str) -> tuple[int | None, str]:
    """Exit code, None of a python that ran too long, and output; what it started is ended with it."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=copy,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return code, output.read()


def check_copy(copy: Path) -> None:
    """Stop unless the copy is what is tested.

    Raises:
        RuntimeError: python imports another grass_hf.
    """
    code, said = in_copy(copy, "-c", "import grass_hf; print(grass_hf.__file__)")
    if code != 0 or not said.strip().endswith(str(copy / "grass_hf" / "__init__.py")):
        raise RuntimeError(f"the copy in {copy} is not what python imports, but {said.strip()}")


def run_test(copy: Path, test: str) -> tuple[int | None, str]:
    """pytest's exit code, and what it found wrong: the last error, which is a rank's where ranks have failed."""
    code, said = in_copy(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *shlex.split(test))
    wrong = [line[1:].strip() for line in said.splitlines() if line.startswith("E ")]
    errors = [line for line in wrong if re.match(r"(\[rank\d+\]: )?\w*(Error|Exception)\b", line)]
    return code, (errors[-1:] or wrong[:1] or said.splitlines()[-1:] or [""])[0]


def outcome(mutation: Mutation, copy: Path, healthy: dict[str, str]) -> tuple[str, str]:
    """In a word, and what was said."""
    if mutation.times(copy) != 1:
        return "the old text is gone", f"it stands {mutation.times(copy)} times in {mutation.file}"
    if mutation.test not in healthy:
        code, said = run_test(copy, mutation.test)
        healthy[mutation.test] = "" if code == PASSED else said or f"exit code {code}"
    if healthy[mutation.test]:
        return "the test fails without it", healthy[mutation.test]
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        code, said = run_test(copy, mutation.test)
    finally:
        path.write_text(text)
    words = {PASSED: "SURVIVED", FAILED: "caught", None: f"hung for {SECONDS} s"}
    return words.get(code, f"pytest ended with {code}"), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run those whose name has this in it")
    parser.add_argument("--json", type=Path, help="write a list of what came of each")
    given = parser.parse_args()
    chosen = [mutation for mutation in mutations() if not given.only or given.only in mutation.name]
    if not chosen:
        parser.error(f"--only {given.only!r} is in no name of mutate.yaml")
    found, healthy = [], {}
    with tempfile.TemporaryDirectory(prefix="mutate") as folder:
        copy = Path(folder).resolve()
        copy_tree(copy)
        check_copy(copy)
        for mutation in chosen:
            begun = time.monotonic()
            word, said = outcome(mutation, copy, healthy)
            seconds = round(time.monotonic() - begun, 1)
            found.append({**asdict(mutation), "outcome": word, "said": said, "seconds": seconds})
            print(f"{word:9} {seconds:6.1f} s  {mutation.name}: {said[:110]}", flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    caught = sum(row["outcome"] == "caught" for row in found)
    print(f"{caught} of {len(found)} caught")
    return 0 if caught == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
