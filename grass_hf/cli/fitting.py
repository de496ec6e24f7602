"""What makes a training step fit: settings that take less memory, one after the other, and the largest rank.

The settings come in the order of what they cost: a little time, more time, digits of the optimizer's state, another
choice of what is trained. None of them drops an update of the weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import Trainer

from ..config.settings import GrassConfig
from ..config.sizes import shown_bytes
from ..integrations.base import base_class_and_kwargs
from ..measure.estimate.memory import largest_rank
from ..slices.ops.selection import with_replacement


@dataclass(frozen=True)
class Choice:
    """Settings of an estimate, and how the command names what was changed.

    Attributes:
        config: of Grass.
        setting: the other arguments of `estimate_memory`.
        words: the options that were added, as they are typed.
    """

    config: GrassConfig
    setting: dict[str, Any]
    words: tuple[str, ...] = ()


# Bytes at the peak of a choice.
Peak = Callable[[Choice], int]


def smaller(choice: Choice, given: set[str]) -> Iterator[Choice]:
    """Choices that take less and less memory.

    Args:
        choice: where to begin.
        given: fields of the config and arguments that were asked for, which are left as they are.
    """
    config, setting = choice.config, choice.setting
    plain = setting["engine"] == "ddp" or setting["world_size"] == 1
    if config.resident and "resident" not in given and plain and not with_replacement(config.selection):
        yield (choice := _more(choice, "--released", config={"resident": False}))
    if not setting["gradient_checkpointing"]:
        yield (choice := _more(choice, "--gradient-checkpointing", setting={"gradient_checkpointing": True}))
    if "base" not in given and plain and importlib.util.find_spec("torchao") is not None:
        name = "adamw_torch_8bit"
        optimizer = dict(zip(("optimizer", "optimizer_args"), base(name), strict=True))
        yield (choice := _more(choice, f"--base {name}", setting=optimizer))
    if not given & {"target_modules", "side"} and not config.weight_dtype:
        words = "--targets all-matrices --side auto"
        yield _more(choice, words, config={"target_modules": "all-matrices", "side": "auto"})


def first_that_fits(peak_of: Peak, choice: Choice, budget: int, given: set[str]) -> tuple[Choice, int] | None:
    """The first of the smaller choices whose peak is within a budget, and its peak; None if there is none."""
    for tried in smaller(choice, given):
        if (peak := peak_of(tried)) <= budget:
            return tried, peak
    return None


def best(peak_of: Peak, choice: Choice, budget: int, highest: int, given: set[str]) -> tuple[Choice, str]:
    """What to train with in a budget: as it is asked for, with the largest rank; else a smaller choice of that rank;
    else the smallest choice, with the largest rank.

    Args:
        peak_of: bytes at the peak.
        choice: what is asked for.
        budget: bytes.
        highest: the largest rank to try.
        given: as for `smaller`.

    Returns:
        The choice and a sentence about it.

    Raises:
        ValueError: nothing fits.
    """
    asked = peak_of(choice)
    if asked > budget:
        found = first_that_fits(peak_of, choice, budget, given)
        if found is not None:
            smaller_choice, peak = found
            return smaller_choice, (
                f"{choice.config.shown_rank} takes {shown_bytes(asked)}, more than {shown_bytes(budget)}; "
                f"it fits with {' '.join(smaller_choice.words)}, peak {shown_bytes(peak)}"
            )
        *_, choice = choice, *smaller(choice, given)

    def with_rank(rank: int) -> Choice:
        return dataclasses.replace(choice, config=dataclasses.replace(choice.config, rank=rank, density=None))

    found_rank = largest_rank(lambda rank: peak_of(with_rank(rank)), budget, highest)
    if found_rank is None:
        raise ValueError(
            f"--fit {shown_bytes(budget)} is less than a step needs at rank 1{_with(choice)}: fewer --sequence tokens, "
            "a smaller --batch, --weight-dtype int8 --side output, or a smaller model."
        )
    rank, peak = found_rank
    return with_rank(rank), (
        f"largest rank within {shown_bytes(budget)} ({budget:,} bytes){_with(choice)}: {rank}, peak {shown_bytes(peak)}"
    )


def base(name: str) -> tuple[type, dict[str, Any]]:
    """Class and arguments of a base optimizer by its Trainer name.

    Raises:
        ValueError: there is none of that name.
    """
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    return base_class_and_kwargs(args, name, {}, Trainer.get_optimizer_cls_and_kwargs)


def _with(choice: Choice) -> str:
    return f" with {' '.join(choice.words)}" if choice.words else ""


def _more(
    choice: Choice, words: str, config: dict[str, Any] | None = None, setting: dict[str, Any] | None = None
) -> Choice:
    changed = dataclasses.replace(choice.config, **(config or {}))
    return Choice(changed, {**choice.setting, **(setting or {})}, (*choice.words, words))
