"""The list of mistakes that `make mutate` makes has not rotted."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def listed():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    sys.modules["mutate"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mutations()


ALL = listed()


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_what_is_to_be_changed_is_there_once(mutation):
    assert mutation.times() == 1 and mutation.old != mutation.new
    text = (ROOT / mutation.file).read_text().replace(mutation.old, mutation.new)
    compile(text, mutation.file, "exec")
    file, _, function = shlex.split(mutation.test)[0].partition("::")
    assert f"def {function}" in (ROOT / file).read_text()


def test_names_differ():
    assert len({mutation.name for mutation in ALL}) == len(ALL)
