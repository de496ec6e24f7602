"""The rooms of the package: imports point downward only, there is no circle, and importing it is cheap."""

import ast
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_upper_floors_know_transformers(path):
    if FLOOR.get(top(path), 0) < BELOW_TRANSFORMERS:
        assert not {name.split(".")[0] for name in imported(path)} & {"transformers", "accelerate", "trl"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) < 300


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, grass_hf; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_public_names():
    import grass_hf

    expected = {"GrassConfig", "convert_to_grass", "grass_optimizer", "restore_model", "register", "estimate_memory"}
    expected |= {"GrassCallback", "MuonAdamW", "GrassOptimizerFactory", "last_complete_checkpoint", "save_plain"}
    assert set(grass_hf.__all__) == expected
    for name in grass_hf.__all__:
        assert getattr(grass_hf, name).__doc__
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = grass_hf.nothing_of_the_kind
