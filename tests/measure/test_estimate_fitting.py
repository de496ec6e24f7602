"""What `grass-hf estimate` finds by itself: settings that fit, presets, recipes, AdamW beside."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import recipe_files
from test_memory import small_llama

from grass_hf import GrassConfig, estimate_memory
from grass_hf.cli import fitting, main
from grass_hf.config.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
ALONE = {"engine": "ddp", "world_size": 1, "gradient_checkpointing": False}
WORDS = [
    "--released",
    "--gradient-checkpointing",
    "--base adamw_torch_8bit",
    "--targets all-matrices --side auto",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_llama(layers=1).config.save_pretrained(path)
    return path


@pytest.fixture
def estimate_command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.argv", ["grass-hf", "estimate", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run


def choice(config=None, **setting):
    return fitting.Choice(config or GrassConfig(), {**ALONE, **setting})


def test_smaller_choices_add_one_thing_at_a_time():
    pytest.importorskip("torchao")
    found = list(fitting.smaller(choice(), set()))
    assert [list(each.words) for each in found] == [WORDS[: count + 1] for count in range(4)]
    last = found[-1]
    assert not last.config.resident and last.config.side == "auto" and last.config.target_modules == "all-matrices"
    assert last.setting["gradient_checkpointing"] is True and "8bit" in last.setting["optimizer"].__name__.lower()


def test_what_was_asked_for_stays_as_it_is():
    def words(start, *given):
        return [each.words[-1] for each in fitting.smaller(start, set(given))]

    assert words(choice(), "resident", "base", "side") == ["--gradient-checkpointing"]
    assert words(choice(gradient_checkpointing=True), "resident", "base", "target_modules") == []
    assert "--released" not in words(choice(GrassConfig(selection="multinomial_norm")), "base")
    sharded = words(choice(engine="fsdp2", world_size=8))
    assert "--released" not in sharded and "--base adamw_torch_8bit" not in sharded


def peaks(start, per_word=100, per_rank=1):
    """Each word takes 100 bytes away, each row adds one."""

    def peak_of(tried):
        rank = tried.config.rank or 64
        return start - per_word * len(tried.words) + per_rank * (rank - 64)

    return peak_of


def test_the_best_setting_is_the_one_asked_for_with_the_largest_rank_else_the_first_that_fits():
    given = {"base"}
    found, said = fitting.best(peaks(1000), choice(), 1010, 512, given)
    assert found.words == () and found.config.rank == 74 and "largest rank within 1010 B (1,010 bytes): 74" in said
    found, said = fitting.best(peaks(1000), choice(), 800, 512, given)
    assert found.words == tuple(WORDS[:2]) and found.config.density == 0.25
    assert said.startswith("density 0.25 takes 1000 B, more than 800 B; it fits with --released --gradient-check")
    found, said = fitting.best(peaks(1000), choice(), 690, 512, given)
    assert found.words == (*WORDS[:2], WORDS[3]) and found.config.rank == 54
    assert f"with {' '.join(found.words)}: 54, peak 690 B" in said
    with pytest.raises(ValueError, match=r"--fit 100 B is less than a step needs at rank 1 with --released"):
        fitting.best(peaks(1000), choice(), 100, 512, given)


def test_adamw_stands_beside_in_mib(folder, estimate_command):
    code, out, err = estimate_command(folder, "--sequence", "16", "--base", "sgd", "--json", folder / "row.json")
    assert code == 0, err
    assert "MiB (2^20 bytes)" in out and "GiB" not in out and "adamw" in out
    grass, adamw = json.loads((folder / "row.json").read_text())["bytes"]
    plain = estimate_memory(small_llama(layers=1), method="adamw", dtype="bfloat16", sequence=16)
    assert (grass["method"], adamw["method"], adamw["peak"]) == ("grass", "adamw", plain.peak)
    assert f"{plain.peak / 2**20:.1f}" in out


def test_a_preset_stands_for_its_settings(folder, estimate_command):
    def peak(*words):
        words = ("--sequence", "16", "--method", "grass", "--json", folder / "row.json", *words)
        code, _, err = estimate_command(folder, *words)
        assert code == 0, err
        row = json.loads((folder / "row.json").read_text())
        return row["bytes"][0]["peak"], row["config"], row["base"]

    found, config, _ = peak("--preset", "max_memory")
    assert {key: config[key] for key in PRESETS["max_memory"]} == PRESETS["max_memory"]
    options = ("--released", "--side", "auto", "--targets", "all-matrices")
    assert found == peak(*options)[0] != peak()[0]
    assert peak("--preset", "max_memory", "--resident")[1]["resident"] is True
    assert peak("--preset", "muon")[2] == "muon"
    code, _, err = estimate_command(folder, "--preset", "max_memry")
    assert code == 2 and "preset='max_memry'" in err and "max_memory" in err


def test_a_limit_that_is_passed_names_what_would_keep_it(folder, estimate_command):
    words = (folder, "--sequence", "16", "--method", "grass")
    released = estimate_memory(small_llama(layers=1), GrassConfig(resident=False), dtype="bfloat16", sequence=16).peak
    code, _, err = estimate_command(*words, "--within", f"{released}B")
    assert code == 2 and "--released brings it to" in err and "finds the largest rank that fits" in err
    code, _, _ = estimate_command(*words, "--within", f"{released}B", "--released")
    assert code == 0


@pytest.mark.parametrize("kind", [recipe_files.pretraining, recipe_files.finetuning])
def test_a_recipe_is_counted_by_its_own_step(kind, tmp_path, estimate_command):
    recipe = kind(tmp_path)
    code, out, err = estimate_command(recipe_files.write(tmp_path, recipe), "--json", tmp_path / "row.json")
    assert code == 0, err
    grass, adamw = json.loads((tmp_path / "row.json").read_text())["bytes"]
    assert grass["peak"] < adamw["peak"] and "MiB" in out and recipe["task"] in out
    recipe["training"]["per_device_train_batch_size"] *= 4
    path = recipe_files.write(tmp_path, recipe)
    code, out, err = estimate_command(path, "--json", tmp_path / "row.json", "--within", "1kB")
    assert code == 2 and "lower per_device_train_batch_size" in err
    assert json.loads((tmp_path / "row.json").read_text())["bytes"][0]["peak"] > 1.5 * grass["peak"]
    code, _, err = estimate_command(path, "--rank", "4")
    assert code == 2 and "--rank does not go with" in err and "change the recipe" in err


def cells():
    """Commands and peaks of the table that docs/memory.md opens with."""
    rows = re.findall(r"`grass-hf estimate ([^`]+)` \| ([0-9.]+) \|", (DOCS / "memory.md").read_text())
    return {command: float(peak) for command, peak in rows}


def test_cells_of_the_table_that_docs_memory_opens_with(estimate_command, tmp_path):
    found = cells()
    assert len(found) >= 5
    command = "llama_1b --released"
    code, _, err = estimate_command(*shlex.split(command), "--method", "grass", "--json", tmp_path / "row.json")
    assert code == 0, err
    row = json.loads((tmp_path / "row.json").read_text())["bytes"][0]
    assert row["peak"] / 2**30 == pytest.approx(found[command], abs=0.006)


@pytest.mark.parametrize("command", cells())
def test_commands_of_that_table_are_understood(command, estimate_command, monkeypatch, folder):
    asked = []
    monkeypatch.setattr("grass_hf.cli.estimate.run_estimate", lambda model, **options: asked.append(options))
    code, _, err = estimate_command(*shlex.split(command.replace("CONFIG.json", str(folder / "config.json"))))
    assert code == 0, err
    assert dataclasses.asdict(GrassConfig(**asked[0]["grass"]))
