"""Check that the documentation keeps up with the code; part of `make quality`.

Every public name has a docstring and, like every `GrassConfig` field and every CLI command, stands in
docs/*.md as code: in backticks or in a code block.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

import grass_hf
from grass_hf.cli.app import app
from grass_hf.recipes.schema import DataSection, EvaluationSection, ModelSection

DOCS = Path(__file__).parents[1] / "docs"


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
    for section in (ModelSection, DataSection, EvaluationSection):
        for field in dataclasses.fields(section):
            if not documented(field.name):
                yield f"{section.__name__}.{field.name} is not mentioned in docs/*.md: describe the field of a recipe"
    for command in commands(typer.main.get_command(app), "grass-hf"):
        if not documented(command):
            yield f"the command `{command}` is not mentioned in docs/*.md: describe it"


def main() -> int:
    """Print the problems; the exit code is 1 if there are any."""
    pages = sorted(DOCS.rglob("*.md"))
    found = list(problems("\n".join(code_in(page.read_text(encoding="utf-8")) for page in pages)))
    for problem in found:
        print(problem)
    print(f"docs coverage: {len(pages)} pages, {len(found)} problems")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
