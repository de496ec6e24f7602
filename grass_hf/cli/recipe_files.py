"""``grass-hf recipes``: the recipes and launch configs that come with the package."""

from __future__ import annotations

import difflib
import re
import textwrap
from pathlib import Path

import typer

from ..config import shipped_files

recipes = typer.Typer(no_args_is_help=True, help="Recipes that come with the package: list them, read one, copy one.")

_NAME = typer.Argument(..., help="Name of a recipe or of a launch config, as `grass-hf recipes list` shows it.")
# What a file of configs/ or recipes/ is called in a checkout, where another file names it.
_PATH = re.compile(r"(?:configs|recipes)/[\w/-]+\.(?:yaml|json)")


@recipes.command("list")
def list_command() -> None:
    """Print the names of the shipped recipes and launch configs, each with what it is.

    `grass-hf train NAME` and `grass-hf validate NAME` take the name of a recipe in place of a file.
    """
    folder = None
    for name, path in sorted(shipped_files.recipes().items(), key=lambda item: (item[1].parent.name, item[0])):
        if path.parent.name != folder:
            folder = path.parent.name
            typer.echo(f"{folder}:")
        _say(name, path)
    typer.echo("launch configs (copy one, then accelerate launch --config_file FILE -m grass_hf train NAME):")
    for name, path in shipped_files.launch_configs().items():
        _say(name, path)


@recipes.command()
def show(name: str = _NAME) -> None:
    """Print a recipe or a launch config.

    For example:

        grass-hf recipes show llama_demo_sotu
    """
    typer.echo(_find(name).read_text(encoding="utf-8"), nl=False)


@recipes.command()
def copy(
    name: str = _NAME,
    directory: Path = typer.Argument(..., metavar="DIR", help="Folder to write to; it is made if it is not there."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace files of the same names."),
) -> None:
    """Copy a recipe into a folder, to edit it, with the launch config that its command needs.

    For example:

        grass-hf recipes copy llama_1b_c4 my_runs

    In the copies the files name each other by their new paths, so the first line of a recipe is still its command.
    """
    files = _with_needed(_find(name))
    new = {path: directory / path.name for path in files}
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: give a folder.")
    for path in new.values():
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is there already: give another folder, or replace it (--overwrite).")

    def moved(match: re.Match) -> str:
        path = shipped_files.shipped_file(match[0])
        return new[path].as_posix() if path in new else match[0]

    directory.mkdir(parents=True, exist_ok=True)
    for path, target in new.items():
        target.write_text(_PATH.sub(moved, path.read_text(encoding="utf-8")), encoding="utf-8")
        typer.echo(f"written: {target}")


def _find(name: str) -> Path:
    known = {**shipped_files.launch_configs(), **shipped_files.recipes()}
    wanted = name.removesuffix(".yaml")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "`grass-hf recipes list` names them."
    raise ValueError(f"{name!r} is no shipped recipe or launch config: {hint}")


def _with_needed(path: Path) -> list[Path]:
    """A file and those that it names, and so on."""
    files = [path]
    for file in files:
        for name in _PATH.findall(file.read_text(encoding="utf-8")):
            found = shipped_files.shipped_file(name)
            if found is not None and found not in files:
                files.append(found)
    # functions of rewards, which a recipe finds in its own folder
    text = path.read_text(encoding="utf-8")
    files += [script for script in sorted(path.parent.glob("*.py")) if re.search(rf"\b{script.stem}\b", text)]
    return files


def _say(name: str, path: Path) -> None:
    lines = textwrap.wrap(_about(path.read_text(encoding="utf-8")), 76)
    typer.echo(f"  {name}")
    typer.echo(textwrap.indent("\n".join(lines), "    "))


def _about(text: str) -> str:
    """The first sentence of a file's comment, without the command."""
    head = text.partition("\n\n")[0].splitlines() if text.startswith("#") else []
    said = [line.lstrip("# ").strip() for line in head if line.startswith("#")]
    said = [line for line in said if not re.match(r"(grass-hf|OMP_NUM_THREADS\S*|accelerate) ", line)]
    sentence = re.split(r"(?<=[.:]) (?=[A-Z])", " ".join(filter(None, said)), maxsplit=1)[0]
    return sentence.removesuffix(" Launch with").rstrip(":")
