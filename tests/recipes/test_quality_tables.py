"""Studies: which runs come next, their tables, and the commands as they are typed."""

import copy
import json
import math
import os
import subprocess
import sys
import time

import psutil
import pytest
import recipe_files
from test_quality import ROOT, SMOKE, STUDIES, study_of

from grass_hf.recipes.study.grid import load_study
from grass_hf.recipes.study.report import entries, write_report
from grass_hf.recipes.study.rows import read_rows


def row_of(run, loss, **more):
    document = run.study.document
    return {
        "bench": "quality",
        "key": run.key,
        "study": "s",
        "method": run.method.name,
        "kind": run.method.kind,
        "settings": run.method.settings,
        "learning_rate": run.learning_rate,
        "multiplier": run.multiplier,
        "seed": run.seed,
        "document": document,
        "text": "t",
        "evaluated_tokens": 10,
        "status": "finished" if loss is not None else "diverged",
        "loss": loss,
        "loss_before": 6.0,
        "tokens": 320,
        "tokens_per_step": 32,
        "trainable": 1000,
        "peak_bytes": 2**20,
        "workers": 1,
        "tokens_per_second": 64.0,
        "seconds": 5.0,
        "validation": [[5, 3.0, 1.0], [10, loss, 2.0]] if loss is not None else [],
        "commit": "abc",
        "device": "a machine",
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        **more,
    }


def test_finalists_follow_the_grid_and_methods_take_turns(document, tmp_path):
    grid = {"learning_rates": [0.001, 0.01, 0.1], "multipliers": [0.3, 1.0, 3.0]}
    methods = {"adamw": None, "galore": None, "frozen": None}
    study = study_of(document, tmp_path, grid=grid, methods=methods, seeds=[5, 6, 7], finalists=2)
    assert study.size() == 9 + 9 + 3 + 2 * (2 + 2 + 2)
    first = study.next_runs([])
    assert len(first) == 21 and {run.seed for run in first} == {5}
    assert [run.method.name for run in first[:3]] == ["adamw", "galore", "frozen"]
    assert (first[0].learning_rate, first[0].multiplier) == (0.01, 1.0)  # the middle
    done = [row_of(run, 4 + run.learning_rate + run.multiplier) for run in first if run.method.name == "adamw"]
    done[3]["loss"] = None
    rest = study.next_runs(done)
    finals = [run for run in rest if run.seed != 5]
    best = sorted((r for r in done if r["loss"]), key=lambda r: r["loss"])[:2]
    assert {(run.learning_rate, run.multiplier) for run in finals} == {
        (r["learning_rate"], r["multiplier"]) for r in best
    }
    assert {run.seed for run in finals} == {6, 7} and {run.method.name for run in finals} == {"adamw"}
    assert study.missing([]) == study.size() and study.missing(done) == study.size() - len(done)
    while runs := study.next_runs(done):
        done += [row_of(run, 4.0) for run in runs]
        assert study.missing(done) == study.size() - len(done)
    assert len(done) == study.size()


def test_a_key_is_what_decides_about_a_run(document, tmp_path):
    def keys(**changes):
        return [run.key for run in study_of(document, tmp_path, **changes).next_runs([])]

    base = keys(methods={"grass": None})
    assert keys(methods={"other name": {"method": "grass"}}) == base
    assert keys(methods={"grass": {"settings": {"density": 0.25}}}) == base  # the default, written out
    for changes in (
        {"methods": {"grass": {"settings": {"update_interval": 7}}}},
        {"methods": {"grass": None}, "seeds": [3]},
        {"methods": {"grass": None}, "grid": {"learning_rates": [0.02], "multipliers": [0.5]}},
        {"methods": {"adamw": None}},
        {"methods": {"grass": None}, "eval_blocks": 4},
        {"methods": {"grass": None}, "target_warmup": 4},
    ):
        assert not set(keys(**changes)) & set(base), changes


