"""Rows in a task's columns -> tokens and labels.

Each encoder is a function of one row with `features`, for `Rows.made`. What they hold decides the tokens, and names the
cached result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute
from transformers import DataCollatorForSeq2Seq, default_data_collator
from trl import pack_dataset

from .chats import PLAIN_TEMPLATE, ChatEncoder, chat_encoder
from .places import BadRow
from .rows import Rows

__all__ = ["PLAIN_TEMPLATE", "ChatEncoder", "chat_encoder"]  # of `chats`

Row = dict[str, Any]
# What TRL's trainers of preferences read.
TRL_COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "margin", "tools", "chat_template_kwargs")


def _tokens(**columns: str) -> Any:
    """Features of lists of numbers."""
    from datasets import Features, List, Value

    return Features({name: List(Value(dtype)) for name, dtype in columns.items()})


@dataclass
class Encoded:
    """A converter of `layouts` and an encoder behind it, as one function."""

    convert: Callable[[Row], Row | None]
    encode: Any

    def __call__(self, row: Row) -> Row | None:
        made = self.convert(row)
        return None if made is None else self.encode(made)

    @property
    def features(self) -> Any:
        return self.encode.features


@dataclass
class TextEncoder:
    """Documents for pretraining: the tokens of a text and the end-of-text token."""

    tokenizer: Any

    @property
    def features(self) -> Any:
        return _tokens(input_ids="int32")

    def __call__(self, row: Row) -> Row:
        ids = self.tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [*ids, self.tokenizer.eos_token_id]}


def blocks(rows: Rows, length: int, workers: int, whole: bool) -> None:
    """Cut documents into blocks of `length` tokens, by TRL; every ten thousand documents leave one shorter block.

    Args:
        rows: of ``{"input_ids"}``; their dataset is replaced.
        length: of a block.
        workers: processes.
        whole: leave the shorter blocks out and count their tokens, for an evaluation that weighs all blocks alike.

    Raises:
        ValueError: all of them are shorter than one block.
    """
    options = {"batch_size": 10_000} | ({} if rows.streaming else {"num_proc": workers if workers > 1 else None})
    rows.dataset = pack_dataset(rows.dataset.select_columns(["input_ids"]), length, "wrapped", options)
    if rows.streaming:
        return
    lengths = pyarrow.compute.list_value_length(rows.dataset.data["input_ids"]).to_pylist()
    full = [number for number, size in enumerate(lengths) if size == length]
    if not full and len(lengths) == 1:
        raise ValueError(
            f"data.sequence_length={length} is longer than the text of {rows.name}: give a smaller one or more rows."
        )
    if whole and full:
        rows.dataset = rows.dataset.select(full)
        rows.tail = sum(lengths) - length * len(full)


def block_collator(tokenizer: Any) -> Callable[[list[Row]], Row]:
    """Batches of blocks; what a shorter block is padded with is not learnt."""
    return partial(_block_batch, DataCollatorForSeq2Seq(tokenizer))


def _block_batch(pad: Any, rows: list[Row]) -> Row:
    rows = [{"input_ids": row["input_ids"], "labels": list(row["input_ids"])} for row in rows]
    whole = len({len(row["input_ids"]) for row in rows}) == 1  # needs no attention mask
    return default_data_collator(rows) if whole else pad(rows)


@dataclass
class LabelEncoder:
    """Rows of ``{"text", "label"}``: the model's inputs, and the number of the class as ``labels``.

    Attributes:
        tokenizer: of the model.
        labels: names of the classes.
        numbers: a label as rows have it -> the number of its class.
        length: the most tokens.
    """

    tokenizer: Any
    labels: list[str]
    numbers: dict[Any, int]
    length: int

    @property
    def features(self) -> Any:
        from datasets import Value

        return _tokens(**dict.fromkeys(self.tokenizer("a"), "int32")) | {"labels": Value("int64")}

    def __call__(self, row: Row) -> Row:
        label = str(row["label"]) if isinstance(row["label"], bool) else row["label"]
        number = self.numbers.get(label, self.numbers.get(str(label)))
        if number is None:
            raise BadRow(f"label {label!r} is not one of {', '.join(self.labels)}")
        texts = (row["text"], row.get("text_pair"))
        made = self.tokenizer(*texts, verbose=False)
        length = len(made["input_ids"])
        if length > self.length:
            made = self.tokenizer(*texts, truncation=True, max_length=self.length)
        return {**made, "labels": number, "length": length}


@dataclass
class Labelled:
    """Rows for TRL's `SFTTrainer`: tokens, and labels that are -100 where nothing is learnt.

    Attributes:
        encode: a `ChatEncoder`.
        length: the most tokens; None where TRL packs.
        keep_end: cut the beginning of longer rows, not the end.
    """

    encode: ChatEncoder
    length: int | None
    keep_end: bool = False

    @property
    def features(self) -> Any:
        return _tokens(input_ids="int32", labels="int32")

    def __call__(self, row: Row) -> Row | None:
        ids, mask = self.encode(row)
        part = slice(-self.length if self.length else None, None) if self.keep_end else slice(self.length)
        labels = [token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)]
        made: Row = {"input_ids": ids[part], "labels": labels[part], "length": len(ids)}
        return made if any(label != -100 for label in made["labels"][1:]) else None


@dataclass
class PreferenceEncoder:
    """Rows for TRL's trainers of preferences, which make the tokens: looked at, and left as they are.

    Attributes:
        chat: renders.
        task: of the recipe.
        length: the most tokens; the rows that TRL would drop for it are left out here, and counted.
        kinds: column -> its feature, or None.
    """

    chat: ChatEncoder
    task: str
    length: int
    kinds: dict[str, Any]

    @property
    def features(self) -> dict[str, Any]:
        import datasets

        json = getattr(datasets, "Json", lambda: None)()  # since datasets 4.8; None: found from the rows
        kinds = {"label": datasets.Value("bool"), "margin": datasets.Value("float32")}
        kinds = self.kinds if self.task == "grpo" else kinds
        named = ("prompt", "chosen", "rejected", "completion")
        return {name: (None if name in named else kinds.get(name)) or json for name in self.kinds}

    def __call__(self, row: Row) -> Row | None:
        if self.task == "reward" and "margin" in self.kinds and "margin" not in row:
            raise BadRow("margin is missing, and other rows have one")
        row = row | {"prompt": self._with_system(row["prompt"])}
        answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row and self.task != "grpo"]
        if any(turn.get("weight") == 0 for answer in answers if isinstance(answer, list) for turn in answer):
            raise BadRow(f"a turn has weight=0, and task={self.task} learns whole answers: take it out of the rows")
        lengths = [self._length(row["prompt"], answer, row) for answer in answers]
        prompt = self._length(row["prompt"], None, row)
        too_long = max(lengths) > self.length if self.task == "reward" else prompt >= self.length
        if too_long:
            return None
        made = {name: row.get(name, {} if name == "chat_template_kwargs" else None) for name in self.kinds}
        return made | {"length": max([*lengths, prompt])}

    def _with_system(self, prompt: Any) -> Any:
        system = self.chat.system_prompt
        if system is None or (isinstance(prompt, list) and prompt[0]["role"] == "system"):
            return prompt
        if isinstance(prompt, str) and self.task != "grpo":
            raise BadRow("data.system_prompt has no place before plain text: leave it out, or give rows with messages")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [{"role": "system", "content": system}, *turns]

    def _length(self, prompt: Any, answer: Any, row: Row) -> int:
        if isinstance(prompt, str):
            self.chat.check_plain(row if self.task != "grpo" else {})
            ids = self.chat.tokenizer(prompt + (answer or ""), verbose=False)["input_ids"]
            return len(ids) + (answer is not None and ids[-1] != self.chat.tokenizer.eos_token_id)
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        return self.chat.count([*prompt, *(answer or [])], answer is None, options)
