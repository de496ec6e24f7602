"""What a slice and its rows must be, checked before the first step and when rows are loaded.

The functions are methods of `grass_hf.slices.slice.Slice`, whose class body names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._subclasses.fake_tensor import FakeTensor

from .ops import int8, sharding
from .ops.selection import aligned

if TYPE_CHECKING:
    from .slice import Slice


def blocks(part: Slice) -> int:
    """Number of blocks of the side that choose rows for themselves: a multiple of the shards of the rows."""
    count = row_shards(part)
    return part.state.blocks if part.state.blocks % count == 0 else count


def check_alignment(part: Slice) -> None:
    """Check that every rank's part of the slice holds rows of its own part of the weight.

    Raises:
        ValueError: it does not; every rank finds the same.
    """
    count = row_shards(part)
    if count > 1 and not aligned(part.index.cpu(), part.state.size, count):
        raise ValueError(
            f"{part.state.name}: its {part.state.rank} of {part.state.size} rows do not lie in the {count} shards "
            f"that hold them: convert with row_blocks={count} and a rank that {count} divides, or side='input'."
        )


def check_rows(part: Slice) -> None:
    """Check that the numbers of the rows are still a set of rows.

    Raises:
        ValueError: they were averaged, as buffers of several models.
    """
    if part.rho is not None or part.index.is_meta or isinstance(part.index, FakeTensor):
        return
    if bool(part.index.sort(dim=-1).values.diff(dim=-1).eq(0).any()):
        raise ValueError(
            f"the rows of the slice of {part.state.name} are no set of rows any more: buffers of several models "
            "were averaged. Call restore_model(model), which keeps the weights, and convert the model again."
        )


def check_sharding(part: Slice) -> None:
    """Check that what cannot be sharded is not: int8 weights, and slices that are to be released.

    Raises:
        ValueError: it is.
    """
    if sharding.is_sharded(part.active) and int8.is_int8(sharding.local(part.weight)):
        raise ValueError(
            f"{part.state.name}: weight_dtype='int8' does not go with sharded parameters: leave it out, or use DDP."
        )
    if not part.resident and sharding.is_sharded(part.active):
        raise ValueError(
            f"{part.state.name}: resident=False does not go with sharded parameters, of which every rank holds its "
            "part already: use resident=True."
        )


def row_shards(part: Slice) -> int:
    """Number of shards among which the selectable rows are split; 1 where every choice is local."""
    return sharding.shards(part.active) if part.dim == -2 and part.index.dim() == 1 else 1