REFUSED = [
    ({"rank": 0}, "study.rank is missing"),
    ({"rank": 2.5}, "study.rank=2.5 is not a positive whole number"),
    ({"seeds": [0, 0]}, "no list of different whole numbers"),
    ({"finalists": 0}, "study.finalists=0"),
    ({"target_warmup": -1}, "study.target_warmup=-1 is not a whole number: give 0 or more"),
    ({"sedes": [1]}, "did you mean seeds"),
    ({"methods": {"adam": None}}, "did you mean adamw"),
    ({"methods": {"a": {"method": "galroe"}}}, "did you mean galore"),
    ({"methods": {"galore": {"settings": {"gap": 3}}}}, "'gap' is not a setting of galore"),
    ({"methods": {"adamw": {"settings": {"rank": 3}}}}, "'rank' is not a setting of adamw"),
    ({"methods": {"grass": {"settings": {"side": "top"}}}}, "side='top' is not known"),
    ({"methods": {"grass": {"settings": {"scale": 0.5}}}}, "scale is what the study's multipliers set"),
    ({"methods": {"grass": {"settings": {"base": "adamw_troch"}}}}, "grass: base: .* did you mean adamw_torch"),
    ({"methods": {"grass": {"settings": {"base": "galore_adamw"}}}}, "grass: base=galore_adamw projects full"),
    ({"methods": {"adamw": {"learning_rates": [0.1, 0.01]}}}, "no rising list of positive numbers"),
    ({"methods": {"adamw": {"multipliers": ["x"]}}}, "no rising list of positive numbers"),
    (
        {"methods": {"adamw": None, "galore": {"learning_rates": [0.1, 0.2]}}},
        "grids are of equal size for every method",
    ),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=lambda value: str(value)[:40])
def test_a_study_that_cannot_be_run_says_why(document, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        study_of(document, tmp_path, **changes)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path):
    study = load_study(path)
    assert study.size() >= len(study.methods) and len(study.seeds) >= 2
    keys = [run.key for run in study.next_runs([])]
    assert len(set(keys)) == len(keys)  # no method stands there twice


# -- tables --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_rows_say(document, tmp_path):
    grid = {"learning_rates": [0.001, 0.01, 0.1], "multipliers": [0.3, 1.0, 3.0]}
    study = study_of(document, tmp_path, grid=grid, methods={"adamw": None, "grass": None}, seeds=[0, 1])
    losses = {("adamw", 0.01, 1.0): (2.0, 2.2), ("adamw", 0.1, 1.0): (1.5, None), ("grass", 0.1, 3.0): (1.9, 1.7)}
    made = [
        row_of(run, losses.get((run.method.name, run.learning_rate, run.multiplier), (3.0, 3.0))[run.seed])
        for run in study.next_runs([])
    ]
    grass, adamw = entries(made)
    assert (grass.name, adamw.name) == ("grass", "adamw")
    assert grass.best == (0.1, 3.0) and grass.edges() == "rate highest, multiplier highest"
    assert adamw.best == (0.01, 1.0) and adamw.edges() == "no"  # and not the point that diverged once
    assert adamw.loss(adamw.best) == pytest.approx(2.1) and adamw.loss((0.1, 1.0)) == math.inf
    files = write_report(made, tmp_path / "out", "table", "the command", "A title")
    assert [path.name for path in files] == ["table.md", "table.png"] and files[1].stat().st_size > 10_000
    text = files[0].read_text()
    assert text.startswith("# A title") and "`the command`" in text and "commit abc; a machine" in text
    cells = [f"{math.exp(2.1):.1f}", f"{math.exp(2.0):.1f} to {math.exp(2.2):.1f}", "2", "0.01", "1", "no", "9"]
    assert "| adamw | " + " | ".join([*cells, "0.00 M", "1.0", "0.500", "64"]) + " |" in text
    assert "| 0.1 | 20.1 | diverged | 20.1 |" in text
    # a field that Grass did not have when a row was made, and is off, makes no other method of it
    older = [copy.deepcopy(row) for row in made]
    for row in older[::2]:
        row["settings"].pop("select_until", None)
    assert [entry.points.keys() for entry in entries(older)] == [entry.points.keys() for entry in entries(made)]
    shared = [row | {"workers": 2} for row in made[1:]] + [made[0] | {"workers": 2, "study": "r"}]
    text = write_report(shared, tmp_path, "two", "c")[0].read_text()
    assert "| 1.0 | - | - |" in text and "rows of study `r`, `s`" in text
    with pytest.raises(ValueError, match="differ in text"):
        entries([*made, made[0] | {"text": "another"}])
    with pytest.raises(ValueError, match="no rows"):
        entries([])


