"""Layers that train a slice of their weight.

[Note: the active slice] The full ``weight`` stays in the plain module, frozen. Beside it lives one small trainable
parameter, ``active``, with the invariant ``weight[index] = write * active`` (columns for side "input"). By the
chain rule its gradient is Grass's C = P^T G, so any optimizer, scheduler, scaler, DDP or clipping that works on
parameters works on it unchanged; after the optimizer's step `write_back` copies it into the weight.

A layer is converted by swapping its class, as `torch.nn.utils.parametrize` does: no weight is copied, hooks and
references to the module stay valid, and `forward` of the original class still runs, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import functional
from .selection import Selection, strided


@dataclass
class SliceState:
    """What one layer remembers between steps, beside its tensors; the controller keeps it.

    Attributes:
        name: the layer's qualified name in the model, without wrappers' prefixes.
        size: rows of the selected side.
        rank: rows of the slice, r.
        count: rows in use, below `rank` only for rules with replacement.
        phase: the layer selects at steps phase, phase + K, phase + 2K, ...
        owed: factor of weight decay that the rows outside the slice have not had yet.
        trained: bool (size,), rows trained so far; on the CPU.
        energy: squared gradient norm of the rows selected last and of all rows, at that observation.
        reset_step: step at which the optimizer state was last dropped, None if never.
    """

    name: str
    size: int
    rank: int
    count: int
    phase: int = 0
    owed: float = 1.0
    trained: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    energy: tuple[float, float] | None = None
    reset_step: int | None = None


class GrassLayer(nn.Module):
    """Mixin in front of a linear-like class; made by `attach_slice`, undone by `detach_slice`.

    Attributes:
        active: Parameter, (r, n) for side "output", (m, r) for "input".
        index: int64 buffer (r,), not persistent.
        rho, write: float buffers (r,), not persistent; None unless the rule draws with replacement.
        norms: the leaf that collects squared norms while an observation is due, else None.
        side: "output" or "input".
        slice_state: the layer's `SliceState`.
    """

    active: nn.Parameter
    index: Tensor
    rho: Tensor | None
    write: Tensor | None
    norms: Tensor | None
    side: str
    slice_state: SliceState

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        output = super().forward(input, *args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        if self.norms is not None and not torch.compiler.is_compiling():
            self._drop_stale_norms()
        return functional.tap(
            output, input, self.active, self.index, side=self.side, multiplier=self.rho, norms=self.norms
        )

    @property
    def dim(self) -> int:
        """Dimension of `weight` and of `active` along which rows (columns) are selected."""
        return 0 if self.side == "output" else 1

    def observe(self) -> None:
        """Collect squared gradient norms during the coming backward passes, until `end_observation`."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.norms = torch.zeros(self.slice_state.size, dtype=dtype, device=self.weight.device, requires_grad=True)

    def end_observation(self) -> Tensor:
        """Stop observing; the squared norms (size,), zero if no backward reached the layer."""
        norms, self.norms = self.norms, None
        return torch.zeros_like(norms) if norms.grad is None else norms.grad

    def _drop_stale_norms(self) -> None:
        # GradScaler may skip a step without telling the optimizer; its gradients are gone, its norms go too.
        if self.norms.grad is not None and self.active.grad is None:
            self.norms.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the active slice into the weight. Idempotent."""
        count, dim = self.slice_state.count, self.dim
        index, rows = self.index, self.active
        if self.write is not None:
            rows = rows * self._along_rows(self.write)
            index, rows = index[:count], rows.narrow(dim, 0, count)
        self.weight.index_copy_(dim, index, rows.to(self.weight.dtype))

    @torch.no_grad()
    def settle_decay(self) -> None:
        """Multiply into the rows outside the slice the weight decay they are owed."""
        if self.slice_state.owed != 1.0:
            self.weight.mul_(self.slice_state.owed)
            self.slice_state.owed = 1.0
            self.write_back()

    @torch.no_grad()
    def load_selection(self, selection: Selection) -> Tensor:
        """Write the old slice back and load another one.

        Rows that stay keep the slice's own values, which may be more precise than the weight's.

        Returns:
            int64 (r,) on the CPU: the old position of each row of the new slice, -1 for a fresh row.
        """
        self.settle_decay()
        self.write_back()
        old, new = self.index[: self.slice_state.count].cpu(), selection.index
        position = torch.full((self.slice_state.size,), -1, dtype=torch.int64)
        position[old] = torch.arange(old.numel())
        source = position[new]
        source[selection.count :] = -1
        kept = (source >= 0).nonzero().squeeze(1)
        device, dim = self.weight.device, self.dim
        values = self.weight.index_select(dim, new.to(device)).to(self.active.dtype)
        if kept.numel():
            rows = self.active.index_select(dim, source[kept].to(device))
            if selection.write is not None:
                rows = rows * self._along_rows(self.write[source[kept].to(device)])
            values.index_copy_(dim, kept.to(device), rows.to(values.dtype))
        if selection.write is not None:
            self.rho.copy_(selection.rho)
            self.write.copy_(selection.write)
            values = values / self._along_rows(self.write)
            values.narrow(dim, selection.count, values.shape[dim] - selection.count).zero_()
        self.active.copy_(values)
        self.index.copy_(new)
        self.slice_state.count = selection.count
        return source

    @torch.no_grad()
    def reload(self) -> None:
        """Bring the slice in line with a weight that was changed from outside, by loading a checkpoint say.

        A slice that already agrees with the weight is left alone: it may hold more digits than the weight.
        """
        rows = self.weight.index_select(self.dim, self.index)
        values = self.active if self.write is None else self.active * self._along_rows(self.write)
        agrees = values.to(rows.dtype) == rows
        if not bool(agrees.narrow(self.dim, 0, self.slice_state.count).all()):
            rows = rows.to(self.active.dtype)
            self.active.copy_(rows if self.write is None else rows / self._along_rows(self.write))
            self.active.narrow(self.dim, self.slice_state.count, self.slice_state.rank - self.slice_state.count).zero_()

    def _along_rows(self, vector: Tensor) -> Tensor:
        """Shape a vector over selected rows so that it multiplies a slice."""
        return vector[:, None] if self.dim == 0 else vector

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        # A plain checkpoint has no slice, and the one in a converted model's state dict may belong to another
        # index: the weight decides, and optimizer.load_state_dict brings index and slice afterwards.
        key = prefix + "active"
        stored = state_dict.pop(key, None)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        finally:
            if stored is not None:
                state_dict[key] = stored
        if key in missing_keys:
            missing_keys.remove(key)
        if prefix + "weight" in state_dict:
            self.slice_state.owed = 1.0
            self.reload()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.slice_state.rank}, side={self.side}"


class GrassLinear(GrassLayer, nn.Linear):
    """`nn.Linear` with an active slice."""


_CLASSES: dict[type[nn.Module], type[GrassLayer]] = {nn.Linear: GrassLinear}


def _converted_class(cls: type[nn.Module]) -> type[GrassLayer]:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Grass{cls.__name__}", (GrassLayer, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


def attach_slice(
    module: nn.Module,
    *,
    name: str,
    rank: int,
    side: str,
    weighted: bool,
    dtype: torch.dtype | None,
    phase: int,
) -> GrassLayer:
    """Give a linear-like module an active slice, in place.

    Args:
        module: holds ``weight`` (m, n), which is frozen from here on.
        name: the module's qualified name.
        rank: r, at most the size of the selected side.
        side: "output" or "input".
        weighted: whether the selection rule carries multipliers (draws with replacement).
        dtype: dtype of the slice, None for the weight's.
        phase: step of the layer's first selection.
    """
    weight: nn.Parameter = module.weight
    size = weight.shape[0] if side == "output" else weight.shape[1]
    weight.requires_grad_(False)
    weight.grad = None
    module.__class__ = _converted_class(type(module))
    first = strided(size, rank)
    with torch.no_grad():
        rows = weight.index_select(0 if side == "output" else 1, first.index.to(weight.device))
    module.active = nn.Parameter(rows.to(dtype or weight.dtype))
    module.register_buffer("index", first.index.to(weight.device), persistent=False)
    multipliers = None
    if weighted:
        precision = torch.float64 if module.active.dtype == torch.float64 else torch.float32
        multipliers = torch.ones(rank, dtype=precision, device=weight.device)
    module.register_buffer("rho", multipliers, persistent=False)
    module.register_buffer("write", None if multipliers is None else multipliers.clone(), persistent=False)
    module.side = side
    module.norms = None
    trained = torch.zeros(size, dtype=torch.bool)
    module.slice_state = SliceState(name, size, rank, first.count, phase, trained=trained)
    return module


def detach_slice(module: GrassLayer) -> nn.Module:
    """Bring the weight up to date and turn the layer back into what it was, in place."""
    module.settle_decay()
    module.write_back()
    for name in ("active", "index", "rho", "write", "norms", "side", "slice_state"):
        delattr(module, name)
    module.__class__ = next(plain for plain, converted in _CLASSES.items() if converted is type(module))
    module.weight.requires_grad_(True)
    return module
