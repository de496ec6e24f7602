"""What moves between a weight and its active slice: loading, writing back, decay, and other rows.

[Note: rounding] A slice may hold more digits than its weight (float32 over bfloat16). While a row is being trained
the weight is its nearest value, so copying is idempotent. When the row leaves, what is below half a unit in the last
place of the weight would be lost; rounding up or down at random, with the probabilities that make the mean exact,
lets it arrive in the mean. The draws depend on (seed, step, name) alone, so resuming repeats them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .drift import Drift
from .ops import int8, sharding
from .ops.rounding import loses_digits, round_stochastically
from .ops.rows import along_slice, take_rows
from .ops.selection import Selection, aligned, seeded
from .part import Part, SliceState
from .released import Released


class Exchange(Released):
    """The part of `grass_hf.slices.slice.Slice` that moves values; its attributes are described there."""

    weight: nn.Parameter
    active: nn.Parameter
    index: Tensor
    rho: Tensor | None
    write: Tensor | None
    dim: int
    rank_part: Callable[[Exchange, bool], Part]
    state: SliceState
    drift: Drift

    @torch.no_grad()
    def write_back(self, seed: str | None = None) -> None:
        """Copy the active slice into the weight; idempotent. A released one is there already.

        Args:
            seed: of the draws, to round stochastically; None rounds to nearest. See [Note: rounding].
        """
        if self.is_released:
            return
        part = self.rank_part(self, seed is not None)
        rows = part.active if part.write is None else part.active * along_slice(part.write, self.dim)
        if seed is not None and loses_digits(part.weight.dtype, rows.dtype):
            rows = round_stochastically(rows, part.weight.dtype, seeded(seed + part.place, rows.device))
        if part.write is not None:
            # Padding repeats another row's number, so it must repeat its value.
            rows = take_rows(rows, Selection(part.index).first_positions(self.state.size), self.dim)
        part.put(rows, seed)
        self.drift.note(self)

    @torch.no_grad()
    def settle_decay(self, seed: str | None = None) -> None:
        """Multiply into the rows outside the slice the weight decay they are owed.

        Args:
            seed: of the draws, to round a half-precision weight stochastically; None rounds to nearest.
        """
        if self.state.owed == 1.0:
            return
        with self.held():
            self.rank_part(self, False).decay(self.state.owed, seed)
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
        with self.held():
            return self._load_selection(selection, seed)

    def _load_selection(self, selection: Selection, seed: str | None) -> Tensor:
        self.settle_decay(seed)
        self.write_back(seed)
        source = selection.positions_in(self.current_selection(), self.state.size)
        old = self.rank_part(self, True)
        kept, before = old.active.clone(), None if old.write is None else old.write.clone()
        self.index.copy_(selection.index)
        if selection.write is not None:
            self.rho.copy_(selection.rho)
            self.write.copy_(selection.write)
        part = self.rank_part(self, False)
        source = part.of(source).to(kept.device)
        values = part.take().to(kept.dtype)
        rows = take_rows(kept, source.clamp(min=0), self.dim)
        if before is not None:
            rows = rows * along_slice(before.gather(-1, source.clamp(min=0)), self.dim)
        values = torch.where(along_slice(source >= 0, self.dim), rows.to(values.dtype), values)
        if part.write is not None:
            values = values / along_slice(part.write, self.dim)
            values = values.masked_fill(along_slice(part.rho == 0, self.dim), 0.0)
        part.keep(values)
        if seed is not None:
            self.write_back()  # rows that stay are kept at their nearest value
        self.drift.note(self)
        return source.cpu()

    def take_new_weight(self) -> None:
        """Follow a weight that a state dict has replaced: what its rows were owed is void, unless that was loaded just
        before, as torch.distributed.checkpoint does, which loads the optimizer first."""
        if not self.state.recalled:
            self.state.owed = 1.0
            self.low = None  # the bits belonged to other numbers
        self.reload()

    @torch.no_grad()
    def reload(self) -> None:
        """Bring the slice in line with a weight that was changed from outside, by loading a checkpoint say.

        A slice that already agrees with the weight is left alone: it may hold more digits than the weight.
        """
        if self.is_released or sharding.is_partitioned(self.weight):
            return  # of a partitioned one every rank would have to join; DeepSpeed loads slices itself
        part = self.rank_part(self, False)
        if part.active.is_meta or part.weight.is_meta:
            return
        if part.agrees():
            self.drift.note(self)
            return
        part.keep(part.loaded(part.active.dtype))
        self.drift.note(self)

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

    def check_rows(self) -> None:
        """Check that the numbers of the rows are still a set of rows.

        Raises:
            ValueError: they were averaged, as buffers of several models.
        """
        if self.rho is not None or self.index.is_meta or isinstance(self.index, FakeTensor):
            return
        if bool(self.index.sort(dim=-1).values.diff(dim=-1).eq(0).any()):
            raise ValueError(
                f"the rows of the slice of {self.state.name} are no set of rows any more: buffers of several models "
                "were averaged. Call restore_model(model), which keeps the weights, and convert the model again."
            )

    def check_sharding(self) -> None:
        """Check that what cannot be sharded is not: int8 weights, and slices that are to be released.

        Raises:
            ValueError: it is.
        """
        if sharding.is_sharded(self.active) and int8.is_int8(sharding.local(self.weight)):
            raise ValueError(
                f"{self.state.name}: weight_dtype='int8' does not go with sharded parameters: leave it out, or use DDP."
            )
        if not self.resident and sharding.is_sharded(self.active):
            raise ValueError(
                f"{self.state.name}: resident=False does not go with sharded parameters, of which every rank holds its "
                "part already: use resident=True."
            )

    def _row_shards(self) -> int:
        """Number of shards among which the selectable rows are split; 1 where every choice is local."""
        return sharding.shards(self.active) if self.dim == -2 and self.index.dim() == 1 else 1

    def current_selection(self) -> Selection:
        """The rows in the slice now, on the CPU."""
        rho, write = (None if v is None else v.double().cpu() for v in (self.rho, self.write))
        return Selection(self.index.cpu(), rho, write)

    def mark_trained(self, turn: int) -> None:
        """Note that the rows in the slice have been trained in a turn."""
        self.state.trained.scatter_(-1, self.index.cpu(), turn)
