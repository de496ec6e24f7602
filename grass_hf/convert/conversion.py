"""`convert_to_grass` and `restore_model`: the surgery on a model, forth and back."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch
from torch import nn

from ..config.settings import GrassConfig
from ..slices.evaluated import follow_weight
from ..slices.ops.int8 import is_int8
from ..slices.ops.rounding import loses_digits
from ..slices.ops.selection import with_replacement
from ..slices.ops.sharding import gathered, is_partitioned, is_sharded, shape_of
from ..slices.ops.shared_columns import SharedColumns
from .audit import watching
from .freezing import watch_flags
from .modules import GrassModule
from .record import Conversion, conversion_of, grass_slices
from .surgery import all_or_nothing, attach_slice, detach_slices, remove_attribute, set_attribute, store_as_int8
from .targets import Target, plan
from .undriven import watch_steps

logger = logging.getLogger(__name__)

# Read by DDP.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def convert_to_grass(model: nn.Module, config: GrassConfig | None = None) -> nn.Module:
    """Give every target layer of `model` an active slice, in place, and freeze its full weight.

    Convert before the model is wrapped (DDP, torch.compile, accelerator.prepare) and before its optimizer is made;
    `grass_optimizer` makes one. No weight is copied but the slices.

    Args:
        model: any `torch.nn.Module`; a `PreTrainedModel` keeps saving plain Hugging Face checkpoints.
        config: settings; None takes the defaults.

    Returns:
        The same model. Its state dict has the keys, shapes and dtypes that it had.

    Raises:
        ValueError: the model was converted before, is wrapped, or the config's targets or rank fit none of it;
            nothing has been changed then, as after any other error, of memory say.
    """
    config = config or GrassConfig()
    if is_converted(model):
        raise ValueError(
            f"{type(model).__name__} was already converted with {conversion_of(model).config}: call "
            "restore_model(model) first to convert it anew."
        )
    _refuse_wrapped(model)
    todo = plan(model, config)
    left_alone = vars(model).get(_IGNORED)
    with all_or_nothing() as undo:
        _attach(todo.targets, config, undo)
        if names := [name for name, param in model.named_parameters() if is_int8(param)]:
            # DDP broadcasts what it finds as one flat tensor, which an int8 weight is no part of; guards compare them
            set_attribute(model, _IGNORED, [*(getattr(model, _IGNORED, None) or ()), *names], undo)
        set_attribute(model, "grass", Conversion(model, config, todo.left_out, left_alone), undo)
        undo.callback(watching.end, model)
        watching.begin(model)
    watch_steps()
    watch_flags()
    return model


def _attach(targets: list[Target], config: GrassConfig, undo: ExitStack) -> None:
    weighted = with_replacement(config.selection)
    dtypes = [slice_dtype(getattr(target.module, target.parameter).dtype, config) for target in targets]
    phases = _phases(targets, config)
    columns = {target.leader: SharedColumns() for target in targets}
    for target, dtype in zip(targets, dtypes, strict=True):
        with gathered(p for module in (target.module, *target.sharers) for p in module.parameters()):
            attach_slice(
                target.module,
                target.parameter,
                undo,
                sharers=target.sharers,
                transposed=target.transposed,
                name=target.name,
                rank=target.rank,
                side=target.side,
                weighted=weighted,
                dtype=dtype,
                phase=phases[target.leader],
                leader=target.leader,
                columns=columns[target.leader],
                blocks=target.blocks,
                by_sequence=config.score_by == "sequence",
                resident=config.resident,
                vocabulary=target.vocabulary,
                as_int8=_as_int8(target, config),
            )
    store_as_int8(((t.module, t.parameter) for t in targets if _as_int8(t, config)), undo)


def _phases(targets: list[Target], config: GrassConfig) -> dict[str, int]:
    """The step within the interval on which each leader, and who follows it, selects: neighbours on the same one."""
    leaders = list(dict.fromkeys(target.leader for target in targets))
    turns = min(config.stagger, len(leaders))
    return {
        leader: place * turns // len(leaders) * config.update_interval // turns for place, leader in enumerate(leaders)
    }


def restore_model(model: nn.Module) -> nn.Module:
    """Turn a converted model into what it was, with the trained weights, in place.

    Weight decay still owed to rows is multiplied in, weights are as trainable as they were. A slice whose values are
    not its weight's (the model is an average of others, was resized, or an optimizer that does not drive slices was
    used) is dropped: the weight is what the model computes with. After an error the model is still converted.

    Raises:
        ValueError: no part of the model is converted, or it is sharded.
    """
    if not any(isinstance(module, GrassModule) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds no Grass slices: convert_to_grass(model, config) makes them.")
    if any(is_sharded(slice_.active) or is_partitioned(slice_.active) for slice_ in grass_slices(model)):
        raise ValueError(
            f"{type(model).__name__} is sharded, and its modules cannot be put back in place: save it "
            "(save_pretrained, get_model_state_dict) and load the checkpoint, which is plain."
        )
    slices = list(grass_slices(model))
    if alone := [slice_.state.name for slice_ in slices if follow_weight(slice_)]:
        logger.warning(
            "%d slices (%s, ...) were changed by something that does not drive them, and never reached their weights: "
            "what they held is dropped.",
            len(alone),
            alone[0],
        )
    for slice_ in slices:
        slice_.settle_decay()
    with all_or_nothing() as undo:
        for module in list(model.modules()):
            if isinstance(module, GrassModule):
                detach_slices(module, undo)
        if is_converted(model):  # else it was a part of one that is gone: PEFT's merge_and_unload leaves such
            if conversion_of(model).ddp_ignored is not None:
                set_attribute(model, _IGNORED, conversion_of(model).ddp_ignored, undo)
            elif _IGNORED in vars(model):
                remove_attribute(model, _IGNORED, undo)
            remove_attribute(model, "grass", undo)
    watching.end(model)
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether `convert_to_grass` was applied to this module itself (not to a wrapped one)."""
    # not by getattr, which PEFT's wrappers answer for the model in them
    return isinstance(vars(model).get("grass"), Conversion)


