"""Names of a trainer's arguments, and transformers' parser of arguments, without an import of transformers or TRL.

That takes seconds, because torch comes with it. What is wrong with a name or a value can so be said at once.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

_FIRST = ("transformers", "training_args.py", "TrainingArguments")


@cache
def argument_names(trl_class: str | None = None) -> frozenset[str] | None:
    """The fields of `transformers.TrainingArguments`, or of a class of TRL's that inherits from it.

    Args:
        trl_class: SFTConfig, say; None for transformers' own.

    Returns:
        The names that the constructor takes, or None where the sources do not say it (they are not there as text, or a
        class inherits from one that is not found): ask the class itself then.
    """
    try:
        if trl_class is None:
            return frozenset(_fields(_folder(_FIRST[0]) / _FIRST[1], _FIRST[2]))
        stem = trl_class.removesuffix("Config").lower()
        return frozenset(_fields(_folder("trl") / "trainer" / f"{stem}_config.py", trl_class))
    except (OSError, SyntaxError, LookupError):
        return None


@cache
def argument_parser() -> Any:
    """The class `transformers.HfArgumentParser`, of a module that needs nothing else of transformers."""
    try:
        spec = importlib.util.spec_from_file_location("grass_hf_argparser", _folder(_FIRST[0]) / "hf_argparser.py")
        assert spec is not None and spec.loader is not None  # the file's name ends in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.HfArgumentParser
    except (OSError, ImportError, LookupError):  # it needs its package after all
        from transformers import HfArgumentParser

        return HfArgumentParser


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # of a package at the top: nothing is imported
    if spec is None or spec.origin is None:
        raise LookupError(package)
    return Path(spec.origin).parent


def _fields(path: Path, name: str) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in _class(tree, name).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_argument(node):
            found.add(node.target.id)
    for base in _class(tree, name).bases:
        if not isinstance(base, ast.Name):
            raise LookupError(ast.unparse(base))
        found |= _fields(*_where(tree, path, base.id))
    return found


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(name)


def _is_argument(node: ast.AnnAssign) -> bool:
    """Whether a line of a dataclass is an argument of its constructor."""
    if "ClassVar" in ast.unparse(node.annotation):
        return False
    options = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(o.arg == "init" and isinstance(o.value, ast.Constant) and o.value.value is False for o in options)


def _where(tree: ast.Module, path: Path, name: str) -> tuple[Path, str]:
    """File and name of a class that a module defines or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, name
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) != name:
                continue
            if alias.name == _FIRST[2] and (node.module or "").split(".")[0] == _FIRST[0]:
                return _folder(_FIRST[0]) / _FIRST[1], alias.name
            if node.level and node.module:
                folder = path.parents[node.level - 1]
                return folder.joinpath(*node.module.split(".")).with_suffix(".py"), alias.name
    raise LookupError(name)
