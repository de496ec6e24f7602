"""Check that the documentation keeps up with the code; part of `make quality`.

Every public name has a docstring and, like every `GrassConfig` field and every CLI command, stands in
docs/*.md as code: in backticks or in a code block. And every test that the docs name exists: files and functions whose
names begin with "test_", and all that stands as code in the last column of a table with the heading "test".
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

import grass_hf
from grass_hf.cli.app import app
from grass_hf.recipes.schema import DataSection, EvaluationSection, LoraSection, ModelSection

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def code_in(markdown: str) -> str:
    """Only the code of a Markdown text: fenced blocks, then inline spans of what is left."""
    blocks = re.findall(r"^```.*?^```", markdown, flags=re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", prose))


def commands(command: object, name: str) -> Iterator[str]:
    """The full names of the leaves of a click command tree ("grass-hf bench speed")."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name
    else:
        for child_name, child in children.items():
            yield from commands(child, f"{name} {child_name}")


def problems(code: str) -> Iterator[str]:
    """One sentence for each thing that the docs or the docstrings lack."""

    def documented(text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", code) is not None

    for name in grass_hf.__all__:
        # A dataclass without one gets its signature as docstring, which documents nothing.
        docstring = getattr(grass_hf, name).__doc__ or ""
        if not docstring.strip() or docstring.startswith(f"{name}("):
            yield f"grass_hf.{name} has no docstring: give shapes, units, errors and the source"
        if not documented(name):
            yield f"grass_hf.{name} is public and not mentioned in docs/*.md: describe it"
    for field in dataclasses.fields(grass_hf.GrassConfig):
        if not documented(field.name):
            yield f"GrassConfig.{field.name} is not mentioned in docs/*.md: describe the setting"
    for section in (ModelSection, DataSection, LoraSection, EvaluationSection):
        for field in dataclasses.fields(section):
            if not documented(field.name):
                yield f"{section.__name__}.{field.name} is not mentioned in docs/*.md: describe the field of a recipe"
    for command in commands(typer.main.get_command(app), "grass-hf"):
        if not documented(command):
            yield f"the command `{command}` is not mentioned in docs/*.md: describe it"


def tests_named(markdown: str) -> Iterator[str]:
    """The tests that a page names, as "test_x.py", "test_x.py::test_y", the name of a function, or a make target."""
    in_table = False
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        in_table = line.startswith("|") and (in_table or cells[-1].startswith("test"))
        yield from re.findall(r"`([^`]+)`", cells[-1] if in_table else "")
        yield from re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?(?:::\w+)?)`", line)


def missing_tests(pages: dict[str, str]) -> Iterator[str]:
    """One sentence for each test that a page names and that does not exist."""
    functions, files = set(), set()
    for path in (ROOT / "tests").rglob("*.py"):
        files |= {path.name, str(path.relative_to(ROOT))}
        names = re.findall(r"^(?:def|class) (\w+)", path.read_text(encoding="utf-8"), flags=re.M)
        functions |= {*names, *(f"{path.name}::{name}" for name in names)}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    there = functions | files | {f"make {target}" for target in targets}
    for page, markdown in pages.items():
        for name in dict.fromkeys(tests_named(markdown)):
            if name.removeprefix("tests/") not in there and name not in there:
                yield f"docs/{page} names the test `{name}`, which is not in tests/: correct the name"


def main() -> int:
    """Print the problems; the exit code is 1 if there are any."""
    pages = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
    found = [*problems("\n".join(map(code_in, pages.values()))), *missing_tests(pages)]
    for problem in found:
        print(problem)
    print(f"docs coverage: {len(pages)} pages, {len(found)} problems")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
