"""The command grass-hf estimate: its table, files, settings and mistakes."""

import dataclasses
import functools
import importlib.util
import json
import sys

import pytest
import torch
from test_memory import small_llama

from grass_hf import GrassConfig, estimate_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_llama(layers=1).config.save_pretrained(path)
    (path / "broken.json").write_text("{")
    (path / "plain.json").write_text("{}")
    (path / "t5.json").write_text('{"model_type": "t5"}')
    return path


@pytest.fixture
def estimate_command(command):
    return functools.partial(command, "estimate")


def test_command_prints_a_table_and_writes_files(folder, estimate_command):
    drawn = importlib.util.find_spec("matplotlib") is not None
    png = ["--png", folder / "out" / "bars.png"] if drawn else []
    words = ["--rank", "24", "--sequence", "16", "--method", "grass,adamw", "--method", "galore", "--base", "sgd"]
    code, out, err = estimate_command(folder, *words, "--json", folder / "out" / "row.json", *png)
    assert code == 0, err
    assert "galore*" in out and "peak of an observing step" in out
    row = json.loads((folder / "out" / "row.json").read_text())
    assert [entry["method"] for entry in row["bytes"]] == ["grass", "adamw", "galore"]
    direct = estimate_memory(
        small_llama(layers=1),
        GrassConfig(rank=24),
        dtype="bfloat16",
        sequence=16,
        optimizer=torch.optim.SGD,
    )
    assert row["bytes"][0]["step"] == dataclasses.asdict(direct.step)
    assert row["bytes"][0]["peak"] == direct.peak
    assert not drawn or (folder / "out" / "bars.png").stat().st_size > 1000


def test_command_takes_ranks_of_some_layers(folder, estimate_command):
    def said(*words):
        code, out, err = estimate_command(folder, "--sequence", "16", "--json", folder / "row.json", *words)
        assert code == 0, err
        return json.loads((folder / "row.json").read_text())["bytes"][0]["peak"], " ".join(out.split())

    everywhere, _ = said("--density", "0.5")
    peak, out = said("--density", "0.25", "--density-pattern", "[qkvo]_proj:0.5;(gate|up|down)_proj:0.5")
    assert peak == everywhere > said("--density", "0.25")[0]
    assert "density 0.25, 0.5 of [qkvo]_proj, 0.5 of (gate|up|down)_proj" in out
    peak, _ = said("--rank", "8", "--rank-pattern", "down_proj:24")
    config = GrassConfig(rank=8, rank_pattern={"down_proj": 24})
    assert peak == estimate_memory(small_llama(layers=1), config, dtype="bfloat16", sequence=16).peak


def test_command_shows_that_columns_want_staggered_layers(folder, estimate_command):
    def peak(*words):
        file = folder / ("".join(words) + ".json")
        code, _, err = estimate_command("llama_9m", "--rank", "64", "--sequence", "1024", "--json", file, *words)
        assert code == 0, err
        return json.loads(file.read_text())["bytes"][0]["peak"]

    at_once, in_turns, one_by_one = (peak("--side", "input", "--stagger", count) for count in ("1", "4", "100"))
    never = peak("--side", "input", "--selection", "uniform_nr")
    assert never < one_by_one < in_turns < at_once and in_turns < peak("--side", "output")


def test_a_missing_matplotlib_gets_a_sentence(folder, estimate_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = estimate_command(folder, "--png", folder / "bars.png")
    assert code == 2 and "--png needs matplotlib, which is not installed" in err


def test_command_finds_the_largest_rank(folder, estimate_command):
    code, out, err = estimate_command(folder / "config.json", "--sequence", "16", "--dtype", "float32", "--fit", "3MB")
    assert code == 0, err
    found = int(out.split("largest rank within")[1].split("bytes): ")[1].split(",")[0])
    peaks = [estimate_memory(small_llama(layers=1), GrassConfig(rank=r), sequence=16).peak for r in (found, found + 1)]
    assert peaks[0] <= 3_000_000 < peaks[1]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["no_such_model.json"],
            "MODEL='no_such_model.json' is not a file: shipped configs are llama3_70b",
        ),
        (["no/such-model"], "could not be read as a folder, a config file or a hub id"),
        (["FOLDER/broken.json"], "is not a readable JSON file"),
        (["FOLDER/plain.json"], "has no model_type"),
        (["FOLDER/t5.json"], "no causal language model"),
        (["llama_9m", "--fit", "1GB", "--density-pattern", "q_proj:0.5"], "--fit finds one rank for all layers"),
        (["llama_9m", "--rank-pattern", "q_proj"], "--rank-pattern: rank_pattern: 'q_proj' is not of the form"),
        (["llama_9m", "--fit", "much"], "--fit 'much' is not a size: write 40GB"),
        (["FOLDER", "--fit", "1kB"], "needs at rank 1"),
        (["FOLDER", "--sequence", "16", "--within", "1MB"], "finds the largest rank"),
        (["llama_9m", "--base", "adamm"], "an optimizer of the installed Trainer"),
        (["llama_9m", "--rank", "0"], "rank=0 is not a positive number of rows"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_command_refuses_with_a_sentence(folder, estimate_command, words, sentence):
    code, _, err = estimate_command(*[word.replace("FOLDER", str(folder)) for word in words])
    assert code == 2
    assert sentence in err.replace("\n", " ") and "Traceback" not in err
