"""The dtypes of slices: in which they are stepped, and in which their gradients are.

    weights              resident=True                        resident=False
    float32, float64     the weights'                         the weights'
    bfloat16             float32, gradients too               float32, sixteen bits of it kept; gradients bfloat16
    float16              float32, gradients too               float16
    int8                 float32, gradients too               float32, sixteen bits of it kept; gradients as scales are

`slice_dtype` and `gradient_dtype` of a config change that as far as it can be changed.
"""

from __future__ import annotations

import torch

from ..config.settings import GrassConfig
from ..slices.ops.rounding import loses_digits


def slice_dtype(weight_dtype: torch.dtype, config: GrassConfig, *, int8: bool = False) -> torch.dtype:
    """The dtype in which slices over weights of a dtype are stepped.

    Args:
        weight_dtype: of the weights; of int8 ones that of their scales.
        config: settings.
        int8: whether the weights are stored in eight bits.

    Raises:
        ValueError: the slices are to be loaded from the weights, which do not hold numbers of this dtype.
    """
    int8 = int8 or config.weight_dtype == "int8"
    asked = None if config.slice_dtype is None else getattr(torch, config.slice_dtype)
    # An update below half a unit in the weight's last place would be lost at every step: docs/precision.md
    kept = torch.promote_types(weight_dtype, torch.float32) if int8 else weight_dtype
    if config.resident:
        return asked or (torch.float32 if loses_digits(kept, torch.float32) else kept)
    split = weight_dtype == torch.bfloat16 and not int8
    if asked is None:
        return torch.float32 if split else kept
    if asked == kept or (split and asked == torch.float32):
        return asked
    said = "int8" if int8 else str(weight_dtype)
    raise ValueError(
        f"resident=False reloads slices from the weights, which are {said}, and slice_dtype={config.slice_dtype!r} "
        "holds more or other digits: leave slice_dtype out, or use resident=True."
    )


def gradient_dtype(weight_dtype: torch.dtype, config: GrassConfig, *, int8: bool = False) -> torch.dtype:
    """The dtype of the gradients of slices, and of the parameters that have them.

    Args:
        weight_dtype, config, int8: as for `slice_dtype`.

    Raises:
        ValueError: as `slice_dtype`; or gradients of this dtype do not go with these slices.
    """
    stepped = slice_dtype(weight_dtype, config, int8=int8)
    if config.gradient_dtype is None:
        return stepped if config.resident else weight_dtype
    asked = getattr(torch, config.gradient_dtype)
    if asked == stepped or (asked == weight_dtype and not config.resident):
        return asked
    if config.resident:
        raise ValueError(
            f"gradient_dtype={config.gradient_dtype!r}, and slices that stay in memory are {stepped}, as their "
            "gradients must be: use resident=False, or leave gradient_dtype out."
        )
    raise ValueError(
        f"gradient_dtype={config.gradient_dtype!r} is neither the dtype of the weights ({weight_dtype}) nor that of "
        f"their slices ({stepped}): use one of them, or leave gradient_dtype out."
    )
