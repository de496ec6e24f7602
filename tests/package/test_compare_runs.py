"""scripts/compare_runs.py on the files of runs."""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs.py"


def filed(folder: Path, name: str, rate: float, after: float, **section) -> Path:
    out = folder / name
    out.mkdir()
    entries = [{"step": 0, "eval_perplexity": 50.0}, {"step": 5, "loss": 3.0}, {"step": 10, "eval_perplexity": after}]
    (out / "training.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    said = {
        "command": f"grass-hf train {name}",
        "results": {"perplexity before": 50.0, "perplexity after": after},
        "memory": {"process": 2**31},
        "machine": {"device": "a CPU"},
        "recipe": {"training": {"output_dir": str(out), "learning_rate": rate}, **section},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(said))
    return path


def test_a_table_rows_and_a_figure_of_runs(tmp_path, monkeypatch, capsys):
    runs = [
        filed(tmp_path, "full", 1e-4, 32.5),
        filed(tmp_path, "grass", 2e-4, 31.0, grass={"density": 0.25, "update_interval": 20}),
        filed(tmp_path, "lora", 5e-4, 40.0, lora={"lora_r": 8}),
        filed(tmp_path, "muon", 1e-3, 33.0, grass={"rank": 8, "density": None, "update_interval": 200, "base": "muon"}),
    ]
    rows, figure = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, runs), "--json", str(rows), "--png", str(figure)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| method | rate | perplexity before | after")
    assert table[2:] == [
        "| Grass, 0.25 of all rows, K = 20 | 0.0002 | 50 | 31 | 2.00 |",
        "| Grass, r = 8, K = 200, muon | 0.001 | 50 | 33 | 2.00 |",
        "| LoRA, r = 8 | 0.0005 | 50 | 40 | 2.00 |",
        "| trained in full, AdamW | 0.0001 | 50 | 32.5 | 2.00 |",
    ]
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert kept[0]["perplexity"] == {"0": 50.0, "10": 31.0} and kept[3]["command"] == "grass-hf train full"
    assert figure.read_bytes().startswith(b"\x89PNG")
