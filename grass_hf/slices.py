"""The active slice: the small trainable parameter beside a frozen weight.

[Note: the active slice] The full weight stays in the plain module, frozen. Beside it lives one small trainable
parameter, ``active``, with the invariant ``weight[index] = write * active`` (columns for the other side). By the
chain rule its gradient is Grass's C = P^T G, so any optimizer, scheduler, scaler, DDP or clipping that works on
parameters works on it unchanged; after the optimizer's step `write_back` copies it into the weight.

A weight of experts, (E, m, n), is E matrices in one tensor: its slice is (E, r, n) or (E, m, r), its index (E, r),
and every expert selects for itself.

[Note: rounding] A slice may hold more digits than its weight (float32 over bfloat16). While a row is being trained
the weight is its nearest value, so copying is idempotent. When the row leaves, what is below half a unit in the last
place of the weight would be lost; rounding up or down at random, with the probabilities that make the mean exact,
lets it arrive in the mean. The draws depend on (seed, step, name) alone, so resuming repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import functional
from .functional import accumulation_dtype, along_slice, put_rows, selected_dim, take_rows
from .grouped import grouped_linear
from .rounding import loses_digits, round_stochastically
from .selection import Selection, seeded, strided
from .sharing import SharedColumns

# Rows of a weight that are converted to float32 at a time, to multiply decay into a half-precision weight.
_DECAY_BLOCK = 256


@dataclass
class SliceState:
    """What one slice remembers between steps, beside its tensors; the controller keeps it.

    Attributes:
        name: qualified name of the layer (of the parameter, for experts), without wrappers' prefixes.
        size: rows on the selected side.
        rank: rows of the slice, r.
        phase: the slice selects at steps phase, phase + K, phase + 2K, ...
        leader: name under which it chooses rows; slices that share an index have the same.
        owed: factor of weight decay that the rows outside the slice have not had yet.
        trained: bool (size,) or (E, size), rows trained so far; on the CPU.
        energy: squared gradient norm of the rows selected last and of all rows, at that observation.
        reset_step: step at which the optimizer state was last dropped, None if never.
    """

    name: str
    size: int
    rank: int
    phase: int = 0
    leader: str = ""
    owed: float = 1.0
    trained: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    energy: tuple[float, float] | None = None
    reset_step: int | None = None


class Slice(nn.Module):
    """The trained rows or columns of one weight; a child ``<parameter>_slice`` of the module that holds the weight.

    Args:
        owner: the module that holds the weight.
        parameter: the weight's name in it.
        name: as in `SliceState`.
        rank: r, at most the size of the selected side.
        side: "output" or "input".
        transposed: the weight is stored (input, output).
        weighted: whether the selection rule carries multipliers (draws with replacement).
        dtype: of the slice, None for the weight's.
        phase: step of the first selection.
        leader: name under which it chooses rows, None for its own.
        columns: what slices with the same leader keep for backward together.

    Attributes:
        active: Parameter, (..., r, n) for side "output", (..., m, r) for "input", or transposed as the weight is.
        index: int64 buffer (..., r), not persistent.
        rho, write: float buffers (..., r), not persistent; None unless the rule draws with replacement.
        norms: the leaf (..., size) that collects squared norms while an observation is due, else None.
        dim: -2 or -1, the dimension of weight and slice along which rows (columns) are selected.
    """

    index: Tensor
    rho: Tensor | None
    write: Tensor | None

    def __init__(
        self,
        owner: nn.Module,
        parameter: str,
        *,
        name: str,
        rank: int,
        side: str,
        transposed: bool = False,
        weighted: bool = False,
        dtype: torch.dtype | None = None,
        phase: int = 0,
        leader: str | None = None,
        columns: SharedColumns | None = None,
    ):
        super().__init__()
        # not registered: the owner is the parent
        self.__dict__["owner"] = owner
        self.parameter = parameter
        self.side = side
        self.transposed = transposed
        self.dim = selected_dim(side, transposed)
        weight = self.weight
        size, batch = weight.shape[self.dim], weight.shape[:-2]
        index = strided(size, rank).index.expand(*batch, rank).clone().to(weight.device)
        self.active = nn.Parameter(take_rows(weight.detach(), index, self.dim).to(dtype or weight.dtype))
        self.register_buffer("index", index, persistent=False)
        multipliers = None
        if weighted:
            precision = accumulation_dtype(self.active.dtype)
            multipliers = torch.ones(*batch, rank, dtype=precision, device=weight.device)
        self.register_buffer("rho", multipliers, persistent=False)
        self.register_buffer("write", None if multipliers is None else multipliers.clone(), persistent=False)
        self.norms: Tensor | None = None
        trained = torch.zeros(*batch, size, dtype=torch.bool)
        self.columns = columns
        self.state = SliceState(name, size, rank, phase, leader or name, trained=trained)

    @property
    def weight(self) -> nn.Parameter:
        """The full weight, (..., m, n) or as it is stored."""
        return getattr(self.owner, self.parameter)

    def tap(self, y: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        """`functional.tap` for a product ``y`` of this weight, which this use of it may see transposed."""
        if not torch.is_grad_enabled():
            return y
        extras = self._extras()
        side = "output" if self.dim == selected_dim("output", transposed) else "input"
        if self.columns is not None and self.norms is None and not torch.compiler.is_compiling():
            extras["columns"] = self.columns.gather(x, self.index, y.dtype)
        return functional.tap(y, x, self.active, self.index, side=side, transposed=transposed, **extras)

    def embedding_tap(self, y: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """`functional.embedding_tap` for rows of this weight."""
        if not torch.is_grad_enabled():
            return y
        return functional.embedding_tap(y, ids, self.active, self.index, padding_idx=padding_idx, **self._extras())

    def grouped_linear(self, x: Tensor, tokens: list[int]) -> Tensor:
        """`grouped.grouped_linear` with this weight of experts."""
        placed = {"side": self.side, "transposed": self.transposed}
        return grouped_linear(x, self.weight, tokens, self.active, self.index, **placed, **self._extras())

    def _extras(self) -> dict[str, Tensor | None]:
        if not torch.compiler.is_compiling():
            self.drop_stale_norms()
        return {"multiplier": self.rho, "norms": self.norms}

    def observe(self) -> None:
        """Collect squared gradient norms during the coming backward passes, until `end_observation`."""
        dtype = accumulation_dtype(self.weight.dtype)
        shape = (*self.weight.shape[:-2], self.state.size)
        self.norms = torch.zeros(shape, dtype=dtype, device=self.weight.device, requires_grad=True)

    def end_observation(self) -> Tensor:
        """Stop observing; the squared norms (..., size), zero if no backward reached the layer."""
        norms, self.norms = self.norms, None
        return torch.zeros_like(norms) if norms.grad is None else norms.grad

    def drop_stale_norms(self) -> None:
        """Forget norms whose gradients are gone: GradScaler may skip a step without telling the optimizer."""
        if self.norms is not None and self.norms.grad is not None and self.active.grad is None:
            self.norms.grad = None

    @torch.no_grad()
    def write_back(self, seed: str | None = None) -> None:
        """Copy the active slice into the weight; idempotent.

        Args:
            seed: of the draws, to round stochastically; None rounds to nearest. See [Note: rounding].
        """
        weight, rows = self.weight, self.active
        if self.write is not None:
            rows = rows * along_slice(self.write, self.dim)
            # Padding repeats the first row's number, so it must repeat its value.
            padding = along_slice(self.rho == 0, self.dim)
            rows = torch.where(padding, rows.narrow(self.dim, 0, 1), rows)
        if seed is not None and loses_digits(weight.dtype, rows.dtype):
            rounded = round_stochastically(rows, weight.dtype, seeded(seed, rows.device))
            if self.write is not None:
                rounded = torch.where(padding, rounded.narrow(self.dim, 0, 1), rounded)
            rows = rounded
        put_rows(weight, self.index, rows.to(weight.dtype), self.dim)

    @torch.no_grad()
    def settle_decay(self, seed: str | None = None) -> None:
        """Multiply into the rows outside the slice the weight decay they are owed.

        Args:
            seed: of the draws, to round a half-precision weight stochastically; None rounds to nearest.
        """
        if self.state.owed == 1.0:
            return
        weight = self.weight
        if seed is not None and loses_digits(weight.dtype, torch.float32):
            draws = seeded(seed + ".decay", weight.device)
            for rows in weight.flatten(0, -2).split(_DECAY_BLOCK):
                rows.copy_(round_stochastically(rows.float() * self.state.owed, weight.dtype, draws))
        else:
            weight.mul_(self.state.owed)
        self.state.owed = 1.0
        self.write_back()

    @torch.no_grad()
    def load_selection(self, selection: Selection, seed: str | None = None) -> Tensor:
        """Write the old slice back and load another one.

        Rows that stay keep the slice's own values, which may be more precise than the weight's.

        Args:
            selection: of shape (..., r), on the CPU.
            seed: of the draws, to round leaving rows stochastically; None rounds to nearest.

        Returns:
            int64 (..., r) on the CPU: the old position of each row of the new slice, -1 for a fresh row.
        """
        self.settle_decay(seed)
        self.write_back(seed)
        source = selection.positions_in(self.current_selection(), self.state.size).to(self.index.device)
        new = selection.index.to(self.index.device)
        values = take_rows(self.weight, new, self.dim).to(self.active.dtype)
        rows = take_rows(self.active, source.clamp(min=0), self.dim)
        if selection.write is not None:
            rows = rows * along_slice(self.write.gather(-1, source.clamp(min=0)), self.dim)
            self.rho.copy_(selection.rho)
            self.write.copy_(selection.write)
        values = torch.where(along_slice(source >= 0, self.dim), rows.to(values.dtype), values)
        if selection.write is not None:
            values = values / along_slice(self.write, self.dim)
            values = values.masked_fill(along_slice(self.rho == 0, self.dim), 0.0)
        self.active.copy_(values)
        self.index.copy_(new)
        if seed is not None:
            self.write_back()  # rows that stay are kept at their nearest value
        return source.cpu()

    @torch.no_grad()
    def reload(self) -> None:
        """Bring the slice in line with a weight that was changed from outside, by loading a checkpoint say.

        A slice that already agrees with the weight is left alone: it may hold more digits than the weight.
        """
        rows = take_rows(self.weight, self.index, self.dim)
        values, agrees = self.active, None
        if self.write is not None:
            values = values * along_slice(self.write, self.dim)
            agrees = along_slice(self.rho == 0, self.dim)  # padding is nothing to agree on
        same = values.to(rows.dtype) == rows
        if not bool((same if agrees is None else same | agrees).all()):
            rows = rows.to(self.active.dtype)
            if self.write is not None:
                rows = (rows / along_slice(self.write, self.dim)).masked_fill(agrees, 0.0)
            self.active.copy_(rows)

    def current_selection(self) -> Selection:
        """The rows in the slice now, on the CPU."""
        rho, write = (None if v is None else v.double().cpu() for v in (self.rho, self.write))
        return Selection(self.index.cpu(), rho, write)

    def mark_trained(self) -> None:
        """Note that the rows in the slice have been trained."""
        self.state.trained.scatter_(-1, self.index.cpu(), True)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        # A plain checkpoint has no slice, and the one in a converted model's state dict may belong to another
        # index: the owner's weight decides, and optimizer.load_state_dict brings index and slice afterwards.
        key = prefix + "active"
        stored = state_dict.pop(key, None)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        finally:
            if stored is not None:
                state_dict[key] = stored
        if key in missing_keys:
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        return f"rank={self.state.rank}, side={self.side}"
