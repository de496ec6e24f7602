"""How much of many small updates reaches bfloat16 weights, by setting: the table of docs/precision.md."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from test_precision import ones_that_shrink

SETTINGS = [
    {"density": 0.5, "slice_dtype": "bfloat16"},
    {"density": 0.5, "rounding": "nearest"},
    {"density": 0.5},
    {"density": 1.0},
]

table = Table("setting", "should arrive", "arrives")
for settings in SETTINGS:
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    table.add_row(shown, f"{0.04 * settings['density']:.3f}", f"{ones_that_shrink(**settings):.4f}")
Console().print(table)
