"""What an answer to one of GSM8K's problems is worth: functions as TRL's GRPO calls them.

Each is given the completions, and every column of the rows as a list of the same length: ``answer`` is GSM8K's
solution, whose last line is ``#### 72``.
"""

import re


def correct(completions: list, answer: list[str], **columns) -> list[float]:
    """1 for the right result, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(_result(_text(said)) == _result(wanted)) for said, wanted in pairs]


def has_result(completions: list, **columns) -> list[float]:
    """1 for an answer that ends with a result, right or wrong."""
    return [float(_result(_text(said)) is not None) for said in completions]


def _text(completion) -> str:
    """A completion is a text, or a list of messages where the prompt was one."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _result(text: str) -> float | None:
    found = re.findall(r"####\s*\$?(-?[\d.,]*\d)", text)
    return float(found[-1].replace(",", "")) if found else None
