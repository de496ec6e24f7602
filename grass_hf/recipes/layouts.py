"""Rows as data sets lay them out -> the columns that a task trains on.

    pretraining     {"text"}
    sft             {"messages"}, or {"prompt", "completion"} where both are plain text
    dpo             {"prompt", "chosen", "rejected"}, all text or all messages
    classification  {"text", "label"} and perhaps {"text_pair"}

| layout | columns |
|---|---|
| text | text |
| messages | messages: [{role, content}, ...] |
| sharegpt | conversations: [{from, value}, ...] |
| alpaca | instruction, output, and perhaps input |
| prompt_completion | prompt, completion: text or messages |
| preference | chosen, rejected, and perhaps prompt: text or messages |
| classification | text, label, and perhaps text_pair; GLUE's own names are known |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..config.fields import unknown_key
from .rows import BadRow

Row = dict[str, Any]

# layout -> the columns it must have, and those it may have
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), ("prompt",)),
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt_completion": (("prompt", "completion"), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "text": (("text",), ()),
}
# task -> its layouts, in the order in which they are looked for
LAYOUTS_OF = {
    "pretraining": ("text",),
    "sft": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "dpo": ("preference",),
    "classification": ("classification",),
}
# What GLUE and others call the one or two texts of a labelled row.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence", None),
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool", "function")}


def find_layout(task: str, wanted: str, columns: Iterable[str], renamed: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The layout of a dataset, and the name of its column for each of ours.

    Args:
        task: one of `schema.TASKS`.
        wanted: a layout, or "auto".
        columns: of the dataset.
        renamed: our name -> the dataset's, as the recipe says.

    Raises:
        ValueError: the columns do not fit; the sentence names those that are there.
    """
    columns = list(columns)
    layouts = LAYOUTS_OF[task] if wanted == "auto" else (wanted,)
    if wanted != "auto" and wanted not in LAYOUTS_OF[task]:
        raise ValueError(f"data.layout={wanted} is none of task={task}: it has {', '.join(LAYOUTS_OF[task])}.")
    for ours, theirs in renamed.items():
        known = {name for layout in layouts for group in COLUMNS[layout] for name in group}
        if ours not in known:
            raise ValueError("data.columns: " + unknown_key(ours, known, f"a column of task={task}"))
        if theirs not in columns:
            raise ValueError(f"data.columns: {ours}={theirs}: " + unknown_key(theirs, columns, "a column of the data"))
    for layout in layouts:
        names = _named(layout, columns, renamed)
        if names is not None:
            return layout, names
    shapes = "; or ".join(" and ".join(COLUMNS[layout][0]) for layout in layouts)
    raise ValueError(
        f"data has the columns {', '.join(columns)}, and task={task} needs {shapes}: say which is which with "
        f"data.columns, for example {COLUMNS[layouts[0]][0][0]}={columns[0] if columns else 'NAME'}."
    )


def _named(layout: str, columns: list[str], renamed: dict[str, str]) -> dict[str, str] | None:
    needed, possible = COLUMNS[layout]
    names = {name: name for name in (*needed, *possible) if name in columns} | renamed
    if layout == "classification" and "text" not in names:
        for first, second in _PAIRS:
            if first in columns and (second is None or second in columns):
                names |= {"text": first} | ({"text_pair": second} if second else {})
                break
    if all(name in names for name in needed):
        return {name: names[name] for name in (*needed, *possible) if name in names}
    return None


def converter(layout: str, names: dict[str, str]) -> Callable[[Row], Row | None]:
    """A function of a dataset's row: the row that the task trains on; it raises `BadRow`."""
    convert = _CONVERTERS[layout]

    def function(row: Row) -> Row | None:
        return convert({ours: row[theirs] for ours, theirs in names.items()})

    return function


def _text(row: Row) -> Row | None:
    text = _string(row, "text")
    return {"text": text} if text.strip() else None  # an empty line is no document


