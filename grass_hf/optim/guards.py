"""What is checked before a step is taken: that gradients are finite, and that they reach every slice."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.settings import GrassConfig
from ..convert.audit.exclusion import exclusion, summary
from ..convert.patterns import uses
from ..slices.ops.int8 import is_int8
from ..slices.ops.sharding import is_sharded, local, whole, world_size
from ..slices.part import local_part
from ..slices.slice import Slice
from .driving import plain_class
from .parameter_groups import GROUP_KEY, VOCABULARY_KEY

logger = logging.getLogger(__name__)


def check_finite(slices: list[Slice], step: int) -> None:
    """Stop before a weight is changed by a gradient that is not finite.

    Raises:
        FloatingPointError: naming the first such slice.
    """
    params: list[Any] = [slice_._parameters["active"] for slice_ in slices]  # past the look-up of attributes
    grads = [grad for param in params if (grad := param.grad) is not None]
    if not grads or _are_finite(grads):
        return
    for slice_ in slices:
        grad = slice_.active.grad
        if grad is not None and not bool(whole(grad.isfinite().all())):
            raise not_finite(slice_.state.name, step)
    # else only the norm overflowed, in half precision


def _are_finite(grads: list[Tensor]) -> bool:
    """Whether all norms are finite; of gradients that lie in one place, in three operations."""
    if all(type(grad) is Tensor and grad.device == grads[0].device for grad in grads):
        return bool(torch.stack(torch._foreach_norm(grads)).sum().isfinite())
    return bool(whole(torch.nn.utils.get_total_norm(grads)).isfinite())


def not_finite(name: str, step: int) -> FloatingPointError:
    """The error for a slice whose gradient is not finite."""
    return FloatingPointError(
        f"the gradient of {name} is not finite at optimizer step {step}, and training stopped before any weight was "
        "changed: lower the learning rate, clip gradients, or look at this batch for bad data (float16 needs a "
        "GradScaler, fp16=True in TrainingArguments)."
    )


def check_replicas(model: nn.Module, replicas: dist.ProcessGroup | None) -> None:
    """Stop where ranks hold the stages of a pipeline and the optimizer does not know which of them hold the same model.

    Norms would be summed over stages, whose layers may have the same names and shapes.

    Raises:
        ValueError: the model takes part in a stage of `torch.distributed.pipelining`.
    """
    stages = sys.modules.get("torch.distributed.pipelining.stage")
    if stages is None or replicas is not None or world_size() == 1:
        return
    own = {id(module) for module in model.modules()}
    for thing in gc.get_objects():  # once in a run; neither the model nor torch knows of its stage
        if stages._PipelineStageBase in type(thing).__mro__ and own & {id(m) for m in thing.submod.modules()}:
            raise ValueError(
                f"{type(model).__name__} is stage {thing.stage_index} of a pipeline, and ranks with other stages would "
                "choose rows together with it: pass the group of the ranks that hold this same stage, "
                "grass_optimizer(stage, ..., replicas=mesh['dp'].get_group()), or use FSDP2 instead of a pipeline."
            )


def check_observed(observed: dict[Slice, Tensor | None], step: int) -> None:
    """Stop if slices have gradients and none has norms, by which rows are chosen.

    Args:
        observed: squared norms by slice, summed over ranks; None where they overflowed.
        step: number of the optimizer step, for errors.

    Raises:
        RuntimeError: the gradients were taken in a way that passes the norms by.
    """
    if not observed or any(vector is None or bool(vector.any()) for vector in observed.values()):
        return
    if any(slice_.active.grad is not None and bool(local(slice_.active.grad).any()) for slice_ in observed):
        raise RuntimeError(
            f"no norms of gradients were observed at optimizer step {step}, though there are gradients: "
            "torch.autograd.grad, backward(inputs=...) and pipeline schedules that split backward (zero bubble) pass "
            "them by. Use loss.backward(), ScheduleGPipe or Schedule1F1B."
        )


def check_rates(groups: list[dict[str, Any]], scale: float, asked: dict[str, dict[str, Any]]) -> bool:
    """Stop where something gave all parameter groups one learning rate, so that `scale` has no effect.

    Args:
        groups: of the optimizer.
        scale: of the config.
        asked: the slices' settings when the optimizer was made.

    Returns:
        Whether it is known: a rate of zero, at the beginning of a warm-up, says nothing.

    Raises:
        ValueError: one rate for ordinary parameters and slices, and not the one that slices were made with.
    """
    rates = {None if group["lr"] is None else float(group["lr"]) for group in groups}
    kinds = {GROUP_KEY in group for group in groups if VOCABULARY_KEY not in group}
    rate = next(iter(rates))
    if (
        scale == 1.0
        or len(rates) > 1
        or len(kinds) < 2
        or rate is None
        or rate in {own.get("lr") for own in asked.values()}
    ):
        return True
    if rate == 0.0:
        return False
    raise ValueError(
        f"every parameter group has the learning rate {rate:.6g}, the slices' too, and scale={scale} was to make "
        f"theirs {rate * scale:.6g}: a scheduler that gives all groups one rate (OneCycleLR, CyclicLR, DeepSpeed's "
        "WarmupLR) has overwritten it. Give it a rate for each group, say max_lr=[group['lr'] for group in "
        "optimizer.param_groups], or use scale=1.0."
    )


def int8_weights(slices: Iterable[Slice]) -> str:
    """Sums over the int8 weights, equal on ranks that have the same: DDP does not broadcast these."""
    weights: list[tuple[str, Any]] = [(slice_.state.name, slice_.weight) for slice_ in slices if is_int8(slice_.weight)]
    return "; ".join(f"int8 {name} {int(w.int_data.sum())} {float(w.scale.double().sum())}" for name, w in weights)


def has_gradient(param: nn.Parameter) -> bool:
    """Whether a backward pass has reached a parameter; engines that take gradients away have another way to know."""
    return param.grad is not None


def check_any_reached(
    slices: list[Slice],
    params: Iterable[nn.Parameter],
    step: int,
    reached: Callable[[nn.Parameter], bool] = has_gradient,
) -> None:
    """Stop if only ordinary parameters are trained.

    Args:
        slices: of the model.
        params: all that the optimizer trains.
        step: number of the optimizer step, for errors.
        reached: as `has_gradient`.

    Raises:
        RuntimeError: no slice has a gradient though other parameters have.
    """
    trained = [slice_.active for slice_ in slices if slice_.active.requires_grad]
    if any(map(reached, trained)) or (slices and not trained):  # all were frozen
        return
    if any(reached(param) for param in params):
        raise RuntimeError(
            f"no Grass layer received a gradient at optimizer step {step}, but other parameters did. "
            "With gradient checkpointing, either pass gradient_checkpointing_kwargs={'use_reentrant': False} "
            "or call model.enable_input_require_grads() when the embeddings are frozen. A model that torch.export has "
            "traced (pipeline() of torch.distributed.pipelining) has lost its slices: give PipelineStage converted "
            "stages."
        )


def check_each_reached(
    slices: list[Slice],
    step: int,
    reached: Callable[[nn.Parameter], bool] = has_gradient,
    model: nn.Module | None = None,
) -> None:
    """Stop if a weight is trained in vain: frozen, and read by the model without calling the module that has it.

    Fused kernels do that (Mamba's), and fused losses with the output head. A slice without a gradient whose
    neighbours, the slices under the same parent module, have one is taken for such a case; a whole branch without
    gradients (an image tower on a batch of text, an expert) is not. `convert.audit.weight_reads` sees such weights
    where the model is not compiled and its forward is called; this is for the rest.

    Args:
        slices: of the model.
        step: number of the optimizer step, for errors.
        reached: as `has_gradient`.
        model: the converted model, to say how just these weights are freed.

    Raises:
        RuntimeError: slices have no gradient among neighbours that have one; all of them are named.
    """
    parents = {parent for slice_ in slices if reached(slice_.active) for parent in _parents(slice_.state.name)}
    lacking = []
    for slice_ in slices:
        name = slice_.state.name
        if reached(slice_.active) or _parents(name)[0] not in parents or not slice_.active.requires_grad:
            continue
        if isinstance(slice_.owner, nn.Embedding):
            logger.warning("%s received no gradient: the model was given inputs_embeds, perhaps.", name)
            continue
        lacking.append(name)
    if lacking:
        raise RuntimeError(
            f"{len(lacking)} weight(s) received no gradient at optimizer step {step}, though their neighbours did: "
            f"{summary(lacking)}. The model reads them without calling them (a fused kernel or a fused loss), or does "
            f"not use them. Train just these in full with {_exclusion(lacking, model)}, or switch the fused kernel off."
        )


def check_moved(optimizer: torch.optim.Optimizer, slices: list[Slice], step: int) -> bool:
    """Stop after a step that has moved no slice: some optimizers step over their first parameter group only.

    Args:
        optimizer: that has just taken a step.
        slices: of the model, not written back yet.
        step: number of the optimizer step, for errors.

    Returns:
        Whether a look told anything, so that no other is needed; with a learning rate of zero it does not.

    Raises:
        RuntimeError: slices have gradients and no state, and are what they were.
    """
    if any(group["lr"] is not None and group["lr"] <= 0 for group in optimizer.param_groups):
        return False
    if any(not slice_.resident or is_sharded(slice_.active) for slice_ in slices):
        return True  # stepped in parts, or by an engine
    stepped = [slice_ for slice_ in slices if has_gradient(slice_.active)]
    for slice_ in stepped:
        marks = slice_.drift.marks
        if optimizer.state.get(slice_.active) or marks is None or slice_.active._version != marks[0]:
            return True
    if any(group.get("fused") for group in optimizer.param_groups):  # counts no versions
        return True
    gradients = [slice_.active.grad for slice_ in stepped if slice_.active.grad is not None]
    if any(bool(gradient.any()) for gradient in gradients) and all(local_part(slice_).agrees() for slice_ in stepped):
        kind = plain_class(optimizer).__name__
        raise RuntimeError(
            f"{kind} took optimizer step {step} and moved none of the {len(stepped)} slices that have gradients: it "
            "steps over its first parameter group only, perhaps, and slices have groups of their own. Use another "
            "optimizer, or let it go through all of its param_groups."
        )
    return True


def _exclusion(names: list[str], model: nn.Module | None) -> str:
    config = getattr(getattr(model, "grass", None), "config", GrassConfig())
    others = [] if model is None else [use.name for use in uses(model) if use.name not in names]
    return exclusion(names, others, config)


def _parents(name: str) -> list[str]:
    """Names of the modules around a layer, the nearest first; the model itself is ""."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
