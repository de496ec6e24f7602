"""The runs of a study, made in processes of their own, one or several at a time.

The process that reads and writes the file of rows is this one alone; a line that was being written when the machine
stopped is removed when the study goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from ...measure.bench import record
from .rows import Row, read_rows

if TYPE_CHECKING:  # a worker's words go to the log from before it imports more
    from .grid import Run, Study


def run_study(study: Study, path: Path, workers: int, threads: int, limit: int | None = None) -> Iterator[Row]:
    """Make the rows that a file has not yet, and append each as soon as it is there.

    Args:
        study: what is compared.
        path: of the file; a log of what the runs say lies beside it.
        workers: runs at a time.
        threads: of each run.
        limit: rows to make; None for all.

    Raises:
        ValueError: a run cannot be made.
        RuntimeError: a process was ended from outside.
    """
    rows = read_rows(path, mend=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (threads, str(path.with_suffix(".log")))
    )
    running: dict[Future, Run] = {}
    made = 0
    # children take their threads from the environment when they load their libraries
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        while True:
            busy = {run.key for run in running.values()}
            waiting = [run for run in study.next_runs(rows) if run.key not in busy]
            while waiting and len(running) < workers and (limit is None or made + len(running) < limit):
                run = waiting.pop(0)
                running[pool.submit(_work, run, workers)] = run
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                row = _result(future, run)
                record.append(path, row)
                rows.append(row)
                made += 1
                yield row
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
        for process in list((pool._processes or {}).values()) if running else ():
            process.terminate()  # a half run is worth nothing
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future, run: Run) -> Row:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"the process of {run.method.name} was ended from outside, perhaps for want of memory; the rows so far are "
            "kept, and the same command goes on."
        ) from error


def _begin(threads: int, log: str) -> None:
    """In a new worker: its threads, and its words into the log."""
    import torch

    torch.set_num_threads(threads)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # the pool itself would let a run go on whose study was killed
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _work(run: Run, workers: int) -> Row:
    from .run import run_row

    print(
        f"-- {run.method.name} {run.learning_rate:g} x {run.multiplier:g}, seed {run.seed}", file=sys.stderr, flush=True
    )
    return run_row(run, workers)
