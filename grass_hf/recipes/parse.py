"""A recipe's file and the flags behind it, as one `Recipe`.

The file maps sections to fields. Every field goes through `HfArgumentParser` as the flag it would be, so that file and
command line have the same types, choices and defaults; a flag behind the recipe replaces the file's value, and
``null`` takes it away. Fields are named without their section where only one section has them
(``--learning_rate 1e-3``), else with it (``--grass.seed 1``).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..config.extras import check_installed
from ..config.fields import unknown_key
from ..config.settings import GrassConfig
from ..config.shipped_files import find_recipe, model_config_file
from . import folders, sources
from .grass_section import WORDS, base_of, read_grass
from .names import ALTERNATIVES, ELSEWHERE, RENAMED, TRL, check_kind, connect, unknown
from .schema import TASKS, DataSection, EvaluationSection, LoraSection, ModelSection, Recipe
from .trainer_fields import argument_names, argument_parser

if TYPE_CHECKING:
    from transformers import TrainingArguments

SECTIONS = ("model", "data", "grass", "lora", "training", "evaluation")
_OPTIONAL = ("grass", "lora")  # absent is not the same as empty
_KINDS = {
    "model": ModelSection,
    "data": DataSection,
    "grass": GrassConfig,
    "lora": LoraSection,
    "evaluation": EvaluationSection,
}


def load_recipe(
    path: str | Path, flags: Iterable[str] = (), *, grass: bool = True, overwrite: bool | None = None
) -> Recipe:
    """Read a recipe and the flags behind it.

    What is wrong with its names, its values and its folders is found before transformers and torch are imported, as far
    as it can be.

    Args:
        path: of the YAML file, or the name of a shipped recipe.
        flags: words of a command line, as in ``["--max_steps", "10", "--grass.seed", "1"]``.
        grass: False drops the section `grass`: everything is trained in full by the base optimizer.
        overwrite: check the folders too (`folders.check_places`); None does not look at them.

    Raises:
        ValueError: the file cannot be read, or a section, field or value is not a valid one.
    """
    path = find_recipe(path)
    return build_recipe(read_document(path), path, flags, grass=grass, overwrite=overwrite)


def build_recipe(
    document: Mapping[str, Any],
    path: Path,
    flags: Iterable[str] = (),
    *,
    grass: bool = True,
    overwrite: bool | None = None,
) -> Recipe:
    """`load_recipe` for what a file holds."""
    task = _task(document, flags)
    if task not in TASKS:
        raise ValueError("task: " + unknown_key(task, TASKS, "known here"))
    for package in ("datasets", "trl"):
        check_installed(package, "a recipe")
    fields = {section: _names(kind) for section, kind in _KINDS.items()}
    fields["grass"].update(WORDS)
    installed = argument_names(TRL.get(task)) or _names(training_class(task))
    fields["training"] = {*installed, *RENAMED, *RENAMED.values()}
    _check_names(document, fields, path)
    given: dict[str, Any] = {s: dict(document.get(s) or {}) for s in SECTIONS if s in document or s not in _OPTIONAL}
    for section, field, words in _flags(flags, fields):
        if section:
            for other in ALTERNATIVES.get(field, ()):
                given.get(section, {}).pop(other, None)
            given.setdefault(section, {})[field] = words
            if words == ("null",):
                del given[section][field]  # as if the file did not say it
    _use_installed_names(given["training"], installed)
    if not grass:
        given.pop("grass", None)
    config, base = read_grass(given["grass"]) if "grass" in given else (None, None)
    if config is not None and "lora" in given:
        raise ValueError("grass and lora are two ways to train: leave one section out (--no-grass drops `grass`).")
    sections = {s: _parse(_KINDS[s], given[s], s) for s in ("model", "data", "evaluation")}
    lora = _parse(LoraSection, given["lora"], "lora") if "lora" in given else None
    _check_files(sections["model"], sections["data"], given["training"], overwrite)
    sections["training"] = _parse(training_class(task), given["training"], "training")
    base = base_of(sections["training"], config, base)
    connect(task, sections["data"], sections["training"], given["training"])
    shown = {"task": task, **{s: given[s] for s in SECTIONS if s in given}}
    return Recipe(path, task, grass=config, base=base, lora=lora, given=shown, **sections)


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def _check_files(model: ModelSection, data: DataSection, training: Mapping[str, Any], overwrite: bool | None) -> None:
    """What can be said about files and folders without reading them."""
    flag = {name: value[0] for name, value in training.items() if isinstance(value, tuple) and len(value) == 1}
    said = {**training, **flag}
    if not said.get("output_dir"):
        raise ValueError("training.output_dir is missing: give the folder for checkpoints, results and report.")
    if model.config_name is not None:
        model_config_file(model.config_name, "model.config_name")
    sources.check_local(data)
    if overwrite is not None:
        folders.check_places(str(said["output_dir"]), said.get("resume_from_checkpoint"), overwrite)


def training_class(task: str) -> type[TrainingArguments]:
    """The arguments of a task's trainer."""
    import transformers

    if task not in TRL:
        return transformers.TrainingArguments
    import trl

    return getattr(trl, TRL[task])


