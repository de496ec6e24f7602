"""Runs of `grass-hf train` side by side: a Markdown table of their results, and their held-out losses in one figure.

    compare_runs.py runs/smollm2/*.json --json docs/results/finetune_smollm2.jsonl --png docs/finetune_smollm2.png

Every argument is the file of a run's `--json`; the curve is read from the training.jsonl in the run's output folder.
With `--json` a line per run is written: command, results, memory, machine and the held-out values by step.
"""

import argparse
import json
from pathlib import Path

STYLES = {"Grass": "C0", "LoRA": "C2", "trained in full": "C1"}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="perplexity", help="of the evaluation: perplexity, accuracy, ...")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


def method(recipe: dict) -> str:
    if recipe.get("lora"):
        return f"LoRA, r = {recipe['lora']['lora_r']}"
    if (said := recipe.get("grass")) is None:
        return "trained in full, AdamW"
    share = f"r = {said['rank']}" if said.get("rank") else f"{said['density']:g} of all rows"
    base = f", {said['base']}" if said.get("base") else ""
    return f"Grass, {share}, K = {said['update_interval']}{base}"


def row(file: Path, metric: str) -> dict:
    """What is kept of a run."""
    said = json.loads(file.read_text())
    training, results = said["recipe"]["training"], said["results"]
    lines = (Path(training["output_dir"]) / "training.jsonl").read_text().splitlines()
    found = {entry["step"]: entry[f"eval_{metric}"] for entry in map(json.loads, lines) if f"eval_{metric}" in entry}
    kept = {"method": method(said["recipe"]), "rate": training["learning_rate"], "command": said["command"]}
    return {**kept, "results": results, "memory": said["memory"], "machine": said["machine"], metric: found}


def table(rows: list[dict], metric: str) -> str:
    lines = [f"| method | rate | {metric} before | after | process, GiB at most |", "|---|---:|---:|---:|---:|"]
    for found in rows:
        before, after = (found["results"][f"{metric} {when}"] for when in ("before", "after"))
        memory = found["memory"]["process"] / 2**30
        lines.append(f"| {found['method']} | {found['rate']:g} | {before:.4g} | {after:.4g} | {memory:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict], metric: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for found in rows:
        color = next(color for name, color in STYLES.items() if found["method"].startswith(name))
        same = [other for other in rows if other["method"] == found["method"]]
        style = ["-", "--", ":", "-."][same.index(found) % 4]
        label = f"{found['method'].split(',')[0]}, {found['rate']:g}"
        axes.plot(list(found[metric]), list(found[metric].values()), color=color, linestyle=style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"held-out {metric}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parsed()
    rows = sorted((row(file, args.metric) for file in args.runs), key=lambda found: (found["method"], found["rate"]))
    print(table(rows, args.metric))
    if args.json:
        args.json.write_text("".join(json.dumps(found) + "\n" for found in rows))
    if args.png:
        draw(rows, args.metric, args.png)


if __name__ == "__main__":
    main()
