"""TRL's trainers and the output head.

TRL computes log-probabilities in a fused head that reads ``lm_head.weight`` without calling the module, so a tap there
is never reached. While the head is an ordinary parameter (`target_modules="all-linear"`) that is right and saves the
memory of the logits. A compressed head would get no gradient, and one tied to a compressed embedding only the
embedding's part of it, without a sign that anything is missing: such a run is refused, and for supervised finetuning
`plain_head_trainer` offers the loss that the model computes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..config import GrassConfig
from ..convert import grass_slices
from ..patterns import output_heads
from ..targets import plan

if TYPE_CHECKING:
    from transformers import Trainer


def head_is_target(model: nn.Module, config: GrassConfig) -> bool:
    """Whether the config compresses the output head of a model that is not converted yet."""
    heads = output_heads(model)
    return any(
        id(module) in heads for target in plan(model, config).targets for module in (target.module, *target.sharers)
    )


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has given a model its fused head."""
    code = getattr(getattr(vars(model).get("forward"), "__func__", None), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames


def refuse_fused_head(model: nn.Module) -> None:
    """Stop a run whose head is compressed and read behind its back.

    Raises:
        ValueError: it is so.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not has_fused_head(model):
        return
    for part in grass_slices(model):
        if part.weight is head.weight:
            raise ValueError(
                f"TRL's trainer reads the weight of the output head without calling it, so {part.state.name} would "
                "be trained by a part of its gradient: use target_modules='all-linear', or "
                "exclude_modules=['lm_head']; `grass-hf train` with task: sft trains it, by the model's own loss."
            )


def plain_head_trainer() -> type[Trainer]:
    """TRL's `SFTTrainer` with the loss as the model computes it, from all logits."""
    import trl
    from transformers import Trainer

    class PlainHeadTrainer(trl.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if has_fused_head(self.model):
                del self.model.forward  # the one of its class again

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs["use_cache"] = False
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

        def prediction_step(self, *args, **kwargs):
            return Trainer.prediction_step(self, *args, **kwargs)

    return PlainHeadTrainer
