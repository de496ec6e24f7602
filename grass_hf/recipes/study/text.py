"""What all runs of a study share: tokens to train on, what is evaluated, and the names of the target matrices."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from ...measure.bench.methods import target_names
from ..encode import block_collator
from ..models import empty_model
from ..parse import build_recipe
from ..schema import Recipe
from ..tasks import Prepared, prepare
from .evaluation import Blocks, HeldOut, TaskRows
from .grid import Study


@dataclass(frozen=True)
class Text:
    """What all runs of a study share.

    Attributes:
        prepared: rows, tokenizer and the model's config.
        names: of the target matrices.
        held_out: what is evaluated.
        digest: of everything that is trained on and evaluated.
        collate: makes a batch of rows.
        row_tokens: tokens of a training row, in the mean.
    """

    prepared: Prepared
    names: list[str]
    held_out: HeldOut
    digest: str
    collate: Any
    row_tokens: float


_texts: dict[str, Text] = {}


def shared_text(study: Study) -> Text:
    """Read and tokenise once per process.

    Raises:
        ValueError: nothing is held out, or the rows are streamed.
    """
    known = repr(study)  # and not its name: another file may have the same
    if known not in _texts:
        recipe = build_recipe(study.document, study.path, ["--output_dir", tempfile.gettempdir()], grass=False)
        prepared = prepare(recipe)
        if prepared.evaluation is None or prepared.train.streaming:
            raise ValueError(
                f"{study.path}: a study needs held-out documents, and rows that are not streamed: give data.holdout, "
                "and leave data.streaming out."
            )
        collate = _collator(recipe.task, prepared.tokenizer)
        held_out = _held_out(study, recipe, prepared, collate)
        ids = prepared.train.dataset["input_ids"][:]
        digest = hashlib.sha256(repr(ids).encode())
        digest.update(held_out.content())
        names = target_names(empty_model(recipe, prepared.config), study.target_modules)
        row_tokens = sum(map(len, ids)) / len(ids) if study.finetunes else recipe.data.sequence_length
        _texts[known] = Text(prepared, names, held_out, digest.hexdigest()[:16], collate, row_tokens)
    return _texts[known]


def _collator(task: str, tokenizer: Any) -> Any:
    if task == "pretraining":
        return block_collator(tokenizer)
    return DataCollatorWithPadding(tokenizer) if task == "classification" else DataCollatorForSeq2Seq(tokenizer)


def _held_out(study: Study, recipe: Recipe, prepared: Prepared, collate: Any) -> HeldOut:
    assert prepared.evaluation is not None
    batch, rows = recipe.training.per_device_eval_batch_size, prepared.evaluation.dataset
    if not study.finetunes:
        return _blocks(rows, recipe.data.sequence_length, study.eval_blocks, batch)
    count = min(study.eval_blocks, len(rows))
    names = [name for name in rows.column_names if name != "length"]
    chosen = rows.select_columns(names).select([n * len(rows) // count for n in range(count)]).to_list()
    return TaskRows(chosen, collate, batch, prepared.tokenizer, study.exact_match, _general(study, prepared, batch))


def _general(study: Study, prepared: Prepared, batch: int) -> Blocks | None:
    """Blocks of text that is not the task's, cut by the study's own tokenizer."""
    if study.general is None:
        return None
    few = {} if "holdout" in study.general else {"max_train_rows": 1}  # they are cut before any are held out
    data = {"sequence_length": 128, **few, **study.general}
    count = data.pop("blocks", 16)
    model = {name: value for name, value in study.document["model"].items() if name != "tokenizer_vocab_size"}
    with tempfile.TemporaryDirectory() as folder:
        prepared.tokenizer.save_pretrained(folder)
        document = {"task": "pretraining", "model": model | {"tokenizer_name": folder}, "data": data}
        recipe = build_recipe(document, study.path, ["--output_dir", folder, "--use_cpu", "true"], grass=False)
        evaluation = prepare(recipe).evaluation
    if evaluation is None:
        raise ValueError(f"{study.path}: study.general has no held-out documents: give data.holdout in it.")
    return _blocks(evaluation.dataset, recipe.data.sequence_length, count, batch)


def _blocks(rows: Any, whole: int, most: int, batch: int) -> Blocks:
    """Evenly spaced blocks of full length."""
    blocks = torch.tensor([ids for ids in rows["input_ids"] if len(ids) == whole])
    count = min(most, len(blocks))
    return Blocks(blocks[torch.arange(count) * len(blocks) // count], batch)