def _messages(row: Row) -> Row:
    return {"messages": _chat(row["messages"], "messages", "role", "content")}


def _sharegpt(row: Row) -> Row:
    chat = row["conversations"]
    first = chat[0] if isinstance(chat, list) and chat else {}
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return {"messages": _with_system(row, _chat(chat, "conversations", *keys))}


def _alpaca(row: Row) -> Row:
    question = _filled(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _string(row, "input")
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": _filled(row, "output")}]
    return {"messages": _with_system(row, chat)}


def _with_system(row: Row, chat: list[Row]) -> list[Row]:
    return [{"role": "system", "content": _string(row, "system")}, *chat] if row.get("system") else chat


def _prompt_completion(row: Row) -> Row:
    if isinstance(row["prompt"], list):
        chat = [
            *_turns(row["prompt"], "prompt", "role", "content"),
            *_turns(row["completion"], "completion", "role", "content"),
        ]
        return {"messages": _checked(chat, "completion")}
    return {"prompt": _filled(row, "prompt"), "completion": _filled(row, "completion")}


def _preference(row: Row) -> Row:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        chosen = _turns(chosen, "chosen", "role", "content")
        rejected = _turns(rejected, "rejected", "role", "content")
        if row.get("prompt"):
            prompt = row["prompt"]
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = _turns(prompt, "prompt", "role", "content")
            # many sets repeat the prompt at the head of both answers
            chosen, rejected = (a[len(prompt) :] if a[: len(prompt)] == prompt else a for a in (chosen, rejected))
        else:
            shared = _shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt or not chosen or not rejected:
            raise BadRow("chosen and rejected are not two different answers to one prompt")
    else:
        chosen, rejected = _filled(row, "chosen"), _filled(row, "rejected")
        prompt = _filled(row, "prompt") if "prompt" in row else None
        if prompt is None:
            raise BadRow("chosen and rejected are plain text, which needs a column prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared(first: list[Row], second: list[Row]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count


def _classification(row: Row) -> Row:
    if row["label"] is None or (isinstance(row["label"], int) and row["label"] < 0):
        raise BadRow(f"label is {row['label']!r}, and a row needs one (test splits of GLUE have -1)")
    if isinstance(row["label"], float):
        raise BadRow(f"label is {row['label']!r}: classes are whole numbers or names")
    made = {"text": _filled(row, "text"), "label": row["label"]}
    return made | ({"text_pair": _filled(row, "text_pair")} if "text_pair" in row else {})


def _chat(chat: Any, name: str, role: str, content: str) -> list[Row]:
    return _checked(_turns(chat, name, role, content), name)


def _turns(chat: Any, name: str, role: str, content: str) -> list[Row]:
    if not isinstance(chat, list) or not chat:
        raise BadRow(f"{name} is {_shown(chat)} and not a list of turns")
    turns = []
    for number, turn in enumerate(chat, 1):
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise BadRow(f"turn {number} of {name} is {_shown(turn)} and has no {role} and {content}")
        if turn[role] not in _ROLES:
            raise BadRow(f"turn {number} of {name} has the {role} {turn[role]!r}: user, assistant and system are known")
        if not isinstance(turn[content], str):
            raise BadRow(f"turn {number} of {name} has the {content} {_shown(turn[content])}, which is no text")
        turns.append({"role": _ROLES[turn[role]], "content": turn[content]})
    return turns


def _checked(chat: list[Row], name: str) -> list[Row]:
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in chat):
        raise BadRow(f"{name} has no turn of the assistant, so there is nothing to learn")
    return chat


def _string(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise BadRow(f"{name} is {_shown(row[name])} and not a text")
    return row[name]


def _filled(row: Row, name: str) -> str:
    text = _string(row, name)
    if not text.strip():
        raise BadRow(f"{name} is empty")
    return text


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_CONVERTERS: dict[str, Callable[[Row], Row | None]] = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "classification": _classification,
}
