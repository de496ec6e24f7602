"""What the support matrix's oracles share: counters, contents, fixed functions."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from grass_hf.convert.conversion import grass_slices
from grass_hf.convert.patterns import Use


@dataclass
class Found:
    """What came of one case.

    Attributes:
        name, kind, cls, model_type: the case.
        status: "ok", "wrong", or "not built".
        dtype: "float64" or "float32".
        inputs: what it was tried on.
        targets: number of compressed weights by kind.
        coverage: share of the trained parameters in matrices (two dimensions or more) that is compressed.
        full_size: the same for the configuration class's default sizes, where the tiny model's is low.
        left_out: share by reason, of what is not.
        idle: weights that get no gradient in plain training on these inputs either.
        wrong: what does not hold.
        why: reason of what was not built.
        seconds: it took.
    """

    name: str
    kind: str
    cls: str
    model_type: str
    status: str = "not built"
    dtype: str = "float64"
    inputs: str = ""
    targets: dict[str, int] = field(default_factory=dict)
    coverage: float = 0.0
    full_size: float | None = None
    left_out: dict[str, float] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    why: str = ""
    seconds: float = 0.0


class NotBuilt(Exception):
    """A case cannot be tried; says why."""


def as_json(found: Found) -> dict:
    return asdict(found)


@contextmanager
def counted(model: nn.Module):
    """How often each module is called, by name."""
    calls: Counter = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def contents(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                slice_ = file.get_slice(key)
                found[key] = (tuple(slice_.get_shape()), slice_.get_dtype())
    return found


def plain_parameters(model: nn.Module):
    slices = {id(slice_.active) for slice_ in grass_slices(model)}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in slices]


def mask(param: Tensor, index: Tensor, dim: int) -> Tensor:
    chosen = torch.zeros(*param.shape[:-2], param.shape[dim], dtype=torch.bool).scatter_(-1, index, True)
    return chosen.unsqueeze(-1 if dim == -2 else -2).expand(param.shape)


def fixed_function(values: Tensor) -> Tensor:
    values = values.reshape(-1)
    values = values[values.detach().isfinite()]
    return (values * torch.arange(values.numel(), dtype=values.dtype).cos()).sum() / max(values.numel(), 1) ** 0.5


def tensors(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for key, value in out.items() if "key_values" not in key for t in tensors(value)]
    if isinstance(out, list | tuple):
        return [t for value in out for t in tensors(value)]
    return []


def parameter(use: Use) -> str:
    return use.name if use.parameter != "weight" else f"{use.name}.weight"


def short(error: Exception) -> str:
    if isinstance(error, NotBuilt):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
