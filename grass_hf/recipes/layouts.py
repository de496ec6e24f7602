"""Rows as data sets lay them out -> the columns that a task trains on, in TRL's names.

pretraining     {"text"}
sft             {"messages"} and perhaps {"tools", "chat_template_kwargs"}; {"prompt", "completion"} of plain text
dpo, reward     {"prompt", "chosen", "rejected"}, all text or all messages
kto             {"prompt", "completion", "label"}, or the same as dpo
grpo            {"prompt"} and every other column, for the reward functions
classification  {"text", "label"} and perhaps {"text_pair"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ..config.fields import unknown_key
from .places import BadRow, shown
from .turns import as_number, as_tools, chat, filled, parsed, string, turns

Row = dict[str, Any]

_CHAT = ("tools", "chat_template_kwargs")
# layout -> the columns it must have, and those it may have
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), ("prompt", "margin", *_CHAT)),
    "unpaired_preference": (("prompt", "completion", "label"), _CHAT),
    "messages": (("messages",), ("system", "functions", *_CHAT)),
    "sharegpt": (("conversations",), ("system", *_CHAT)),
    "alpaca": (("instruction", "output"), ("input", "system", "history", *_CHAT)),
    "prompt_completion": (("prompt", "completion"), ("system", *_CHAT)),
    "classification": (("text", "label"), ("text_pair",)),
    "prompt": (("prompt",), ()),
    "text": (("text",), ()),
}
# task -> its layouts, in the order in which they are looked for
LAYOUTS_OF = {
    "pretraining": ("text",),
    "sft": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "dpo": ("preference",),
    "reward": ("preference",),
    "kto": ("unpaired_preference", "preference"),
    "grpo": ("prompt",),
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
# Fields of a row that say what is learnt, where the layout has no place for them.
_MEANT = (
    *("image", "images", "video", "videos", "audio", "audios", "documents", "history", "functions", "system"),
    *(*_CHAT, "weight", "loss_weight"),
)


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
    if any(name not in names for name in needed):
        return None
    names = {name: names[name] for name in (*needed, *possible) if name in names}
    used = set(names.values())
    if layout == "prompt":  # the reward functions are given everything
        return {column: column for column in columns if column not in used} | names
    if layout not in ("text", "classification"):
        names |= {name: name for name in _MEANT if name in columns and name not in used and name not in names}
    return names


def converter(
    layout: str, names: dict[str, str], ignored: Iterable[str] = (), classes: Iterable[str] = ()
) -> Callable[[Row], Row | None]:
    """A function of a dataset's row: the row that the task trains on; it raises `BadRow`.

    Args:
        layout: of the rows.
        names: our name of a column -> the dataset's, from `find_layout`.
        ignored: fields of rows and turns that are left out.
        classes: names of classes that are given, of which one may be -1.
    """
    return partial(_converted, layout, names, tuple(ignored), tuple(classes))


def _converted(layout: str, names: dict[str, str], ignored: tuple, classes: tuple, row: Row) -> Row | None:
    row = {ours: _without(row[theirs], ignored) for ours, theirs in names.items() if ours not in ignored}
    if layout == "classification":
        return _classification(row, classes)
    if layout in ("text", "prompt"):
        return _CONVERTERS[layout](row)
    needed, possible = COLUMNS[layout]
    for name in _MEANT:
        if name not in (*needed, *possible) and row.get(name) not in (None, "", [], {}):
            raise BadRow(
                f"{name} is {shown(row[name])}, which the layout {layout} has no place for: "
                f"data.ignore_fields={name} leaves it out"
            )
    made = _CONVERTERS[layout](row) or {}
    extras = {"tools": as_tools(row), "chat_template_kwargs": parsed(row, "chat_template_kwargs", dict)}
    return made | {name: value for name, value in extras.items() if value}


def _without(value: Any, ignored: tuple) -> Any:
    if ignored and isinstance(value, list):
        return [{k: v for k, v in x.items() if k not in ignored} if isinstance(x, dict) else x for x in value]
    return value


def _text(row: Row) -> Row | None:
    text = string(row, "text")
    return {"text": text} if text.strip() else None  # an empty line is no document


def _chat(name: str, row: Row) -> Row:
    return {"messages": _with_system(row, chat(row[name], name))}


def _alpaca(row: Row) -> Row:
    question = filled(row, "instruction")
    if row.get("input"):
        question += "\n\n" + string(row, "input")
    pairs = parsed(row, "history", list) or []
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise BadRow(f"history is {shown(pairs)} and not a list of pairs [question, answer]")
    said = [text for pair in pairs for text in pair] + [question, filled(row, "output")]
    dialogue = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return {"messages": _with_system(row, chat(dialogue, "history"))}


def _with_system(row: Row, said: list[Row]) -> list[Row]:
    if not row.get("system"):
        return said
    own = said[0]["role"] == "system"
    if own and said[0]["content"] != row["system"]:
        raise BadRow(f"system is {shown(row['system'])}, and the chat begins with another system turn: keep one")
    return [{"role": "system", "content": string(row, "system")}, *said[own:]]


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list) and not row.get("system"):
        return {"prompt": filled(row, "prompt"), "completion": filled(row, "completion")}
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    said = _with_system(row, [*turns(prompt, "prompt"), *(answer := chat(completion, "completion"))])
    given = len(said) - len(answer)  # what stands in the prompt is not learnt, replies among it neither
    return {"messages": said} | ({"given": given} if any(t["role"] == "assistant" for t in said[:given]) else {})


def _preference(row: Row) -> Row:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, list):
        chosen, rejected = turns(chosen, "chosen"), turns(rejected, "rejected")
        if prompt:
            prompt = turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
            # many sets repeat the prompt at the head of both answers
            chosen, rejected = (a[len(prompt) :] if a[: len(prompt)] == prompt else a for a in (chosen, rejected))
        else:
            pairs = zip(chosen, rejected, strict=False)
            shared = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt or not chosen or not rejected:
            raise BadRow("chosen and rejected are not two different answers to one prompt")
    else:
        chosen, rejected = filled(row, "chosen"), filled(row, "rejected")
        if prompt is None:
            raise BadRow("chosen and rejected are plain text, which needs a column prompt")
        prompt = filled(row, "prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    made = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return made | ({"margin": as_number(row, "margin")} if row.get("margin") not in (None, "") else {})


def _unpaired(row: Row) -> Row:
    label = {"true": True, "1": True, "false": False, "0": False}.get(str(row["label"]).strip().lower())
    if label is None:
        raise BadRow(f"label is {shown(row['label'])} and neither true (wanted) nor false (unwanted)")
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        return {"prompt": _asturns(row, "prompt"), "completion": _asturns(row, "completion"), "label": label}
    return {"prompt": filled(row, "prompt"), "completion": filled(row, "completion"), "label": label}


def _prompt(row: Row) -> Row:
    return row | {"prompt": _asturns(row, "prompt") if isinstance(row["prompt"], list) else filled(row, "prompt")}


def _asturns(row: Row, name: str) -> list[Row]:
    role = "user" if name == "prompt" else "assistant"
    return turns([{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name], name)


def _classification(row: Row, classes: tuple) -> Row:
    label = int(row["label"]) if isinstance(row["label"], float) and row["label"].is_integer() else row["label"]
    if label is None or label == "" or (isinstance(label, int) and label < 0 and str(label) not in classes):
        raise BadRow(
            f"label is {shown(label)}, and a row needs one (test splits of GLUE have -1; "
            f"a class can be named -1 in data.labels)"
        )
    if isinstance(label, float):
        raise BadRow(f"label is {label!r}: classes are whole numbers or names")
    made = {"text": filled(row, "text"), "label": label}
    return made | ({"text_pair": filled(row, "text_pair")} if "text_pair" in row else {})


_CONVERTERS: dict[str, Callable[[Row], Row | None]] = {
    "text": _text,
    "messages": partial(_chat, "messages"),
    "sharegpt": partial(_chat, "conversations"),
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired_preference": _unpaired,
    "prompt": _prompt,
}