def test_points_of_finalists_go_before_those_of_one_seed(document, tmp_path):
    study = study_of(document, tmp_path, grid={"learning_rates": [0.1], "multipliers": [1.0, 2.0]}, seeds=[0, 1])
    runs = [run for run in study.next_runs([]) if run.method.name == "adamw"]
    made = [
        row_of(run, 1.0 if run.multiplier == 1.0 else 2.0) for run in runs if run.multiplier == 2.0 or run.seed == 0
    ]
    assert entries(made)[0].best == (0.1, 2.0)


def test_half_a_row_never_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps({"bench": "quality", "key": "a"}) + "\n"
    path.write_text(whole + whole[:9])
    assert [row["key"] for row in read_rows(path)] == ["a"] and path.read_text() != whole
    assert len(read_rows(path, mend=True)) == 1 and path.read_text() == whole
    path.write_text("{}\n" + whole)
    with pytest.raises(ValueError, match="line 1 is no row"):
        read_rows(path)
    assert read_rows(tmp_path / "none") == []


# -- as it is typed ------------------------------------------------------------------------------------------------


def grass(*words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "grass_hf", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_smoke_study_stops_goes_on_and_is_reported(tmp_path, monkeypatch, capsys):
    out = tmp_path / "smoke.jsonl"
    command = ["bench", "quality", SMOKE, "--out", out, "--threads", 1]
    first = grass(*command, "--limit", 2)
    assert first.returncode == 0, first.stderr
    study, begun = load_study(SMOKE), read_rows(out)
    assert len(begun) == 2
    with out.open("a") as file:
        file.write('{"bench": "quality", "key"')  # as if the machine had stopped
    rest = grass(*command, "--workers", 2)
    assert rest.returncode == 0, rest.stderr
    made = read_rows(out)
    assert made[:2] == begun and [row["workers"] for row in made] == [1, 1] + [2] * (len(made) - 2)
    assert len(made) == study.size() == len({row["key"] for row in made})
    assert study.next_runs(made) == [] and all(row["status"] == "finished" for row in made)
    assert {row["method"] for row in made} == {method.name for method in study.methods}
    monkeypatch.chdir(ROOT)
    assert recipe_files.grass(monkeypatch, *command, "--dry-run") == 0
    assert "0 runs to go" in capsys.readouterr().out
    assert recipe_files.grass(monkeypatch, "bench", "report", out, "--out", tmp_path, "--name", "table") == 0
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {method.name} |" in table for method in study.methods) and (tmp_path / "table.png").is_file()


def test_runs_end_with_the_study_that_was_killed(tmp_path):
    out = tmp_path / "rows.jsonl"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "grass_hf", "bench", "quality", str(SMOKE), "--out", str(out)]
    study = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = out.with_suffix(".log")
    until(lambda: log.exists() and "-- " in log.read_text())
    children = psutil.Process(study.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert workers
    study.kill()
    study.wait()
    until(lambda: not any(goes_on(worker) for worker in workers))


def goes_on(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(done, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["quality", "nothing.yaml"], "nothing.yaml cannot be read"),
        (["quality", "recipes/pretrain/llama_demo_sotu.yaml"], "has no section `study`"),
        (["quality", SMOKE, "--only", "galroe"], "did you mean galore"),
        (["report", "nothing.jsonl"], "nothing.jsonl is not a file"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(words, sentence, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert recipe_files.grass(monkeypatch, "bench", *words) == 2
    assert sentence in capsys.readouterr().err
