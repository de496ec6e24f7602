"""A whole finetuned model as a PEFT LoRA adapter of its base: ``base + adapter ~ tuned``.

Every matrix that changed is factored (`factor`) and goes where PEFT adds a product: linear layers, Conv1D, embeddings
and experts. A weight that several modules use (a head tied to the embedding) is factored once and written for each.
Small modules without a product (norms, routers) are stored whole, as PEFT's modules_to_save, and so is what base lacks
(a classification head); biases of linear layers are stored as they are, PEFT's ``bias="all"``. What cannot be carried
is left out, with its share of the change.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, appearing, check_order, pair
from .difference import wide
from .factor import factor
from .named import NamedWeights
from .peft_files import AdapterFiles
from .skeleton import Place, places, skeleton


@dataclass(frozen=True)
class Row:
    """One weight that changed.

    Attributes:
        name, shape: as the model has it.
        rank: of its product; None if it is stored whole or left out.
        change: Frobenius norm of its change.
        error: Frobenius norm of what the adapter does not give of it.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    change: float
    error: float


@dataclass
class Exported:
    """What an adapter holds, and what it leaves out (by name, with the reason)."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def change(self) -> float:
        """Norm of the whole change."""
        return math.sqrt(math.fsum(row.change**2 for row in self.rows))

    @property
    def error(self) -> float:
        """Norm of what the adapter does not give, over the norm of the whole change; 0 is exact."""
        return math.sqrt(math.fsum(row.error**2 for row in self.rows)) / self.change if self.change else 0.0


def export_adapter(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    output: str | os.PathLike,
    *,
    rank: int = 64,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Exported:
    """Write adapter_config.json and adapter_model.safetensors for `PeftModel.from_pretrained(base, output)`.

    Args:
        base, tuned: folders of the two checkpoints.
        output: folder to write.
        rank: largest rank of a factored matrix; a matrix that changed in fewer rows or columns gets less.
        overwrite: replace a folder of that name.
        progress: called with every weight's name.

    Raises:
        ValueError: no matrix differs, the model's class is not known, a folder is no checkpoint, or `output` exists.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is not a positive rank: give 1 or more, 64 say.")
    old, new = Checkpoint(base, "BASE"), Checkpoint(tuned, "TUNED")
    check_order(old, new)
    with appearing(output, overwrite=overwrite, inputs=[old.folder, new.folder]) as folder:
        pair(old, new)  # refuses checkpoints of different models
        model = skeleton(new)
        before, after, known = NamedWeights(old, model), NamedWeights(new, model), places(model)
        files, result = AdapterFiles(rank), Exported()
        for name in after.names:
            progress(name)
            value = after.get(name)
            assert value is not None  # it is one of its names
            place = known.get(name, Place(reason="the model has no parameter of that name"))
            contents = partial(_contents, model, after=after, known=known)
            _add(name, place, before.get(name), value, contents, files, result)
        if files.empty:
            raise ValueError(
                f"no matrix differs between BASE={base} and TUNED={tuned} where LoRA could hold it: there is nothing "
                "to factor (`grass-hf diff` shows what changed)."
            )
        folder.mkdir()
        result.nbytes = files.write(folder, old.folder, model)
    return result


def _add(
    name: str,
    place: Place,
    base: Tensor | None,
    tuned: Tensor,
    contents: Callable[[str], dict[str, Tensor] | None],
    files: AdapterFiles,
    result: Exported,
) -> None:
    """Take in one weight; base is None if base lacks it, and `contents` gives what to store of a whole module."""
    before = base if base is not None and base.shape == tuned.shape else None
    if before is not None and torch.equal(wide(before), wide(tuned)):
        return
    alike = before is not None
    difference = wide(tuned) if before is None else wide(tuned) - wide(before)
    change = torch.linalg.vector_norm(difference).item()
    rank, error, reason = None, 0.0, place.reason
    if place.kind == "product" and alike:
        factors = factor(difference, files.rank)
        rank, error = factors.rank, factors.error
        for module, kind in place.products.items():
            files.add_product(module, kind, factors)
    elif place.kind == "experts" and alike:
        each = [factor(matrix, files.rank) for matrix in difference]
        rank, error = max(found.rank for found in each), math.sqrt(math.fsum(found.error**2 for found in each))
        (kind,) = place.products.values()
        files.add_experts(name, kind, each)
    elif place.kind == "bias":
        reason = ""
        for module in place.modules:
            files.add_bias(module, tuned)
    elif base is not None and not alike:
        reason = "base has it in another shape: resize its vocabulary first"
    elif not reason:
        (module,) = place.modules
        stored = contents(module)
        if stored is None:
            reason = "PEFT would store its module, of which the checkpoint has not everything"
        else:
            files.add_whole(module, stored)
    if rank is None and reason:
        error, result.left_out[name] = change, reason
    result.rows.append(Row(name, tuple(tuned.shape), rank, change, error))


def _contents(
    model: PreTrainedModel, module: str, after: NamedWeights, known: dict[str, Place]
) -> dict[str, Tensor] | None:
    """What PEFT stores of a module, also what did not change; None if some of it is not in the checkpoint."""
    found = {}
    for leaf in model.get_submodule(module).state_dict():
        full = f"{module}.{leaf}"
        names = known[full].leaves if full in known else [full]  # a tied weight is stored under one of its names
        value = next((value for name in names if (value := after.get(name)) is not None), None)
        if value is None:
            return None
        found[leaf] = value
    return found
