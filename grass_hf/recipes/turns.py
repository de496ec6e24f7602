"""The turns of a chat: roles, tool calls, weights and the other fields, in the form that chat templates want.

[Note: fields of a turn] What a turn has beside role and content goes to the chat template as it is: tool_calls,
reasoning_content, name. `encode.ChatEncoder` refuses what the template then leaves out. A weight, 0 or 1, says whether
the turn is learnt.
"""

from __future__ import annotations

import json
from typing import Any

from .places import BadRow, shown

Row = dict[str, Any]

_ROLES = {role: role for role in ("user", "assistant", "system", "developer", "tool")}
_ROLES |= {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant")}
_ROLES |= dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool")
_WEIGHTS = ("weight", "train", "training", "loss", "loss_weight", "loss_scale")
# Fields of a turn that say nothing about what is learnt.
_NOTES = ("id", "message_id", "parent_id", "created_at", "timestamp", "model", "lang", "language", "source")


def chat(said: Any, name: str) -> list[Row]:
    """The turns of a column, of which one at least is a reply.

    Args:
        said: a list of turns, or the same as JSON.
        name: of the column.

    Raises:
        BadRow: it is something else, or a field of a turn cannot be honoured.
    """
    made = turns(said, name)
    replies = [turn for turn in made if turn["role"] == "assistant"]
    if not any(turn["content"].strip() or set(turn) - {"role", "content", "weight"} for turn in replies):
        raise BadRow(f"{name} has no turn of the assistant, so there is nothing to learn")
    return made


def turns(said: Any, name: str) -> list[Row]:
    """The turns of a column, as `chat` has them, but without the need for a reply."""
    if isinstance(said, str) and said.lstrip().startswith("["):  # in a cell of a CSV
        said = _read(said, name, list)
    if not isinstance(said, list) or not said:
        raise BadRow(f"{name} is {shown(said)} and not a list of turns")
    return [_turn(turn, f"turn {number} of {name}") for number, turn in enumerate(said, 1)]


def _turn(turn: Any, where: str) -> Row:
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise BadRow(f"{where} is {shown(turn)} and has no role and content")
    rest = {key: value for key, value in turn.items() if value not in (None, "", [], {}) and key not in _NOTES}
    role = rest.pop("from", None) or rest.pop("role", None)
    content = rest.pop("value", turn.get("content"))
    rest.pop("content", None)
    if role not in _ROLES:
        raise BadRow(f"{where} has the role {role!r}: user, assistant, system and tool are known")
    if role == "function_call":  # LLaMA-Factory's way to write a tool call
        rest["function_call"], content = content, ""
    if "function_call" in rest:  # OpenAI's first way
        call = _read(rest.pop("function_call"), f"function_call in {where}", (dict, list))
        rest["tool_calls"] = [{"type": "function", "function": c} for c in (call if isinstance(call, list) else [call])]
    if "tool_calls" in rest:
        rest["tool_calls"] = [_call(call, where) for call in _read(rest["tool_calls"], f"tool_calls in {where}", list)]
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None and "tool_calls" in rest:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{where} has the content {shown(content)}, which is no text")
    return {"role": _ROLES[role], "content": content} | _weight(rest, where) | rest


def _weight(rest: Row, where: str) -> Row:
    made = {}
    for key in _WEIGHTS:
        if key in rest:
            weight = rest.pop(key)
            if weight not in (0, 1):
                raise BadRow(f"{where} has {key}={weight!r}: 0 (not learnt) and 1 (learnt) can be honoured")
            made["weight"] = int(weight)
    return made


def _call(call: Any, where: str) -> Row:
    """A tool call whose arguments are an object, as templates want them."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has the tool call {shown(call)}, which has no name")
    function = function | {"arguments": _read(function.get("arguments") or {}, f"arguments in {where}", dict)}
    return {"type": "function", **call, "function": function} if "function" in call else function


def as_tools(row: Row) -> list[Row]:
    """The functions that a chat may call, each as ``{"type": "function", "function": ...}``."""
    tools = parsed(row, "tools", list) or parsed(row, "functions", list) or []
    return [{"type": "function", "function": t} if isinstance(t, dict) and "function" not in t else t for t in tools]


def parsed(row: Row, name: str, kind: Any) -> Any:
    """A column with a list or an object, which may be written as JSON; None for nothing."""
    return None if row.get(name) in (None, "") else _read(row[name], name, kind)


def _read(value: Any, name: str, kind: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"{name} is {shown(value)}, which is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise BadRow(f"{name} is {shown(value)} and not {'a list' if kind is list else 'an object'}")
    return value


def string(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise BadRow(f"{name} is {shown(row[name])} and not a text")
    return row[name]


def filled(row: Row, name: str) -> str:
    text = string(row, name)
    if not text.strip():
        raise BadRow(f"{name} is empty")
    return text


def as_number(row: Row, name: str) -> float:
    try:
        return float(row[name])
    except (TypeError, ValueError) as error:
        raise BadRow(f"{name} is {shown(row[name])} and not a number") from error
