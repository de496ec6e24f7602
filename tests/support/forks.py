"""Ranks as forks of one process that has imported everything: a start costs a second instead of ten.

``ranks(2, "run", settings)`` runs `run` of tests/support/jobs.py on two ranks over gloo, as torchrun would: the same
environment variables, one process each. ``"batches.run"`` is that of tests/support/batches.py. `Ranks.kill` is SIGKILL.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

_context = multiprocessing.get_context("forkserver")
# By name, not by path: 3.11's fork server does not pass sys.path on before it has forked.
_context.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "accelerate",
        "grass_hf.integrations.trainer",
    ]
)


class Ranks:
    """Processes that train together.

    Attributes:
        folder: where rank N writes what it says, in "N.out".
    """

    def __init__(self, count: int, job: str, *arguments, environment: dict[str, str] | None = None):
        self.folder = Path(mkdtemp(prefix="ranks"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", **(environment or {})}
        self.processes = []
        for rank in range(count):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            target = (str(self.folder / f"{rank}.out"), own, job, arguments)
            self.processes.append(_context.Process(target=_begin, args=target, daemon=True))
        for process in self.processes:
            process.start()

    def kill(self, rank: int) -> None:
        """SIGKILL: nothing of the process runs on."""
        self.processes[rank].kill()

    def running(self) -> bool:
        """Whether all ranks still run."""
        return all(process.exitcode is None for process in self.processes)

    def end(self) -> None:
        """As a launcher does when a rank is gone: the others are killed too."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self, timeout: float = 300) -> list[str]:
        """Wait until all have ended well, and return what each said.

        Raises:
            AssertionError: one has not; with the end of what it said.
        """
        until = time.monotonic() + timeout
        while self.running() and time.monotonic() < until:
            time.sleep(0.02)
        for process in self.processes:
            process.join(max(0.1, min(10.0, until - time.monotonic())))
        codes = [process.exitcode for process in self.processes]
        self.end()
        said = [(self.folder / f"{rank}.out").read_text() for rank in range(len(codes))]
        assert codes == [0] * len(codes), f"{codes}\n" + "\n".join(text[-3000:] for text in said)
        return said


def ranks(
    count: int, job: str, *arguments, environment: dict[str, str] | None = None, timeout: float = 300
) -> list[str]:
    """What each of `count` ranks said while it ran a job of tests/support/jobs.py."""
    return Ranks(count, job, *arguments, environment=environment).finish(timeout)


def _begin(output: str, environment: dict[str, str], job: str, arguments: tuple) -> None:
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    import torch
    from helpers import leave

    torch.set_num_threads(1)
    module, _, name = job.rpartition(".")
    getattr(importlib.import_module(module or "jobs"), name)(*arguments)
    leave()  # without exit handlers of the process that was forked
