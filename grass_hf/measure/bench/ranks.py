"""N processes of `grass_hf.measure.bench.worker` that are told the same, and what they answer."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[3]
# Lines of a rank's standard error that are shown when it fails.
_LAST = 12


class Ranks:
    """A context in which the processes run; when it is left, however, they are ended.

    Args:
        count: N.
        prefix: words before the command, `unshare --net` say.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, count: int, prefix: Sequence[str] = (), timeout: float = 600.0):
        self.count, self.prefix, self.timeout = count, prefix, timeout
        self.processes: list[subprocess.Popen] = []
        self._errors: list[Any] = []

    def __enter__(self) -> Ranks:
        command = [*self.prefix, sys.executable, "-m", "grass_hf.measure.bench.worker"]
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        pipes |= {"env": environment, "start_new_session": True}
        try:
            for _ in range(self.count):
                self._errors.append(tempfile.TemporaryFile())
                # a session of its own: Ctrl-C reaches this process alone, which then ends them
                started = subprocess.Popen(command, stderr=self._errors[-1], **pipes)
                self.processes.append(started)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, command: str, each: Sequence[dict[str, Any]] | None = None, **arguments: Any) -> list[Any]:
        """Have every rank do something, and wait for all of them.

        Args:
            command: a method of `worker.Rank`.
            each: arguments of each rank's own.
            arguments: the same for all.

        Returns:
            The answers, by rank.

        Raises:
            RuntimeError: a rank ended or did not answer in time.
        """
        for rank, process in enumerate(self.processes):
            told = {command: {**arguments, **(each[rank] if each else {})}}
            assert process.stdin is not None  # a pipe
            try:
                process.stdin.write(json.dumps(told).encode() + b"\n")
            except BrokenPipeError:
                self._report(rank, command, "has ended")
        return self._answers(command)

    def _answers(self, command: str) -> list[Any]:
        until = time.monotonic() + self.timeout
        answers: list[Any] = [None] * self.count
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None  # a pipe
                waiting.register(process.stdout, selectors.EVENT_READ, (rank, process.stdout))
            while waiting.get_map():
                ready = waiting.select(timeout=max(0.0, until - time.monotonic()))
                if not ready:
                    rank, _ = next(iter(waiting.get_map().values())).data
                    self._report(rank, command, f"has not answered within {self.timeout:.0f} s")
                for key, _ in ready:
                    rank, stdout = key.data
                    line = stdout.readline()
                    if not line:
                        self._report(rank, command, "has ended")
                    answers[rank] = json.loads(line)
                    waiting.unregister(key.fileobj)
        return answers

    def _report(self, rank: int, command: str, what: str) -> None:
        error = self._errors[rank]
        error.seek(0)
        last = error.read().decode(errors="replace").splitlines()[-_LAST:]
        raise RuntimeError("\n".join([f"rank {rank} of {self.count} {what} in {command!r}; it said last:", *last]))

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        for error in self._errors:
            error.close()
