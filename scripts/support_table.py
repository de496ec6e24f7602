"""Try every class of the support matrix (tests/support/matrix_cases.py), each in a process; write docs/support.md.

    python scripts/support_table.py                      everything, then the page
    python scripts/support_table.py --resume             go on with what runs/support_table.json does not hold yet
    python scripts/support_table.py --only llama,bert:   types or cases ("bert:BertForMaskedLM"); no page is written
    python scripts/support_table.py --page               the page from what was found before

The exit code is 1 if any row is wrong. What was found is written to the JSON file row by row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import matrix_cases  # noqa: E402
import matrix_checks  # noqa: E402
import matrix_tools  # noqa: E402
import support_page  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

FOUND = ROOT / "runs" / "support_table.json"
# A case takes a second or two; what takes so much longer, by the clock or of a processor's time, hangs.
LIMIT, WORK = 600.0, 60


def main() -> int:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="types or cases, separated by commas")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the JSON file that are not wrong")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=FOUND)
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument(
        "--check", action="store_true", help="compare the page with what stands in docs, and write none"
    )
    options = parser.parse_args()
    cases = matrix_cases.cases()
    only = [part.rstrip(":") for part in options.only.split(",") if part]
    chosen = [c for c in cases if not only or c.name in only or c.model_type in only]
    rows = _read(options.json) if options.resume or options.page or only else {}
    if not options.page:
        done = {name for name, row in rows.items() if row["status"] != "wrong"} if options.resume else set()
        rows = _run([c for c in chosen if c.name not in done], rows, options)
    known = [rows[c.name] for c in cases if c.name in rows]
    if options.check and support_page.page(known) != support_page.PAGE.read_text(encoding="utf-8"):
        print(f"{support_page.PAGE} says something else: run make support-table")
        return 1
    if not only and not options.check:
        support_page.write(known)
    wrong = [row for row in known if row["status"] == "wrong" and (not only or row["name"] in {c.name for c in chosen})]
    for row in wrong:
        print(f"{row['name']}: {'; '.join(row['wrong'][:6])}")
    counts = {status: sum(row["status"] == status for row in known) for status in ("ok", "wrong", "not built")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if wrong else 0


def _run(todo: list[matrix_cases.Case], rows: dict[str, dict], options: argparse.Namespace) -> dict[str, dict]:
    """Try cases, so many at a time, each in a forked process with a limit of time."""
    fork = multiprocessing.get_context("fork")
    running: list[tuple[matrix_cases.Case, multiprocessing.Process, Connection, float]] = []
    waiting, start = list(reversed(todo)), time.monotonic()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    matrix_checks.check(matrix_cases.case("llama:LlamaForCausalLM"))  # imports what every case would import for itself
    while waiting or running:
        while waiting and len(running) < options.workers:
            case = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, args=(case, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((case, process, ours, time.monotonic()))
        for entry in list(running):
            if (row := _row(*entry)) is not None:
                running.remove(entry)
                rows[entry[0].name] = row
                _write(options.json, rows)
                done = len(todo) - len(waiting) - len(running)
                elapsed = time.monotonic() - start
                print(f"[{done}/{len(todo)} {elapsed:.0f} s] {row['name']}: {row['status']} {row['why']}", flush=True)
        time.sleep(0.02)
    return rows


def _row(case, process, pipe: Connection, since: float) -> dict | None:
    """What a process found, or how it ended; None while it works."""
    if pipe.poll():
        try:
            row = pipe.recv()
        except EOFError:
            process.join()
            return _failed(case, f"its process ended with exit code {process.exitcode}")
        process.join()
        return row
    if not process.is_alive():
        return _failed(case, f"its process ended with exit code {process.exitcode}")
    if time.monotonic() - since > LIMIT:
        process.kill()
        process.join()
        return _failed(case, f"not done after {LIMIT:.0f} s")
    return None


def _failed(case: matrix_cases.Case, how: str) -> dict:
    found = matrix_tools.Found(case.name, case.kind, case.cls, case.model_type, status="wrong", wrong=[how])
    return matrix_tools.as_json(found)


def _work(case: matrix_cases.Case, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (WORK + int(time.process_time()), resource.RLIM_INFINITY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    pipe.send(matrix_tools.as_json(matrix_checks.check(case)))
    pipe.close()


def _read(path: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def _write(path: Path, rows: dict[str, dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(list(rows.values()), indent=1))
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
