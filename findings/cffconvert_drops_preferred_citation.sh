#!/usr/bin/env bash
# cffconvert 2.0.0: BibTeX of a CITATION.cff is never the preferred citation, and is written under a key for all files alike.
#
# Guess beforehand: with `preferred-citation` in the file, which the format has for "cite this instead of the software",
# `cffconvert -f bibtex` gives the article.
# Seen: it gives the software, without a word, and no version; the article appears in no line. `--validate` finds
# nothing to say, the schema knows the field. Whoever makes BibTeX of our file by it cites no paper. Output:
#   valid: Citation metadata are valid according to schema version 1.2.0.
#   @misc{YourReferenceHere,
#   author = {grass-hf contributors},
#   title = {the software}
#   }
#   the article in it: no
# Exits with 1 if the article appears. Installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet cffconvert==2.0.0 setuptools==69.5.1
cd "$folder"
cat > CITATION.cff <<'EOF'
cff-version: 1.2.0
message: Cite the article.
title: the software
version: 0.1.0
authors:
  - name: grass-hf contributors
preferred-citation:
  type: article
  title: the article
  authors:
    - family-names: Muhamed
      given-names: Aashiq
  year: 2024
  journal: arXiv preprint arXiv:2406.17660
EOF
echo "valid: $(env/bin/cffconvert --validate)"
env/bin/cffconvert -f bibtex | tee bibtex
if grep -q "the article" bibtex; then
    echo "the article in it: yes"
    exit 1
fi
echo "the article in it: no"
