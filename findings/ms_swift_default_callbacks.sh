#!/usr/bin/env bash
# ms-swift 4.6.0 with transformers 5.19.0: importing its trainers takes every default callback out of transformers.
#
# Guess beforehand: importing a library of trainers leaves `transformers.trainer.DEFAULT_CALLBACKS` as it was, or adds to
# it; callbacks that other libraries have appended to the list stay in every Trainer, ms-swift's own or not.
# Seen: the list is replaced by one with a single callback of ms-swift's, so that what was appended before is gone from
# all Trainers that are made later in the process, without a message. Output:
#   before: ['DefaultFlowCallback', 'Mine']
#   after: ['DefaultFlowCallbackNew']
# Exits with 1 if the callback that was appended stays. Installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 ms-swift==4.6.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'EOF'
import sys

import transformers.trainer as trainer
from transformers import TrainerCallback


class Mine(TrainerCallback):
    """What another library adds for every Trainer."""


trainer.DEFAULT_CALLBACKS.append(Mine)
print("before:", [callback.__name__ for callback in trainer.DEFAULT_CALLBACKS])
from swift.trainers import Trainer  # noqa: E402, F401

print("after:", [callback.__name__ for callback in trainer.DEFAULT_CALLBACKS])
sys.exit(1 if Mine in trainer.DEFAULT_CALLBACKS else 0)
EOF
