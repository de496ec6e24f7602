"""Text -> tokens.

    pack         documents, joined by end-of-text tokens and cut into blocks of equal length
    encode_chat  a chat in the tokenizer's template; the loss is of the assistant's turns
    encode_pair  a prompt and its completion as plain text; the loss is of the completion
    encode_text  one text; the loss is of all of it

[Note: what is trained in a chat] A chat is rendered turn by turn: what the template adds for a reply, after its prompt
for one, is what the model has to say, the end-of-turn token included. Both pieces are tokenised by themselves, exactly
as at generation, where the prompt comes first and the reply token by token. So no template needs marks for the
assistant's turns, but it must not rewrite earlier turns when a later one comes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from .rows import BadRow
from .sources import Rows

# For tokenizers without a template of their own; no token is added to the vocabulary.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def pack(rows: Rows, tokenizer: Any, length: int, key: str, workers: int = 1) -> Rows:
    """Blocks of `length` tokens from rows of ``{"text"}``; the tail of every thousand documents is dropped.

    Raises:
        ValueError: there is no whole block.
    """
    end = tokenizer.eos_token_id

    def blocks(batch: dict[str, list]) -> dict[str, list]:
        documents = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([*document, end] for document in documents))
        cut = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut, "labels": [list(block) for block in cut]}

    made = rows.convert_batches(blocks, f"pack {length} {key}", workers=workers)
    if not made.streaming and len(made.dataset) == 0:
        raise ValueError(
            f"data.sequence_length={length} is longer than the text of {rows.name}: give a smaller one or more rows."
        )
    return made


def encode_rows(
    rows: Rows, encode: Callable[[dict[str, Any]], tuple[list[int], list[int]]], length: int, key: str, **options
) -> Rows:
    """Rows of ``{"input_ids", "completion_mask"}``, cut to `length`; without those that then have nothing to learn."""

    def function(row: dict[str, Any]) -> dict[str, Any] | None:
        ids, mask = encode(row)
        ids, mask = ids[:length], mask[:length]
        return {"input_ids": ids, "completion_mask": mask} if any(mask[1:]) else None

    made = rows.convert(function, f"encode {length} {key}", **options)
    if not made.streaming and len(made.dataset) == 0:
        raise ValueError(
            f"data.sequence_length={length} leaves no row of {rows.name} with anything to learn: give a larger one."
        )
    return made


def chat_encoder(
    tokenizer: Any, loss_on: str, system_prompt: str | None, length: int | None = None
) -> Callable[[dict[str, Any]], tuple[list[int], list[int]]]:
    """A function of a row of `layouts`' columns for finetuning: token ids, and 1 for those to learn.

    A chat longer than `length` tokens is rendered only as far as that: every turn costs a rendering of all before it.

    Raises:
        ValueError: see [Note: what is trained in a chat].
    """

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def chat(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        replies = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        learnt = replies[-1:] if loss_on == "last_reply" else replies
        ids: list[int] = []
        mask: list[int] = []
        done = ""
        for number in learnt:
            if length is not None and len(ids) >= length:
                break
            before, after = render(messages[:number], True), render(messages[: number + 1], False)
            if not before.startswith(done) or not after.startswith(before):
                raise ValueError(
                    "the chat template rewrites earlier turns when a later one comes, so that the replies cannot be "
                    "told apart: data.loss_on=last_reply may do, or give another model.chat_template."
                )
            for piece, learn in ((before[len(done) :], 0), (after[len(before) :], 1)):
                made = tokens(piece)
                ids += made
                mask += [learn] * len(made)
            done = after
        if loss_on == "everything":
            ids = tokens(render(messages, False))
            mask = [1] * len(ids)
        return ids, mask

    def encode(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        if "messages" in row:
            return chat(row["messages"])
        if "text" in row:
            ids = [*_opened(tokenizer, row["text"]), tokenizer.eos_token_id]
            return ids, [1] * len(ids)
        prompt = _opened(tokenizer, row["prompt"])
        completion = [*tokens(row["completion"]), tokenizer.eos_token_id]
        return prompt + completion, [int(loss_on == "everything")] * len(prompt) + [1] * len(completion)

    return encode


def _opened(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that begins a sequence: with what the tokenizer puts first, without what it puts last."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def label_encoder(tokenizer: Any, labels: list[str], length: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function of a row of ``{"text", "label"}``: the model's inputs, and the number of its class as ``labels``."""
    numbers = {name: number for number, name in enumerate(labels)}

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        label = row["label"]
        number = numbers.get(label) if isinstance(label, str) else int(label)
        if number is None or number >= len(labels):
            raise BadRow(f"label {label!r} is not one of {', '.join(labels)}")
        inputs = tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=length)
        return {**inputs, "labels": number}

    return encode
