"""docs/troubleshooting.md has every message of the package, and the script that lists them misses none."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, estimate_memory, grass_optimizer, restore_model, summary
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.integrations.adapters.checkpoint import Checkpoint
from grass_hf.recipes.parse import read_document

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("write_messages", ROOT / "scripts" / "write_messages.py")
    sys.modules["write_messages"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITER = script()
MESSAGES = WRITER.collect()
PAGE = WRITER.PAGE.read_text(encoding="utf-8")


def test_every_message_is_on_the_page():
    assert WRITER.written(PAGE, MESSAGES) == PAGE, "run `python scripts/write_messages.py`"
    assert len(MESSAGES) > 400


def test_what_the_page_explains_is_said_by_a_message():
    assert WRITER.wrong_quotes(PAGE, MESSAGES) == []
    assert WRITER.wrong_quotes("### `nobody says this`\n", MESSAGES) == ["nobody says this"]
    assert PAGE.count("\n### `") >= 30


def test_every_theme_is_explained():
    for theme in {message.theme for message in MESSAGES}:
        before = PAGE.split(f"<!-- messages: {theme} -->")[0]
        assert len(before.rpartition("\n## ")[2].split()) > 12, f"the page says nothing of the messages of {theme}"


def test_messages_are_sentences():
    """Reasons that another sentence takes up have no full stop; the sentence around them has it."""
    reasons = {"BadRow", "NotPlainError", "ConstructorError"}
    taken_up = {"convert/audit/watching.py", "recipes/places.py", "optim/parameter_groups.py"}
    sentences = [message for message in MESSAGES if message.kind not in reasons and message.where not in taken_up]
    assert [message for message in sentences if message.text[-1] not in f".?{WRITER.GAP}"] == []
    assert [message for message in MESSAGES if re.search(r"  |%[^ ]*[sdr]\b", message.text)] == []


MODULE = """
_LEAST = {"steps": (1, "negative: give 1"), "parts": (2, "too few: give 2")}
_INSTEAD = "use DDP"
def check(name, value):
    for key, (least, problem) in _LEAST.items():
        raise ValueError(f"{key}={value} is {problem}.")
    raise RuntimeError(f"{name!r} does not run: {_INSTEAD}." if name else "no name was given.")
def warn(rows):
    logger.warning("%d rows of %s were left out.", len(rows), rows.name)
    if rows.wrong:
        error = TypeError("a wrong row: " + _said(rows, "a number"))
def _said(rows, what):
    if rows.old:
        return f"row {rows.number} is not {what}."
    return f"the file {rows.name} has no {what}."
def inner(name):
    raise AttributeError(f"there is no such thing as {name}")
"""


def test_the_script_sees_every_form_in_which_a_message_is_written(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "made.py").write_text(MODULE)
    found = WRITER.collect(tmp_path)
    assert {(message.kind, message.text) for message in found} == {
        ("ValueError", "steps=… is negative: give 1."),
        ("ValueError", "parts=… is too few: give 2."),
        ("RuntimeError", "… does not run: use DDP."),
        ("RuntimeError", "no name was given."),
        ("warning", "… rows of … were left out."),
        ("TypeError", "a wrong row: row … is not a number."),
        ("TypeError", "a wrong row: the file … has no a number."),
    }
    assert {message.theme for message in found} == {"training"}
    with pytest.raises(SystemExit, match="training"):
        WRITER.written("a page without lists", found)


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def undriven():
    converted = convert_to_grass(model(), GrassConfig(rank=2))
    optimizer = torch.optim.SGD([p for p in converted.parameters() if p.requires_grad], lr=0.1)
    converted(torch.randn(3, 8)).sum().backward()
    optimizer.step()


def parted():
    converted = convert_to_grass(model(), GrassConfig(rank=2))
    grass_optimizer(converted, torch.optim.SGD, lr=0.1)
    converted(torch.randn(3, 8))
    with torch.no_grad():
        next(p for p in converted.parameters() if p.requires_grad and p.dim() == 2).add_(1.0)
    converted(torch.randn(3, 8))


# What people do, and the theme that the page has it under.
RAISED = {
    "a setting that is too small": ("settings", lambda: GrassConfig(update_interval=0)),
    "a misspelt choice": ("settings", lambda: GrassConfig(side="inptu")),
    "a misspelt setting": ("settings", lambda: parse_optim_args("rnk=3")),
    "a list with commas": ("settings", lambda: parse_optim_args("target_modules=q_proj,v_proj")),
    "the learning rate in optim_args": ("settings", lambda: parse_optim_args("lr=0.1")),
    "a pattern that matches nothing": (
        "conversion",
        lambda: convert_to_grass(model(), GrassConfig(rank=2, target_modules=("q",))),
    ),
    "a rank that is too large": ("conversion", lambda: convert_to_grass(model(), GrassConfig(rank=99))),
    "a plain model restored": ("conversion", lambda: restore_model(model())),
    "a plain model summed up": ("engines", lambda: summary(model(), torch.optim.SGD(model().parameters(), lr=0.1))),
    "a plain optimizer": ("conversion", undriven),
    "a slice moved alone": ("training", parted),
    "an estimate of nothing": ("estimate", lambda: estimate_memory(model, GrassConfig(rank=2), batch=0, sequence=8)),
    "a checkpoint that is not there": ("export", lambda: Checkpoint("nowhere", "BASE")),
    "a recipe that is not there": ("recipes", lambda: read_document("nowhere.yaml")),
}


@pytest.mark.parametrize("mistake", RAISED)
def test_what_is_raised_is_on_the_page(mistake):
    theme, make = RAISED[mistake]
    with pytest.raises((ValueError, RuntimeError)) as raised:
        make()
    said = " ".join(str(raised.value).split())
    fitting = {
        message.theme
        for message in MESSAGES
        if re.fullmatch(".*".join(map(re.escape, message.text.split(WRITER.GAP))), said)
        and len(message.text.replace(WRITER.GAP, "")) > 15
    }
    assert theme in fitting, said
