"""The floors of the package: imports point downward only, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grass_hf"
FLOORS = {
    0: ["fields", "config", "presets", "optim_args", "_import_hook"],
    1: [
        "twice",
        "norms",
        "functional",
        "grouped",
        "rounding",
        "int8",
        "selection",
        "sharing",
        "distributed",
        "live",
        "runs",
        "products",
    ],
    2: [
        "matrices",
        "drift",
        "evaluated",
        "parts",
        "exchange",
        "doors",
        "slices",
        "experts",
        "trials",
        "modules",
        "surgery",
        "patterns",
        "targets",
        "conversion",
        "undriven",
        "exclusion",
        "freeing",
        "rerun",
        "audit",
        "watching",
        "convert",
    ],
    3: [
        "guards",
        "regroup",
        "reselect",
        "seeding",
        "remap",
        "base_record",
        "checkpoint",
        "stepping",
        "warmup",
        "driving",
        "link",
        "controller",
        "optim",
        "muon",
        "report",
        "methods",
        "engines",
        "simulate",
        "zero_sizes",
        "memory",
        "traffic",
        "network",
    ],
    4: ["integrations"],
    5: ["cli", "adapters", "bench", "recipes", "__main__"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
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


def test_every_module_has_a_floor():
    assert {top(path) for path in FILES} == set(FLOOR)


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
    if FLOOR[top(path)] < 4:
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
