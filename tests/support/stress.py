"""Random kills: a training run that is killed again and again ends with the weights of an undisturbed one.

    python tests/support/stress.py --kills 30 --json runs/stress.json

One rank or all are killed with SIGKILL at a random moment, every second time right after a checkpoint's folder has
appeared, while it is being written. Each kill is followed by a start that resumes from the last complete checkpoint.
When a run reaches its end it is compared, bit for bit, and another one begins.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from forks import Ranks, ranks
from jobs import ENGINES

from grass_hf import last_complete_checkpoint
from grass_hf.integrations.checkpoints import defect

# so that exactness needs the ranks' random states
DROPOUT = {"attention_dropout": 0.1}
STEPS = 24
RANKS = 2
OPTIONS = {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 3}


def stress(kills: int, engine: str, folder: Path, seed: int = 0) -> dict:
    """Kill so often; returns counts of what happened.

    Raises:
        AssertionError: a run did not end as the undisturbed one, or a rank stopped by itself.
    """
    dice = random.Random(seed)
    ranks(1, "nothing")  # the fork server has imported everything by then
    begun = time.monotonic()
    expected = _start(engine, folder, "undisturbed")
    expected.finish()
    lasted = time.monotonic() - begun
    counts = {"engine": engine, "ranks": RANKS, "seed": seed, "kills": 0, "in_a_save": 0, "of_all_ranks": 0}
    counts |= {"half_written": 0, "resumed": 0, "runs_equal": 0}
    while counts["kills"] < kills or counts["runs_equal"] == 0:
        name = f"run{counts['runs_equal']}"
        while True:
            counts["resumed"] += last_complete_checkpoint(folder / name) is not None
            job = _start(engine, folder, name)
            if counts["kills"] == kills or not _kill(job, folder / name, dice, lasted, counts):
                job.finish()
                break
        _compare(folder, name)
        counts["runs_equal"] += 1
    return counts


def _start(engine: str, folder: Path, name: str) -> Ranks:
    arguments = (str(folder / f"{name}.pt"), str(folder / name), RANKS, "last", OPTIONS, DROPOUT)
    return Ranks(RANKS, "train", *arguments, environment=ENGINES[engine])


def _kill(job: Ranks, folder: Path, dice: random.Random, lasted: float, counts: dict) -> bool:
    """Whether the job could be killed before it ended."""
    in_a_save = dice.random() < 0.5
    if in_a_save:
        before, skip = _folders(folder), dice.randrange(4)
        while job.running() and len(_folders(folder) - before) <= skip:
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.06))
    else:
        until = time.monotonic() + dice.uniform(0.1, 1.0) * lasted
        while job.running() and time.monotonic() < until:
            time.sleep(0.005)
    if not job.running():
        return False
    victims = range(RANKS) if dice.random() < 0.5 else [dice.randrange(RANKS)]
    for rank in victims:
        job.kill(rank)
    if len(victims) < RANKS:
        time.sleep(dice.uniform(0.0, 0.3))  # what the others do until the launcher has noticed
    job.end()
    newest = max(_folders(folder), default=None, key=lambda name: int(name.partition("-")[2]))
    counts["kills"] += 1
    counts["in_a_save"] += in_a_save
    counts["of_all_ranks"] += len(victims) == RANKS
    counts["half_written"] += newest is not None and defect(folder / newest) is not None
    return True


def _folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def _compare(folder: Path, name: str) -> None:
    ours, theirs = (torch.load(folder / f"{run}.pt") for run in (name, "undisturbed"))
    assert ours["losses"] == theirs["losses"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for key, weight in theirs["weights"].items():
        assert torch.equal(ours["weights"][key], weight), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills in all, dealt out to the engines")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args()
    reports = []
    for number, engine in enumerate(options.engines):
        share = options.kills // len(options.engines) + (number < options.kills % len(options.engines))
        with tempfile.TemporaryDirectory() as folder:
            reports.append(stress(share, engine, Path(folder), options.seed + number))
        print(json.dumps(reports[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(reports, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
