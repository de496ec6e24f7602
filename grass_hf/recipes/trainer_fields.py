"""Names of a trainer's arguments, and transformers' parser of arguments, without an import of transformers or TRL.

That takes seconds, because torch comes with it. What is wrong with a name or a value can so be said at once.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any


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
        files = [_folder("transformers") / "training_args.py"]
        if trl_class is not None:
            stem = trl_class.removesuffix("Config").lower()
            files += [_folder("trl") / "trainer" / f"{name}_config.py" for name in ("base", stem)]
        trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
        classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
        return frozenset(_fields(classes, trl_class or "TrainingArguments"))
    except (OSError, SyntaxError, LookupError):
        return None


@cache
def argument_parser() -> Any:
    """The class `transformers.HfArgumentParser`, of a module that needs nothing else of transformers."""
    try:
        spec = importlib.util.spec_from_file_location("grass_hf_argparser", _folder("transformers") / "hf_argparser.py")
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


def _fields(classes: dict[str, ast.ClassDef], name: str) -> set[str]:
    """Arguments of a dataclass's constructor, those of the classes that it inherits from among them."""
    lines = (node for node in classes[name].body if isinstance(node, ast.AnnAssign))
    own = {ast.unparse(node.target) for node in lines if _is_argument(node)}
    return own.union(*(_fields(classes, ast.unparse(base)) for base in classes[name].bases))


def _is_argument(node: ast.AnnAssign) -> bool:
    if "ClassVar" in ast.unparse(node.annotation):
        return False
    options = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(o.arg == "init" and ast.unparse(o.value) == "False" for o in options)
