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


def blocks(slice_: Slice) -> int:
    """Number of blocks of the side that choose rows for themselves: a multiple of the shards of the rows."""
    count = row_shards(slice_)
    return slice_.state.blocks if slice_.state.blocks % count == 0 else count


def check_alignment(slice_: Slice) -> None:
    """Check that every rank's part of the slice holds rows of its own part of the weight.

    Raises:
        ValueError: it does not; every rank finds the same.
    """
    count = row_shards(slice_)
    if count > 1 and not aligned(slice_.index.cpu(), slice_.state.size, count):
        raise ValueError(
            f"{slice_.state.name}: its {slice_.state.rank} of {slice_.state.size} rows do not lie in the {count} "
            f"shards that hold them: convert with row_blocks={count} and a rank that {count} divides, or side='input'."
        )


def check_rows(slice_: Slice) -> None:
    """Check that the numbers of the rows are still a set of rows.

    Raises:
        ValueError: they were averaged, as buffers of several models.
    """
    if slice_.rho is not None or slice_.index.is_meta or isinstance(slice_.index, FakeTensor):
        return
    if bool(slice_.index.sort(dim=-1).values.diff(dim=-1).eq(0).any()):
        raise ValueError(
            f"the rows of the slice of {slice_.state.name} are no set of rows any more: buffers of several models "
            "were averaged. Call restore_model(model), which keeps the weights, and convert the model again."
        )


def check_sharding(slice_: Slice) -> None:
    """Check that what cannot be sharded is not: int8 weights, and slices that are to be released.

    Raises:
        ValueError: it is.
    """
    if sharding.is_sharded(slice_.active) and int8.is_int8(sharding.local(slice_.weight)):
        raise ValueError(
            f"{slice_.state.name}: weight_dtype='int8' does not go with sharded parameters: leave it out, or use DDP."
        )
    if not slice_.resident and sharding.is_sharded(slice_.active):
        raise ValueError(
            f"{slice_.state.name}: resident=False does not go with sharded parameters, of which every rank holds its "
            "part already: use resident=True."
        )


def row_shards(slice_: Slice) -> int:
    """Number of shards among which the selectable rows are split; 1 where every choice is local."""
    return sharding.shards(slice_.active) if slice_.dim == -2 and slice_.index.dim() == 1 else 1
