"""Private names of other libraries: all in one list, and all where the list says."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from grass_hf.integrations.private_names import PRIVATE_NAMES

PACKAGE = Path(__file__).parents[2] / "grass_hf"
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
# Words of ours that begin with a line: ends of names, the mark of what we have wrapped.
OUR_WORDS = {"_bias", "_grass_hf", "_import_hook", "_pattern", "_slice"}


def place_of(home):
    """The module or class of that name."""
    parts = home.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(home)


def stands_in(place, name):
    """Whether a place has the name, or its source says it: of what only instances have."""
    if hasattr(place, name):
        return True
    try:
        return re.search(rf"\b{name}\b", inspect.getsource(place)) is not None
    except (TypeError, OSError):  # not written in Python
        return False


@pytest.mark.parametrize("home, name", [(home, name) for home, names in PRIVATE_NAMES.items() for name in names])
def test_the_installed_release_has_the_name(home, name):
    library = home.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    try:
        found = stands_in(place_of(home), name)
    except (ImportError, AttributeError):
        found = False
    assert found, (
        f"{home} has no {name!r} in the release of {library} that is installed: find what took its place, change the "
        "code that touches it, and the list in grass_hf/integrations/private_names.py."
    )


def test_a_name_that_is_gone_is_missed():
    assert stands_in(place_of("torch.nn.Module"), "_parameters")
    assert not stands_in(place_of("torch.nn.Module"), "_parameters_of_old")
    assert not stands_in(place_of("torch._C"), "_no_such_function")


def defined(tree):
    """Private names that a module of ours gives to its functions, classes, constants, and members of classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr
        if isinstance(node, ast.Module | ast.ClassDef):
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                yield from (each.id for target in targets for each in ast.walk(target or line) if is_stored(each))


def is_own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_stored(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def touched(tree):
    """Private names in a module, and what it imports from private modules of others: (line, name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            if not node.value.isupper():  # the end of a constant's name or of a variable's
                yield node.lineno, node.value
        elif isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            for alias in node.names:
                full = f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".")
                if not full.startswith("grass_hf") and any(map(PRIVATE.fullmatch, full.split("."))):
                    yield node.lineno, full


def unlisted(trees):
    """What stands in sources and in no list."""
    own = {name for tree in trees.values() for name in defined(tree)}
    known = {name for names in PRIVATE_NAMES.values() for name in names} | set(PRIVATE_NAMES)
    known |= {f"{home}.{name}" for home, names in PRIVATE_NAMES.items() for name in names}
    return [
        f"{file}:{line} {name}"
        for file, tree in trees.items()
        for line, name in touched(tree)
        if name not in own and name not in known and name not in OUR_WORDS
    ]


def test_every_private_name_in_the_source_stands_in_the_list():
    trees = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert unlisted(trees) == []


def test_the_list_has_no_name_that_nothing_touches():
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "private_names.py"]
    words = {word for path in paths for word in re.findall(r"\w+", path.read_text())}
    assert {name for names in PRIVATE_NAMES.values() for name in names} <= words


@pytest.mark.parametrize(
    "line",
    [
        "torch._no_such_thing(1)",
        "getattr(model, '_no_such_thing', None)",
        "from torch._inductor import config",
        "import torch._dynamo.config",
        "from transformers.trainer import _no_such_thing",
    ],
)
def test_a_name_without_an_entry_is_found(line):
    assert len(unlisted({"module.py": ast.parse(line)})) == 1
