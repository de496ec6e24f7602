"""Settings as they are written: text, a mapping, or a mapping that a tool has made text of.

They reach us in three forms. On a command line they are text, ``"rank=256,base=adamw_torch"``. YAML files and code give
a mapping, which parsers of transformers and TRL hand on as it is. And some tools make text of the mapping on the way:
its JSON or Python form, or pairs whose values have that form (``target_modules=['q_proj', 'v_proj']``).
"""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .fields import parse, unknown_key

_OPENED, _CLOSED = "([{", ")]}"
# What is the Trainer's own to say, and how.
TRAINERS = {
    **dict.fromkeys(("lr", "learning_rate"), "--learning_rate"),
    **dict.fromkeys(("wd", "weight_decay"), "--weight_decay"),
    **dict.fromkeys(("betas", "beta1", "beta2", "adam_beta1", "adam_beta2"), "--adam_beta1 and --adam_beta2"),
    **dict.fromkeys(("eps", "epsilon", "adam_epsilon"), "--adam_epsilon"),
    **dict.fromkeys(("warmup", "warmup_steps"), "--warmup_steps"),
    "optim": "base=",
    "optimizer": "base=",
    "momentum": "base.momentum=",
}


def read(
    given: str | Mapping[str, Any] | None, kinds: Mapping[str, tuple[type, ...]], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that are given, and the arguments of the base optimizer (``base.momentum``) as text.

    Args:
        given: the text, the mapping, or None.
        kinds: the types that each field accepts.
        defaults: fields taken where `given` does not set them.

    Raises:
        ValueError: a key is unknown or given twice, or a value is none that its field takes; the sentence names it.
    """
    values: dict[str, Any] = dict(defaults)
    seen: set[str] = set()
    base_args = {}
    for key, value in _pairs(given, kinds):
        if key in seen:
            raise ValueError(f"optim_args: {key} is given twice: keep one.")
        seen.add(key)
        if key.startswith("base.") and key != "base.":
            base_args[key.removeprefix("base.")] = value if isinstance(value, str) else repr(value)
        elif key in ("base", "preset"):
            if value is None:  # "base: null" in YAML: as if it were not there
                continue
            if not isinstance(value, str):
                raise ValueError(
                    f"optim_args: {key}={value!r} is a {type(value).__name__} and not a name: write 'base: sgd', say, "
                    "and its own arguments beside it, 'base.momentum: 0.9'."
                )
            values[key] = value
        elif key in kinds:
            values[key] = _value(key, value, kinds[key])
        elif key in TRAINERS:
            raise ValueError(f"optim_args: {key} is no setting of Grass: write {TRAINERS[key]} instead.")
        else:
            raise ValueError("optim_args: " + unknown_key(key, [*kinds, "base", "preset"], "a setting of Grass"))
    if any(
        values.get(name) is not None for name in {"rank", "density"} & seen
    ):  # its choice replaces a default of the other
        for name in {"rank", "density"} - seen:
            values.pop(name, None)
    return values, base_args


def _pairs(given: Any, kinds: Mapping[str, tuple[type, ...]]) -> Iterator[tuple[str, Any]]:
    if isinstance(given, str) and given.strip().startswith("{"):
        given = _mapping(given.strip())
    if isinstance(given, Mapping):
        yield from ((str(key), value) for key, value in given.items())
        return
    if given is not None and not isinstance(given, str):
        raise ValueError(
            f"optim_args={given!r} is a {type(given).__name__}: give text of the form key=value, separated by commas, "
            "or a mapping."
        )
    parts, last = list(filter(None, (p.strip() for p in _split(given or "")))), ""
    for number, part in enumerate(parts):
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals and tuple in kinds.get(last.partition("=")[0].strip(), ()) and not set(_OPENED) & set(last):
            rest = ";".join([last, *itertools.takewhile(lambda other: "=" not in other, parts[number:])])
            raise ValueError(
                f"optim_args: {last},{part}: names of a list are separated by semicolons: write {rest} instead."
            )
        last = part
        if not equals or not key or not value:
            raise ValueError(f"optim_args: {part!r} is not of the form key=value; separate pairs by commas.")
        yield key, value


def _mapping(text: str) -> Mapping[str, Any]:
    """The mapping that was made text of, as JSON or as Python shows it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"optim_args={text!r} begins as a mapping and is neither JSON nor a Python dict: write key=value, "
            "separated by commas."
        )
    return value


def _split(text: str) -> list[str]:
    """At commas, but not at those between brackets; where the brackets do not match, at all of them."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENED) - (letter in _CLOSED)
        if depth < 0:
            break
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return text.split(",") if depth else parts


def _value(key: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """The value of a field: text as on the command line, also where it stands in a mapping."""
    if isinstance(value, str):
        # a list or a mapping that a tool has made text of; no regular expression and no list of ours reads like one
        made = _literal(value) if value[:1] in _OPENED and {tuple, dict} & set(kinds) else None
        if not isinstance(made, (list, tuple, Mapping)):
            return parse(key, value, kinds, "optim_args")
        value = made
    if isinstance(value, Mapping) and dict in kinds:
        return {pattern: _number(number) for pattern, number in value.items()}
    if not isinstance(value, (str, Mapping)) and hasattr(value, "__iter__"):
        return tuple(value)  # a list, and OmegaConf's, which is none
    return value


def _number(value: Any) -> Any:
    """A number that YAML reads as text (``5e-1``) or a tool has made text of; anything else as it is."""
    made = _literal(value) if isinstance(value, str) else value
    return made if isinstance(made, (int, float)) else value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # TypeError: "{[1]: 2}"
        return None
