#!/usr/bin/env bash
# evaluate 0.4.6 with datasets 5.2.0: a metric module whose two imports stand on one line cannot be loaded.
#
# Guess beforehand: a metric module is Python, so `import datasets, evaluate` does what two lines do.
# Seen: evaluate reads the module's imports as text, one name a line. It takes "datasets," (with the comma) for a package,
# says that it is not installed, and asks to `pip install datasets,`. With one import a line the module loads. Output:
#   two lines: {'n': 1}
#   one line: ImportError ['datasets,']
# Exits with 1 if the module with one line loads. Installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet evaluate==0.4.6 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/env/bin/python" - <<'EOF'
import re
import sys
from pathlib import Path

import evaluate

MODULE = """
class Count(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="d", citation="c", inputs_description="i", features=features)

    def _compute(self, predictions, references):
        return {"n": len(predictions)}
"""
loads = False
for name, imports in (("two", "import datasets\nimport evaluate\n"), ("one", "import datasets, evaluate\n")):
    Path(name).mkdir()
    Path(name, f"{name}.py").write_text(imports + MODULE)
    line = "two lines" if name == "two" else "one line"
    try:
        print(f"{line}:", evaluate.load(name).compute(predictions=[1], references=[1]))
        loads = name == "one"
    except ImportError as error:
        print(f"{line}: ImportError", re.findall(r"\[.*?\]", str(error))[0])
sys.exit(1 if loads else 0)
EOF
