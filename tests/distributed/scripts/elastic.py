"""A Trainer run that torchrun restarts: elastic.py FILE FOLDER. Rank 1 dies in a save, then in a step."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import jobs
from helpers import leave
from stress import DROPOUT

life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if os.environ["RANK"] == "0":
    print("life", life, flush=True)
deaths = [(jobs.DieInSave(1, 6, "rng_state_1.pth"),), (jobs.DieInStep(1, 7),), ()]
jobs.train(sys.argv[1], sys.argv[2], 2, "last", {"save_steps": 2}, DROPOUT, deaths[life])
leave()
