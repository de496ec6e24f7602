"""The rooms of the package: imports point downward only, there is no circle, and importing it is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "grass_hf"
# From the ground up: a room imports from itself and from those before it.
ROOMS = ["config", "slices", "convert", "optim", "integrations", "measure", "recipes", "cli"]
FLOOR = {name: floor for floor, name in enumerate([*ROOMS, "__main__"])}
BELOW_TRANSFORMERS = FLOOR["integrations"]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, those for type checking excepted."""
    tree = ast.parse(path.read_text())
    package = ["grass_hf", *path.relative_to(PACKAGE).parent.parts]
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def test_eight_rooms_and_nothing_else():
    assert {top(path) for path in FILES} - {"__main__", "_import_hook"} == set(ROOMS)
    assert len(ROOMS) <= 8


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {PACKAGE}), ids=lambda p: p.name)
def test_every_room_says_what_it_is(folder):
    if (folder / "__init__.py").exists():  # a folder without one is no package: the start-up hook's, a plugin's
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())).splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    if top(path) == "_import_hook":  # it reaches up, at the moment transformers is imported and not before
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "grass_hf" and len(parts) > 1 and parts[1] in FLOOR:
            assert FLOOR[parts[1]] <= FLOOR[top(path)], f"{path.name} imports {name}"


def module_of(path: Path) -> str:
    parts = ["grass_hf", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Modules that one imports, directly or through others."""
    found, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that all import each other, directly or through others."""
    reach = {name: reached(graph, name) for name in graph}
    return {frozenset(n for n in reach[name] if name in reach[n]) for name in graph if name in reach[name]}


def test_no_circle():
    """Imports inside functions count too; those for type checking do not."""
    paths = {module_of(path): path for path in FILES}
    graph = {name: (imported(path) & paths.keys()) - {name} for name, path in paths.items()}
    graph = {name: targets - {name.rpartition(".")[0]} for name, targets in graph.items()}  # of a package itself
    assert circles(graph) == set()


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == {frozenset({"b", "c"})}


def foreign(tree: ast.AST) -> set[str]:
    """Names in a module that come from other packages."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and not str(node.module).startswith("grass_hf"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def set_on_foreign(tree: ast.AST) -> list[str]:
    """Attributes that a module sets on modules and classes of other packages, but for `sys`'s."""
    names, found = foreign(tree) - {"sys"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            found.append(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            found.append(ast.Attribute(node.args[0], ast.unparse(node.args[1])))
    return [ast.unparse(node) for node in found if root(node) in names]


def root(node: ast.AST) -> str:
    while not isinstance(node, ast.Name):
        node = getattr(node, "value", None) or getattr(node, "func", None)
        if node is None:
            return ""
    return node.id


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_integrations_change_other_libraries(path):
    tree = ast.parse(path.read_text())
    assert not any(name.startswith("unittest") for name in imported(path))
    if top(path) != "integrations":
        assert set_on_foreign(tree) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.nn.Linear.forward = None",
        "from torch import nn\nsetattr(nn.Linear, 'forward', None)",
        "from transformers import Trainer\ndef f():\n    del Trainer.train",
    ],
)
def test_a_change_of_another_library_is_found(code):
    assert len(set_on_foreign(ast.parse(code))) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_upper_floors_know_transformers(path):
    if FLOOR.get(top(path), 0) < BELOW_TRANSFORMERS:
        assert not {name.split(".")[0] for name in imported(path)} & {"transformers", "accelerate", "trl"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) < 300


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_long_functions_have_signposts(path):
    """Of more than fifty lines beside signature and docstring."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            inside = lines[body[0].lineno - 1 : node.end_lineno] if body else []
            signposts = [line for line in inside if line.lstrip().startswith("# ")]
            assert len(inside) <= 50 or len(signposts) >= 4, f"{node.name} has {len(inside)} lines: cut it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_mypy_is_to_ignore_has_a_code_and_a_reason(path):
    for line in path.read_text().splitlines():
        if "type: " + "ignore" in line:
            assert re.search(r"# type: ignore\[[a-z, -]+\]  # \w", line), line


def test_test_files_stay_small_and_stand_in_rooms():
    tests = PACKAGE.parent / "tests"
    assert {path: size for path in tests.rglob("*.py") if (size := len(path.read_text().splitlines())) > 350} == {}
    assert [path.name for path in tests.glob("*.py")] == ["conftest.py"]


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, grass_hf; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_public_names():
    import grass_hf

    expected = {"GrassConfig", "convert_to_grass", "grass_optimizer", "restore_model", "register", "estimate_memory"}
    expected |= {
        "GrassCallback",
        "MuonAdamW",
        "WeightDelta",
        "GrassOptimizerFactory",
        "last_complete_checkpoint",
        "save_plain",
        "summary",
    }
    assert set(grass_hf.__all__) == expected
    for name in grass_hf.__all__:
        assert getattr(grass_hf, name).__doc__
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = grass_hf.nothing_of_the_kind