def read_document(path: str | Path) -> dict[str, Any]:
    """What a YAML file with sections holds.

    Raises:
        ValueError: it cannot be read, is not valid YAML, or says something twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read ({reason}): give the path of a YAML recipe.") from error
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise ValueError(f"{path} is not valid YAML:{where} {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} has no sections: a recipe has {', '.join(SECTIONS)}, each with `field: value` lines.")
    return document


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section, of which YAML would take the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key} stands there twice, keep one", node.value[number][0].start_mark
            )
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _task(document: Mapping[str, Any], flags: Iterable[str]) -> str:
    words = list(flags)
    for number, word in enumerate(words):
        if word == "--task" and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--task="):
            return word.removeprefix("--task=")
    if "task" not in document:
        raise ValueError(f"the recipe has no task: write `task: pretraining`, or another of {', '.join(TASKS)}.")
    if not isinstance(document["task"], str):
        raise ValueError(f"task holds {document['task']!r}: write one name, of {', '.join(TASKS)}.")
    return document["task"]


def _check_names(document: Mapping[str, Any], fields: Mapping[str, set[str]], path: Path) -> None:
    for key, value in document.items():
        if key == "task":
            continue
        if key not in fields:
            owners = [section for section, names in fields.items() if key in names]
            if not owners and key in ELSEWHERE:
                raise ValueError(f"{path}: " + unknown(str(key), "", fields))
            if owners:
                raise ValueError(f"{path}: {key} stands outside its section: write it under `{owners[0]}:`.")
            raise ValueError(f"{path}: " + unknown_key(str(key), ["task", *fields], "a section of a recipe"))
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{path}: {key} holds {value!r}: write one `field: value` per line under it.")
        for name in value or ():
            if name not in fields[key]:
                raise ValueError(f"{path}: " + unknown(str(name), key, fields))


def _use_installed_names(values: dict[str, Any], installed: Iterable[str]) -> None:
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise ValueError(f"training.{old} and training.{new} are two names of one field: keep one.")
        other, name = (old, new) if new in installed else (new, old)
        if other in values:
            values[name] = values.pop(other)


def _flags(flags: Iterable[str], fields: Mapping[str, set[str]]) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    """(section, field, words) of every flag; ("", "task", words) for the task."""
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no flag: flags behind a recipe are written --field value.")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        section, _, field = name.replace("-", "_").rpartition(".")
        if not section:
            owners = [s for s, names in fields.items() if field in names]
            if len(owners) > 1:
                ways = " or ".join(f"--{s}.{field}" for s in owners)
                raise ValueError(f"--{field} is a field of {' and of '.join(owners)}: write {ways}.")
            if not owners and field in ELSEWHERE:
                raise ValueError(f"flag --{field}: " + unknown(field, "", fields))
            if not owners and field != "task":
                known = {f"--{name}" for names in fields.values() for name in names}
                raise ValueError("flag " + unknown_key(f"--{field}", known, "a field of a recipe"))
            section = owners[0] if owners else ""
        elif section not in fields:
            raise ValueError(f"flag --{name}: " + unknown_key(section, fields, "a section of a recipe"))
        elif field not in fields[section]:
            raise ValueError(f"flag --{name}: " + unknown(field, section, fields))
        yield section, field, tuple(values)


@functools.cache
def _parser_class() -> type:
    base = argument_parser()

    class Parser(base):  # type: ignore[valid-type, misc]  # a class that is known when this runs
        def error(self, message: str):
            raise argparse.ArgumentTypeError(message)

    return Parser


def _parse(kind: type, values: Mapping[str, Any], section: str) -> Any:
    """An instance of a section's dataclass from what the recipe says: values of YAML, or tuples of a flag's words."""
    parser = _parser_class()(kind, add_help=False, allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions if not isinstance(action, argparse._StoreFalseAction)}
    words: list[str] = []
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        action = actions[name]
        check_kind(f"{section}.{name}", value, hints[name], action.default)
        if value is None or value == [] or (isinstance(value, list) and action.nargs is None and len(value) > 1):
            parser.set_defaults(**{name: value})  # nothing that a flag could say
            continue
        said = [_word(item) for item in value] if isinstance(value, (list, tuple)) else [_word(value)]
        for word in said if action.choices else ():
            if word not in map(str, action.choices):
                raise ValueError(f"{section}.{name}: " + unknown_key(word, map(str, action.choices), "known here"))
        words += [f"--{name}={said[0]}"] if len(said) == 1 else [f"--{name}", *said]
    try:
        (parsed,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except argparse.ArgumentTypeError as error:
        raise ValueError(re.sub(r"^argument --(\w+)\S*:", rf"{section}.\1:", str(error)) + ".") from error
    except (ImportError, TypeError) as error:
        raise ValueError(f"{section}: {error}") from error
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{section}") else f"{section}: {text}") from error
    return parsed


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
