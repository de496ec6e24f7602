"""README and docs: their Python runs, their commands exist, their links lead somewhere, their figures can be drawn."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from grass_hf.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md", "support.md"}
SHELLS = ("bash", "console", "sh")
# How a block of commands says that it was run: by a test, by hand, or not, and why.
MARK = re.compile(r"<!-- (?:run: (?P<test>.+?)|last run: (?P<date>\d{4}-\d\d-\d\d), .+?|not run: .+?) -->")


def name_of(page: Path) -> str:
    return page.name


def documents(page: Path) -> Document:
    return Document.parse(str(page), PythonCodeBlockParser(), SkipParser())


def known_tests() -> set[str]:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    return {path.name for path in (ROOT / "tests").rglob("test_*.py")} | {f"make {target}" for target in targets}


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_python_on_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for example in documents(page).examples():
        try:
            example.evaluate()
            ran += 1
        except unittest.SkipTest as reason:
            # what is left out is run elsewhere: the reason begins with the test's name
            assert str(reason).split()[0] in known_tests() | {"setup"}, reason
    capsys.readouterr()
    assert ran


def shell_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The line above each block of commands, and the commands, a line each."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and token.info.strip() in SHELLS:
            yield token.map[0], token.content.replace("\\\n", " ")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=name_of)
def test_every_block_of_commands_says_how_it_was_run(page):
    lines = page.read_text().splitlines()
    for start, commands in shell_blocks(page):
        mark = MARK.search("\n".join(lines[max(0, start - 3) : start]))
        assert mark, f"{page.name}: {commands.splitlines()[0]!r} wants a line <!-- run: test_x.py --> above it"
        for test in re.findall(r"test_\w+\.py|make [\w-]+", mark["test"] or ""):
            assert test in known_tests(), f"{page.name}: {test} is no test"


def grass_commands(page: Path) -> Iterator[list[str]]:
    """Every call of grass-hf in blocks of commands, as words behind the program's name."""
    for _, commands in shell_blocks(page):
        for line in commands.splitlines():
            words = shlex.split(line, comments=True)
            for program in (["grass-hf"], [".venv/bin/grass-hf"], ["-m", "grass_hf"]):
                for place in range(len(words)):
                    if words[place : place + len(program)] == program:
                        ends = [i for i, word in enumerate(words) if i > place and word in ("&&", "|", ";")]
                        yield words[place + len(program) : min(ends, default=len(words))]


def what_is_wrong(words: list[str]) -> str | None:
    """Why the command line would refuse these words, as far as it can be said without running them."""
    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return None if words == ["--help"] else f"a command is missing: {words}"
        if words[0] not in command.commands:
            return f"{words[0]!r} is no command"
        command = command.commands[words.pop(0)]
    if command.name in ("run", "train", "validate"):
        return None  # what follows is a script's, or fields of a recipe: other tests parse those
    known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"--help"}
    wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"{command.name} has no option {wrong[0]}" if wrong else None


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=name_of)
def test_commands_and_options_exist(page):
    assert not [problem for words in grass_commands(page) if (problem := what_is_wrong(words))]


def test_a_wrong_command_would_be_found():
    assert what_is_wrong(["estimate", "llama_7b", "--ranks", "4"]) == "estimate has no option --ranks"
    assert what_is_wrong(["benchmark"]) == "'benchmark' is no command"
    assert sum(1 for page in PAGES for _ in grass_commands(page)) > 60


def test_links_of_the_readme_lead_somewhere():
    # those of docs/ are checked by `make docs`, which is strict
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert (ROOT / path).is_file(), target
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), flags=re.M) if anchor else []
            slugs = [re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_that_was_not_run_says_so(recipe):
    head = recipe.read_text().split("\n\n")[0]
    ran = recipe.stem in ("llama_demo_sotu", "smollm2_135m_chitchat", "minilm_sentiment")
    assert ran or ("Not run at this size by us" in head and re.search(r"GiB of tensors|was not estimated", head))


def test_every_page_stands_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES[1:] if page.name not in menu] == []


@pytest.fixture
def figures(monkeypatch):
    """scripts/draw_figures.py, imported."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("draw_figures")


def test_the_figures_can_be_drawn(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_figures.py", "--out", str(tmp_path)])
    figures.main()
    for name in ("memory_quality.png", "how_it_works.png", "start_table.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert (ROOT / "docs" / name).is_file()
    # of the table nothing depends on versions of a drawing library but its colours
    files = [folder / "start_table.svg" for folder in (tmp_path, ROOT / "docs")]
    text = [re.findall(r">([^<]+)</text>", file.read_text()) for file in files]
    assert text[0] == text[1]


def test_the_figure_shows_what_the_page_says(figures):
    page = (ROOT / "docs" / "quality.md").read_text().split("## In short")[1].split("\n## ")[0]
    for perplexity, peak in figures.best_points().values():
        assert any(f"{perplexity:.1f}" in row and f"{peak:.1f}" in row for row in page.splitlines()), (perplexity, peak)


def test_the_page_of_commands_is_the_command_lines(tmp_path):
    """`make docs-pages` writes it anew."""
    command = [sys.executable, "-m", "typer", "grass_hf.cli.app", "utils", "docs", "--name", "grass-hf"]
    done = subprocess.run([*command, "--output", str(tmp_path / "cli.md")], cwd=ROOT, check=True, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "cli.md").read_text() == (ROOT / "docs" / "cli.md").read_text()
