#!/usr/bin/env bash
# datasets 5.2.0: of a folder with two kinds of files only the kind with more files is read, without a word.
#
# Guess beforehand: load_dataset of a folder with CSV and JSON lines reads all of them, or refuses the mixture.
# Seen: it counts the files by kind, reads those of the commonest kind, and neither warns nor names the others.
# Output:
#   rows: ['first', 'second']
# Exits with 1 if the row of the other kind is there, or if it is refused. Installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet datasets==5.2.0
cd "$folder"
mkdir rows
printf 'text\nfirst\n' > rows/a.csv
printf 'text\nsecond\n' > rows/b.csv
printf '{"text": "third"}\n' > rows/c.jsonl
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/env/bin/python" - <<'EOF'
import sys

from datasets import load_dataset

rows = sorted(load_dataset("rows", split="train")["text"])
print("rows:", rows)
sys.exit(0 if rows == ["first", "second"] else 1)
EOF
