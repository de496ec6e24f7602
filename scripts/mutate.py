"""Can the tests fail? Makes each mistake of mutate.yaml in a copy of the tree and runs the test that must find it.

    mutate.py [--only NAME] [--json runs/mutate.json]

Every test is run in the copy without a mistake first, where it must pass; each in a process that is forked from this
one, which has imported the libraries. One line per mistake: "caught" with what the test said, "SURVIVED", or what went
wrong. The exit code is 1 unless all were caught.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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


def import_libraries() -> None:
    """What nearly every test imports, once: a process that is forked from this one has it already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    sys.dont_write_bytecode = True
    for name in ("torch", "transformers", "accelerate", "datasets", "peft", "pytest", "safetensors.torch", "typer"):
        importlib.import_module(name)


def in_copy(copy: Path, work: Callable[[], int]) -> tuple[int | None, str]:
    """Exit code, None of a process that ran too long, and output; what it started is ended with it."""
    with tempfile.TemporaryFile("w+") as output:
        process = multiprocessing.get_context("fork").Process(target=_at_work, args=(copy, work, output.fileno()))
        process.start()
        process.join(SECONDS)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        output.seek(0)
        return code, output.read()


def _at_work(copy: Path, work: Callable[[], int], output: int) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    code = work()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(code))


def check_copy(copy: Path) -> None:
    """Stop unless the copy is what is tested.

    Raises:
        RuntimeError: python imports another grass_hf.
    """

    def where() -> int:
        print(importlib.import_module("grass_hf").__file__)
        return 0

    code, said = in_copy(copy, where)
    if code != 0 or not said.strip().endswith(str(copy / "grass_hf" / "__init__.py")):
        raise RuntimeError(f"the copy in {copy} is not what python imports, but {said.strip()}")


def run_test(copy: Path, test: str) -> tuple[int | None, str]:
    """pytest's exit code, and what it found wrong: the last error, which is a rank's where ranks have failed."""
    words = ["-q", "-x", "-p", "no:cacheprovider", "-m", "", *shlex.split(test)]
    code, said = in_copy(copy, lambda: importlib.import_module("pytest").main(words))
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
    import_libraries()
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
