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

import torch
from torch import Tensor, nn

from . import distributed, functional
from .functional import accumulation_dtype, along_slice, put_rows, selected_dim, take_rows
from .grouped import grouped_linear
from .parts import SliceState, local_part
from .rounding import loses_digits, round_stochastically
from .selection import Selection, aligned, seeded, strided
from .sharing import SharedColumns

# Rows of a weight that are converted to float32 at a time, to multiply decay into a half-precision weight.
_DECAY_BLOCK = 256


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
        blocks: parts of the side that choose rows for themselves.
        by_sequence: what norms are of, see `functional.tap`.

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
        blocks: int = 1,
        by_sequence: bool = False,
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
        index = strided(size, rank, blocks).index.expand(*batch, rank).clone().to(weight.device)
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
        self.by_sequence = by_sequence
        self.state = SliceState(name, size, rank, phase, leader or name, blocks, trained=trained)

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
        extras = self._extras()
        extras.pop("by_sequence")  # tokens come sorted by expert, their sequences are not known any more
        placed = {"side": self.side, "transposed": self.transposed}
        return grouped_linear(x, self.weight, tokens, self.active, self.index, **placed, **extras)

    def _extras(self) -> dict[str, Tensor | bool | None]:
        if not torch.compiler.is_compiling():
            self.drop_stale_norms()
        return {"multiplier": self.rho, "norms": self.norms, "by_sequence": self.by_sequence}

    def observe(self) -> None:
        """Collect squared gradient norms during the coming backward passes, until `end_observation`."""
        # FSDP puts other parameters in its place, whose gradients go elsewhere after every backward
        self.active.grass_keeps_grad = not distributed.is_sharded(self.active)
        dtype = accumulation_dtype(self.weight.dtype)
        shape = (*self.weight.shape[:-2], self.state.size)
        self.norms = torch.zeros(shape, dtype=dtype, device=self.weight.device, requires_grad=True)

    def end_observation(self) -> Tensor:
        """Stop observing; the squared norms (..., size), zero if no backward reached the layer."""
        norms, self.norms = self.norms, None
        return torch.zeros_like(norms) if norms.grad is None else norms.grad

    def drop_stale_norms(self) -> None:
        """Forget norms whose gradients are gone: GradScaler may skip a step without telling the optimizer."""
        if self.norms is None or self.norms.grad is None or not getattr(self.active, "grass_keeps_grad", False):
            return
        if self.active.grad is None:
            self.norms.grad = None

    @torch.no_grad()
    def write_back(self, seed: str | None = None) -> None:
        """Copy the active slice into the weight; idempotent.

        Args:
            seed: of the draws, to round stochastically; None rounds to nearest. See [Note: rounding].
        """
        part = local_part(self)
        rows = part.active if part.write is None else part.active * along_slice(part.write, self.dim)
        if seed is not None and loses_digits(part.weight.dtype, rows.dtype):
            rows = round_stochastically(rows, part.weight.dtype, seeded(seed + part.place, rows.device))
        if part.write is not None:
            # Padding repeats another row's number, so it must repeat its value.
            rows = take_rows(rows, Selection(part.index).first_positions(self.state.size), self.dim)
        put_rows(part.weight, part.index, rows.to(part.weight.dtype), self.dim)

    @torch.no_grad()
    def settle_decay(self, seed: str | None = None) -> None:
        """Multiply into the rows outside the slice the weight decay they are owed.

        Args:
            seed: of the draws, to round a half-precision weight stochastically; None rounds to nearest.
        """
        if self.state.owed == 1.0:
            return
        part = local_part(self)
        if seed is not None and loses_digits(part.weight.dtype, torch.float32):
            draws = seeded(seed + part.place + ".decay", part.weight.device)
            for rows in part.weight.flatten(0, -2).split(_DECAY_BLOCK):
                rows.copy_(round_stochastically(rows.float() * self.state.owed, part.weight.dtype, draws))
        else:
            part.weight.mul_(self.state.owed)
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
            int64 (..., r) on the CPU: the old position of each row of the new slice, -1 for a fresh row; of this
            rank's part, where the slice is sharded.
        """
        self.settle_decay(seed)
        self.write_back(seed)
        source = selection.positions_in(self.current_selection(), self.state.size)
        old = local_part(self)
        kept, before = old.active.clone(), None if old.write is None else old.write.clone()
        self.index.copy_(selection.index)
        if selection.write is not None:
            self.rho.copy_(selection.rho)
            self.write.copy_(selection.write)
        part = local_part(self)
        source = part.of(source).to(part.active.device)
        values = take_rows(part.weight, part.index, self.dim).to(part.active.dtype)
        rows = take_rows(kept, source.clamp(min=0), self.dim)
        if before is not None:
            rows = rows * along_slice(before.gather(-1, source.clamp(min=0)), self.dim)
        values = torch.where(along_slice(source >= 0, self.dim), rows.to(values.dtype), values)
        if part.write is not None:
            values = values / along_slice(part.write, self.dim)
            values = values.masked_fill(along_slice(part.rho == 0, self.dim), 0.0)
        part.active.copy_(values)
        if seed is not None:
            self.write_back()  # rows that stay are kept at their nearest value
        return source.cpu()

    @torch.no_grad()
    def reload(self) -> None:
        """Bring the slice in line with a weight that was changed from outside, by loading a checkpoint say.

        A slice that already agrees with the weight is left alone: it may hold more digits than the weight.
        """
        part = local_part(self)
        if part.active.is_meta or part.weight.is_meta:
            return
        rows = take_rows(part.weight, part.index, self.dim)
        values, padding = part.active, None
        if part.write is not None:
            values = values * along_slice(part.write, self.dim)
            padding = along_slice(part.rho == 0, self.dim)  # nothing to agree on
        same = values.to(rows.dtype) == rows
        if not bool((same if padding is None else same | padding).all()):
            rows = rows.to(part.active.dtype)
            if part.write is not None:
                rows = (rows / along_slice(part.write, self.dim)).masked_fill(padding, 0.0)
            part.active.copy_(rows)

    def blocks(self) -> int:
        """Number of blocks of the side that choose rows for themselves: a multiple of the shards of the rows."""
        count = self._row_shards()
        return self.state.blocks if self.state.blocks % count == 0 else count

    def check_alignment(self) -> None:
        """Check that every rank's part of the slice holds rows of its own part of the weight.

        Raises:
            ValueError: it does not; every rank finds the same.
        """
        count = self._row_shards()
        if count > 1 and not aligned(self.index.cpu(), self.state.size, count):
            raise ValueError(
                f"{self.state.name}: its {self.state.rank} of {self.state.size} rows do not lie in the {count} shards "
                f"that hold them: convert with row_blocks={count} and a rank that {count} divides, or side='input'."
            )

    def _row_shards(self) -> int:
        """Number of shards among which the selectable rows are split; 1 where every choice is local."""
        return distributed.shards(self.active) if self.dim == -2 and self.index.dim() == 1 else 1

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
        # (A slice on the meta device is being filled: accelerate's cpu_ram_efficient_loading.)
        key = prefix + "active"
        stored = None if self.active.is_meta else state_dict.pop(key, None)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        finally:
            if stored is not None:
                state_dict[key] = stored
        if key in missing_keys:
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        return f"rank={self.state.rank}, side={self.side}"
