"""vLLM's sparse weight transfer, in checkpoint coordinates: patches as vLLM's own data classes.

vLLM (0.33; its pull requests 40096, 50723 and 53751) takes ``SparseWeightPatch(name, indices, values, full_shape)`` in
its engine ``sparse_nccl``: int32 flat indices, each once, and values of a floating-point dtype without NaN, which
stands for "unchanged" there. So a weight that has become NaN cannot be sent, and an integer buffer neither.

    engine.send_weights(sparse_patches(delta))         engine: vLLM's SparseNCCLTrainerWeightTransferEngine

The first synchronisation, and any whose `delta.last.is_full`, is better sent by a dense engine: vLLM makes a tensor of
the full shape for every patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...optim.weight_delta import WeightDelta
from ...slices.ops.grouping import groups_by_size

_MODULE = "vllm.distributed.weight_transfer.sparse_nccl_engine"


def sparse_patches(delta: WeightDelta, patch_class: Callable[..., Any] | None = None) -> list[Any]:
    """What changed since the last call, for vLLM's ``sparse_nccl`` engine.

    Args:
        delta: of the trainer, whose state dict has the names that vLLM's loader of the model knows.
        patch_class: vLLM's ``SparseWeightPatch``; None imports it.

    Returns:
        One patch for each tensor that changed, contiguous, on the tensor's device.

    Raises:
        ValueError: vLLM is not installed or too old, or a tensor holds what its patches cannot: NaN, integers, or more
            elements than int32 can number. The changes come again with the next call then.
    """
    make = patch_class or sparse_engine().SparseWeightPatch
    return [patch_of(make, name, indices, values, delta.shape(name)) for name, indices, values in delta.patches()]


def patch_of(make: Callable[..., Any], name: str, indices: Tensor | None, values: Tensor, shape: torch.Size) -> Any:
    """One of `WeightDelta.patches` as vLLM's ``SparseWeightPatch``; errors as `sparse_patches`."""
    _check(name, indices, values)
    if indices is None:
        indices = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    # vLLM sends the memory as it stands, whatever its strides (vllm#57130)
    flat = values.reshape(-1).contiguous()
    return make(name=name, indices=indices.contiguous(), values=flat, full_shape=tuple(shape))


def chunks(patches: Iterable[Any], nbytes: int = 2**28) -> Iterator[list[Any]]:
    """Patches in groups of at most so many bytes (one at least), for vLLM's ``send_weight_chunk``."""
    return groups_by_size(patches, lambda patch: patch.indices.nbytes + patch.values.nbytes, nbytes)


def _check(name: str, indices: Tensor | None, values: Tensor) -> None:
    if not values.is_floating_point():
        reason = f"is {values.dtype}, and vLLM's sparse patches are of floating-point tensors"
    elif (indices is not None and indices.dtype != torch.int32) or values.numel() > torch.iinfo(torch.int32).max:
        reason = "has more elements than int32 can number"
    elif bool(values.isnan().any()):
        reason = "holds NaN, which stands for an unchanged element in vLLM's sparse patches"
    else:
        return
    raise ValueError(f"{name} {reason}: send state_dict() with a dense engine of vLLM.")


def sparse_engine() -> Any:
    """vLLM's module of the engine.

    Raises:
        ValueError: it cannot be imported.
    """
    import importlib

    try:
        module: Any = importlib.import_module(_MODULE)
        _ = module.SparseWeightPatch
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"vLLM's sparse weight transfer cannot be imported ({error}): pip install 'vllm>=0.33', or send files "
            "(grass_hf.integrations.rollouts.files)."
        ) from None
    return module
