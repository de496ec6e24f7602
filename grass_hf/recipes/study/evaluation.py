"""What a study evaluates: held-out blocks of text, or a finetuning task's held-out rows, by one code for all methods.

Everything is computed in the weights' own dtype, without autocast, between optimizer steps; a model is left in the mode
that it was in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # the label of a token that is not learnt


class HeldOut(Protocol):
    """What a study evaluates on."""

    @property
    def size(self) -> int:
        """Number of tokens; of rows where each row has one label."""

    def evaluate(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """The mean loss, and what else the same pass shows, by its name."""

    def costly(self, model: nn.Module) -> dict[str, float]:
        """What is measured before and after training only, by its name."""

    def content(self) -> bytes:
        """All of it, for a digest."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of text, (n, length) int64, evaluated `batch` at a time."""

    blocks: Tensor
    batch: int

    @property
    def size(self) -> int:
        return self.blocks.numel()

    def evaluate(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        return held_out_loss(model, self.blocks, self.batch), {}

    def costly(self, model: nn.Module) -> dict[str, float]:
        return {}

    def content(self) -> bytes:
        return self.blocks.numpy().tobytes()


@dataclass(frozen=True)
class TaskRows:
    """Held-out rows of a finetuning task.

    Attributes:
        rows: tokens and labels; `labels` is a number for a classifier, else a list with -100 where nothing is learnt.
        collate: makes a batch of them.
        batch: rows at a time.
        tokenizer: of the model.
        generated: so many of the rows are answered by the model itself, for the exact match; 0 for none.
        general: blocks of other text, whose loss says what training has made the model forget; None for none.
    """

    rows: list[dict[str, Any]]
    collate: Any
    batch: int
    tokenizer: Any
    generated: int = 0
    general: Blocks | None = None

    @property
    def classes(self) -> bool:
        """Whether each row has one label."""
        return not isinstance(self.rows[0]["labels"], Sequence)

    @property
    def size(self) -> int:
        if self.classes:
            return len(self.rows)
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    def costly(self, model: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.generated:
            found["exact_match"] = exact_match(model, self.rows[: self.generated], self.tokenizer, self.batch)
        if self.general is not None:
            found["general_loss"] = self.general.evaluate(model)[0]
        return found

    def content(self) -> bytes:
        general = b"" if self.general is None else self.general.content()
        return repr(self.rows).encode() + general + str(self.generated).encode()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        total, right, count = 0.0, 0, 0
        with evaluating(model):
            for start in range(0, len(self.rows), self.batch):
                batch = self.collate(self.rows[start : start + self.batch])
                batch = {name: tensor.to(_device(model)) for name, tensor in batch.items()}
                labels = batch.pop("labels")
                logits = model(**batch).logits.float()
                if not self.classes:  # a token is predicted by the one before it
                    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                learnt = labels != IGNORED
                logits, labels = logits[learnt], labels[learnt]
                total += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
                count += len(labels)
        return total / count, {"accuracy": right / count} if self.classes else {}


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch: int) -> float:
    """Mean loss over the predicted tokens of blocks (n, length) of equal length."""
    total = 0.0
    with evaluating(model):
        for part in blocks.split(batch):
            part = part.to(_device(model))
            total += float(model(input_ids=part, labels=part).loss) * len(part)
    return total / len(blocks)


@torch.no_grad()
def exact_match(model: Any, rows: Sequence[dict[str, Any]], tokenizer: Any, batch: int) -> float:
    """Share of rows whose first reply is what the model writes, greedily, after the same prompt.

    Args:
        model: a causal one.
        rows: ``{"input_ids", "labels"}``; the reply is the first run of labels that are learnt.
        tokenizer: pads and decodes; texts are compared without blanks at their ends.
        batch: rows at a time.
    """
    pairs = [_prompt_and_reply(row) for row in rows]
    longest, right = max(len(reply) for _, reply in pairs), 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluating(model):
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            width = max(len(prompt) for prompt, _ in part)
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt, _ in part], device=_device(model))
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part])
            made = model.generate(
                input_ids=ids,
                attention_mask=mask.to(ids.device),
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=pad,
            )
            for tokens, (_, reply) in zip(made[:, width:], part, strict=True):
                said, meant = (tokenizer.decode(t, skip_special_tokens=True).strip() for t in (tokens, reply))
                right += said == meant
    return right / len(pairs)


def _prompt_and_reply(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    labels = list(row["labels"])
    begin = next(at for at, label in enumerate(labels) if label != IGNORED)
    end = next((at for at in range(begin, len(labels)) if labels[at] == IGNORED), len(labels))
    return list(row["input_ids"][:begin]), labels[begin:end]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model without dropout, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
