"""The model of a checkpoint without its values, and what PEFT could do for each of its parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ...convert.experts import is_experts
from ...convert.kind import Kind
from ...convert.modules import kind_of
from .checkpoint import Checkpoint


@dataclass
class Place:
    """Where a parameter is used.

    Attributes:
        kind: "product" if every use can have a LoRA product, "experts" if it is one of PEFT's target_parameters, "bias"
            of a module that can have a product, or "other".
        leaves: its full names, several if it is tied.
        modules: names of the modules that hold it.
        products: what each module is: "linear", "Conv1D" or "embedding"; for "experts" whether a matrix is stored
            (output, input), "linear", or (input, output), "Conv1D".
        reason: why its module cannot be stored whole, if it cannot.
    """

    kind: str = "other"
    leaves: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    products: dict[str, str] = field(default_factory=dict)
    reason: str = ""


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's model on the meta device.

    Raises:
        ValueError: its config names no class of transformers.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{checkpoint.role}={checkpoint.folder} has no config that the installed transformers reads ({first}): "
            "save the model with save_pretrained, or install the transformers that wrote it."
        ) from None
    name = (config.architectures or ["nothing"])[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(
            f"{checkpoint.role}={checkpoint.folder}: its config names {name} in architectures, which is no class of "
            "transformers: save the model with save_pretrained first."
        )
    with torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    return model


def places(model: nn.Module) -> dict[str, Place]:
    """Every parameter by each of its names."""
    by_id: dict[int, Place] = {}
    uses: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((name, module, leaf, parameter))
    for key, found in uses.items():
        by_id[key] = _place(found)
    return {leaf: place for place in by_id.values() for leaf in place.leaves}


def _place(uses: list[tuple[str, nn.Module, str, nn.Parameter]]) -> Place:
    place = Place(leaves=[f"{name}.{leaf}".lstrip(".") for name, _, leaf, _ in uses], modules=[use[0] for use in uses])
    kinds = {name: _product(module) for name, module, leaf, _ in uses}
    leaves = {leaf for _, _, leaf, _ in uses}
    products = {name: kind for name, kind in kinds.items() if kind}
    if leaves == {"weight"} and products == kinds:
        place.kind, place.products = "product", products
    elif leaves == {"bias"} and products == kinds:
        place.kind = "bias"
    elif len(uses) == 1 and is_experts(uses[0][1]) and uses[0][3].dim() == 3 and _peft_knows_parameters():
        place.kind, place.products = "experts", {uses[0][0]: "Conv1D" if uses[0][1].is_transposed else "linear"}
    if any(not name or any(module.children()) for name, module, _, _ in uses):
        place.reason = "its module has others in it, which PEFT would store too"
    elif len(uses) > 1:
        place.reason = "it is tied, and not all of its uses are products"
    elif place.kind == "other" and (is_experts(uses[0][1]) or kinds[uses[0][0]]):
        place.reason = "PEFT puts products into its module, and nothing else"
    return place


def _product(module: nn.Module) -> str | None:
    """What a module's weight is to LoRA, or None if PEFT's product would not be the weight's."""
    kind = kind_of(module)
    if kind is None or kind.base is None:
        return None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
        # learned positions are computed from a mask (OPT); PEFT knows the constant of scaled embeddings (Gemma)
        return kind.name if hasattr(module, "embed_scale") else None
    return kind.name if type(module).forward is kind.base.forward or _returns_product(module, kind) else None


def _returns_product(module: nn.Module, kind: Kind) -> bool:
    """Whether a subclass gives one output per row of its weight, and nothing beside (Phi-MoE's router does)."""
    weight: Any = module.weight
    inputs, outputs = weight.shape if kind.transposed else weight.shape[::-1]
    try:
        output = module(torch.empty(1, 2, inputs, device="meta", dtype=weight.dtype))
    except Exception:  # it wants something else than one input
        return False
    return isinstance(output, Tensor) and output.shape == (1, 2, outputs)


def _peft_knows_parameters() -> bool:
    from peft import LoraConfig

    return any(field.name == "target_parameters" for field in dataclasses.fields(LoraConfig))
