"""TRL's supervised finetuning with a compressed output head.

TRL computes log-probabilities in a fused head that multiplies by ``lm_head.weight`` without calling the module, so a
tap there is never reached (`first_loss` stops such a run). While the head is an ordinary parameter
(`target_modules="all-linear"`) that is right and saves the memory of the logits. For a head that is compressed, a
recipe's trainer makes the same numbers from the logits of the model's own forward, which calls it.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.settings import GrassConfig
from ..convert.patterns import output_heads
from ..convert.targets import plan

if TYPE_CHECKING:
    from transformers import Trainer


def head_is_target(model: nn.Module, config: GrassConfig) -> bool:
    """Whether the config compresses the output head of a model that is not converted yet."""
    heads = output_heads(model)
    return any(
        id(module) in heads for target in plan(model, config).targets for module in (target.module, *target.sharers)
    )


def call_the_head(model: nn.Module) -> None:
    """Have a model that TRL gave its fused head call its own head where the fused one is asked for.

    Args:
        model: a causal LM after TRL's ``add_fused_lm_head``. What it returns for ``fused_lm_head=True`` has the same
            fields as before, but for the terms that only other trainers than `SFTTrainer` read.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    fused = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        output = fused(*args, **{**kwargs, "use_cache": False})
        logits, labels = (output.logits[:, :-1], labels[:, 1:]) if shifted is None else (output.logits, shifted)
        terms = _token_terms(logits, labels)
        count = terms["label_mask"].sum().clamp(min=1) if count is None else count
        aux_loss = getattr(output, "aux_loss", None)
        loss = -terms["log_probs"].sum() / count
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, aux_loss=aux_loss, **terms)

    model.forward = types.MethodType(forward, model)


def _token_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What TRL's loss and metrics want of every token, zero where the label is -100.

    Args:
        logits: (B, T, V).
        labels: int64 (B, T).

    Returns:
        ``log_probs`` and ``entropy`` (without gradient), float32 (B, T); ``is_top1`` and ``label_mask``, bool (B, T).
    """
    mask = labels != -100
    every = logits.float().log_softmax(-1)
    chosen = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
        is_top1 = (logits.argmax(-1) == labels) & mask
    return {
        "log_probs": chosen.masked_fill(~mask, 0.0),
        "entropy": entropy.masked_fill(~mask, 0.0),
        "is_top1": is_top1,
        "label_mask": mask,
    }


def plain_head_trainer() -> type[Trainer]:
    """TRL's `SFTTrainer` with a head that is called."""
    import trl

    class PlainHeadTrainer(trl.SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            model: Any = self.model
            call_the_head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    return PlainHeadTrainer
