"""The tokens of a chat, and which of them are learnt.

[Note: what is trained in a chat] The whole chat is rendered once and tokenised once, so what is trained is what the
template renders. Where its replies stand is said by the template's ``{% generation %}`` marks; TRL has such a variant
of many models' templates, with which earlier turns stay as they are when a later one comes (Qwen3's own rewrites them).
Without marks, a reply is what the template adds after its prompt for one.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length

from .places import BadRow, first_line, shown

Row = dict[str, Any]
Span = tuple[int, int]

# For tokenizers without a template of their own; no token is added to the vocabulary.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('`plain` has no place for the role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
# Fields of a turn that a template may leave out: which call a tool answers is seen from the order.
_FREE = {"role", "weight", "id", "tool_call_id"}


@dataclass
class ChatEncoder:
    """Rows for finetuning: token ids, and 1 for those to learn; see [Note: what is trained in a chat].

    Attributes:
        tokenizer: of the model.
        loss_on: replies, last_reply or everything.
        system_prompt: put before chats that have no system turn.
        template: with marks, in place of the tokenizer's own; None for that.
        length: how many of the first tokens are used; None for all. Replies behind them are not looked for.
    """

    tokenizer: Any
    loss_on: str = "replies"
    system_prompt: str | None = None
    template: str | None = None
    length: int | None = None

    def __call__(self, row: Row) -> tuple[list[int], list[int]]:
        if "messages" in row:
            return self._chat(row)
        if self.system_prompt:
            raise BadRow("data.system_prompt has no place before plain text: leave it out, or give rows with messages")
        self.check_plain(row)
        start = len(row.get("prompt", ""))
        text = row["text"] if "text" in row else row["prompt"] + row["completion"]
        ids, mask = self._masked(text, [(0 if self.loss_on == "everything" else start, len(text))], True)
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids, [*mask[:-1], 1]
        return [*ids, self.tokenizer.eos_token_id], [*mask, 1]

    def check_plain(self, row: Row) -> None:
        """Refuse what only a chat has a place for."""
        for name in ("tools", "chat_template_kwargs"):
            if row.get(name):
                raise BadRow(
                    f"{name} has no place in plain text: give rows with messages, or data.ignore_fields={name}"
                )

    def _chat(self, row: Row) -> tuple[list[int], list[int]]:
        messages, options = row["messages"], dict(row.get("chat_template_kwargs") or {})
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        options |= {"tools": row.get("tools")}
        turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in messages]
        text = self.render(turns, **options)
        self._check_whole(turns, text, options)
        replies = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        given = row.get("given", 0) + len(messages) - len(row["messages"]) if self.loss_on != "everything" else 0
        weights = [turn.get("weight", int(at >= given)) for at, turn in enumerate(messages)]
        odd = next((at for at, turn in enumerate(messages) if turn.get("weight") and at not in replies), None)
        if self.loss_on == "everything":
            if all(weights):
                return self._masked(text, [(0, len(text))])
            spans = self._spans(turns, replies, text, options)
            left = [span for number, span in zip(replies, spans, strict=True) if not weights[number]]
            edges = [0, *(edge for span in left for edge in span), len(text)]
            return self._masked(text, list(zip(edges[::2], edges[1::2], strict=True)))
        if odd is not None:
            role = messages[odd]["role"]
            raise BadRow(f"turn {odd + 1} is of the {role} and has a weight, and loss_on={self.loss_on} learns replies")
        replies = replies[-1:] if self.loss_on == "last_reply" else replies
        spans = self._spans(turns, replies, text, options)
        return self._masked(text, [span for number, span in zip(replies, spans, strict=True) if weights[number]])

    def render(self, messages: list[Row], prompt: bool = False, **options: Any) -> str:
        """The chat in the template, with the prompt for a reply behind it if asked for.

        Raises:
            BadRow: the template refuses it.
        """
        options |= {"chat_template": self.template, "add_generation_prompt": prompt}
        if not self.template and not self.tokenizer.chat_template:
            raise BadRow("the tokenizer has no chat template: give model.chat_template, a Jinja file or `plain`")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes
            raise BadRow(f"the chat template refuses the chat: {first_line(error)}") from error

    def count(self, turns: list[Row], prompt: bool, options: Row) -> int:
        """How many tokens a chat has of which the template leaves nothing out."""
        text = self.render(turns, prompt, **options)
        self._check_whole(turns, text, options)
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _spans(self, turns: list[Row], replies: list[int], text: str, options: Row) -> list[Span]:
        """From where to where each reply stands in the rendered text."""
        marked, count = self._marked(turns, options), sum(turn["role"] == "assistant" for turn in turns)
        while len(marked) > count and marked[-1][0] == marked[-2][1]:  # Phi-3 marks the last end by itself
            marked[-2:] = [(marked[-2][0], marked[-1][1])]
        if len(marked) == count:
            return marked[-len(replies) :]
        spans: list[Span] = []
        limit = self._limit(text)
        for number in replies:
            if spans and spans[-1][1] >= limit:  # each reply costs two renderings of all before it
                spans.append((len(text), len(text)))
                continue
            after = self.render(turns[: number + 1], **options) if number + 1 < len(turns) else text
            start, least = self._start(turns[:number], after, options)
            if not text.startswith(after) or start < least:
                raise BadRow(
                    "the chat template rewrites earlier turns when a later one comes, so that the replies cannot be "
                    "told apart: data.loss_on=last_reply may do, or give another model.chat_template"
                )
            spans.append((start, len(after)))
        return spans

    def _limit(self, text: str) -> int:
        """Where the text is cut."""
        if self.length is None or len(text) <= self.length:  # a token has a character at least
            return len(text)
        where = self._tokens(text)[1][: self.length]
        return where[-1][1] if len(where) == self.length else len(text)

    def _start(self, turns: list[Row], after: str, options: Row) -> Span:
        """Where a reply begins in the text that ends with it, and where the turns before it end."""
        if not turns:  # a chat that begins with a reply: behind the prompt for one, wherever that stands
            asked = [{"role": "user", "content": "?"}]
            prompt = self.render(asked, True, **options).removeprefix(self.render(asked, **options))
            return (after.index(prompt) + len(prompt) if prompt in after else 0), 0
        before = self.render(turns, True, **options)
        if after.startswith(before):
            return len(before), len(before)
        start = common_prefix_length(before, after)  # type: ignore[arg-type]  # any two sequences will do
        return start, len(self.render(turns, **options))

    def _marked(self, turns: list[Row], options: Row) -> list[Span]:
        """What stands between the template's marks; nothing if it has none."""
        template = self.template or self.tokenizer.get_chat_template()
        if not has_generation_markers(template):
            return []
        names = {**self.tokenizer.special_tokens_map, **options}
        made: Any = render_jinja_template(
            conversations=[turns], chat_template=template, return_assistant_tokens_mask=True, **names
        )
        _, (spans,) = made
        return [(first, last) for first, last in spans]

    def _masked(self, text: str, spans: list[Span], special: bool = False) -> tuple[list[int], list[int]]:
        """Tokens of a text, and 1 for those that have a part of a span."""
        ids, where = self._tokens(text, special)
        mask = [0] * len(ids)
        if where:
            starts, ends = zip(*where, strict=True)
            for start, end in spans:
                first, last = bisect_right(ends, start), bisect_left(starts, end)
                while first and where[first - 1] == (start, start):  # a token without a width counts where it stands
                    first -= 1
                mask[first:last] = [1] * (last - first)
            return ids, mask
        for start, end in spans:  # TRL's way to find where a completion begins
            first, last = (
                len(self.tokenizer(text[:at], add_special_tokens=special)["input_ids"]) for at in (start, end)
            )
            mask[first:last] = [1] * (min(last, len(ids)) - first)
        return ids, mask

    def _tokens(self, text: str, special: bool = False) -> tuple[list[int], list[Span]]:
        """Tokens, and where each stands in the text; the second is empty for a tokenizer that does not know it."""
        fast = self.tokenizer.is_fast
        made = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
        return made["input_ids"], made["offset_mapping"] if fast else []

    def _check_whole(self, turns: list[Row], text: str, options: Row) -> None:
        """Refuse a chat of which the template leaves something out."""
        for number, turn in enumerate(turns):
            for name, value in turn.items():
                free = name in _FREE or (name == "name" and turn["role"] == "tool")
                # a short word may stand in the text by chance
                sure = turn["role"] in ("user", "assistant") or len(value) > 40
                if free or (name == "content" and sure and value.strip() in text):
                    continue
                other = turn | {name: value + "?"} if name == "content" else {k: turn[k] for k in turn if k != name}
                if self._same(text, [*turns[:number], other, *turns[number + 1 :]], options):
                    other_way = "" if name == "content" else f", or data.ignore_fields={name}"
                    raise BadRow(
                        f"turn {number + 1}, of the {turn['role']}, has {name}={shown(value)}, which the chat template "
                        f"leaves out: give another model.chat_template{other_way}"
                    )
        if options["tools"] and self._same(text, turns, options | {"tools": None}):
            raise BadRow(
                "the row has tools, which the chat template leaves out: give another model.chat_template, or "
                "data.ignore_fields=tools"
            )

    def _same(self, text: str, turns: list[Row], options: Row) -> bool:
        try:
            return self.render(turns, **options) == text
        except BadRow:
            return False


def chat_encoder(tokenizer: Any, loss_on: str, system_prompt: str | None, length: int | None = None) -> ChatEncoder:
    """The encoder of chats, with TRL's variant of the tokenizer's template where replies are learnt and it has one."""
    template = None
    if loss_on == "replies" and tokenizer.chat_template:
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:  # none is known: the replies are found without marks
            template = None
        own = template is None and has_generation_markers(tokenizer.chat_template)
        if own and not is_chat_template_stop_token_trained(tokenizer):
            warnings.warn(
                "the chat template ends its {% generation %} marks before the end-of-turn token, so the model does not "
                "learn to stop: move the mark behind it, or give another model.chat_template.",
                stacklevel=2,
            )
    return ChatEncoder(tokenizer, loss_on, system_prompt, template, length)