def converted_part(model: nn.Module) -> nn.Module | None:
    """The module that `convert_to_grass` was applied to: the given one, or the one part of it; None if there is none.

    Raises:
        ValueError: several parts of it were converted.
    """
    found = [module for module in model.modules() if is_converted(module)]
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} models that were converted to Grass, and one optimizer drives "
            "the slices of one: convert only the model that is trained, restore_model(other) restores another."
        )
    return found[0] if found else None


def describe(model: nn.Module) -> str:
    """Settings and slices of a converted model in one line, equal on ranks that can train together."""
    shapes = [(tuple(shape_of(slice_.active)), tuple(shape_of(slice_.weight))) for slice_ in grass_slices(model)]
    names = [slice_.state.name for slice_ in grass_slices(model)]
    slices = [f"{name} {active} of {weight}" for name, (active, weight) in zip(names, shapes, strict=True)]
    return "; ".join([describe_settings(conversion_of(model).config), *slices])


def describe_settings(config: GrassConfig) -> str:
    """All settings in one line."""
    return "; ".join(f"{key}={value}" for key, value in config.to_dict().items())


def _as_int8(target: Target, config: GrassConfig) -> bool:
    # of a weight with several users the other one would keep the plain parameter
    plain = isinstance(target.module, nn.Linear) and target.side == "output" and not target.sharers
    return config.weight_dtype == "int8" and plain


def slice_dtype(weight_dtype: torch.dtype, config: GrassConfig) -> torch.dtype:
    """The dtype of the slices over weights of a dtype.

    Raises:
        ValueError: it differs from the weights', and the slices are to be reloaded from them.
    """
    if not config.resident:
        if config.slice_dtype not in (None, str(weight_dtype).removeprefix("torch.")):
            raise ValueError(
                f"resident=False reloads slices from the weights, which are {weight_dtype}, and "
                f"slice_dtype={config.slice_dtype!r} holds more or other digits: leave slice_dtype out, or use "
                "resident=True."
            )
        return weight_dtype
    if config.slice_dtype is not None:
        return getattr(torch, config.slice_dtype)
    if config.weight_dtype == "int8":
        return torch.promote_types(weight_dtype, torch.float32)
    # An update below half a unit in the weight's last place would be lost at every step: docs/precision.md
    return torch.float32 if loses_digits(weight_dtype, torch.float32) else weight_dtype


def _refuse_wrapped(model: nn.Module) -> None:
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{kind} is the result of torch.compile: convert the model first, then compile it.")
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"{kind} was split by transformers when it was loaded (DistributedConfig: tensor or pipeline parallelism, "
            "FSDP), before its layers could be converted: load it without distributed_config, and let accelerate shard "
            "it with FSDP2 (configs/accelerate/fsdp2_8gpu.yaml)."
        )
    if kind.startswith("FSDP") or any(type(m).__name__.startswith("FSDP") for m in model.modules()):
        raise ValueError(f"{kind} is sharded already: convert the model first, then shard it.")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or kind == "DeepSpeedEngine":
        raise ValueError(f"{kind} wraps a model: convert the model first, then wrap it.")
    for name, param in model.named_parameters():
        if is_sharded(param):
            raise ValueError(
                f"{name} is sharded already, as {getattr(param, 'placements', None)}: convert the model first, then "
                "shard it with fully_shard; tensor parallelism (tp_plan, parallelize_module) is not supported, use "
                "FSDP2."
            )
    if any(isinstance(module, GrassModule) for module in model.modules()):
        raise ValueError(f"{kind} contains a part that was already converted: call restore_model on that part first.")
