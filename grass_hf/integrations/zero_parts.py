"""Weights and slices in pieces: what one rank holds of them under ZeRO, and how values come together and go apart.

Under ZeRO-1 and 2 a slice's master and its optimizer state are in pieces, under ZeRO-3 the weight and the slice too.
Pieces are read with DeepSpeed's ``safe_get`` functions, which every rank must call, and written with ``safe_set``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from deepspeed import utils as masters
from deepspeed import zero
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from ..slices.ops.flat_runs import Run
from ..slices.ops.rounding import loses_digits, round_stochastically
from ..slices.ops.rows import put_rows, take_rows
from ..slices.ops.selection import seeded
from ..slices.ops.sharding import is_partitioned
from ..slices.part import Part
from ..slices.slice import Slice

# A parameter with what DeepSpeed puts on it, `ds_tensor` and others.
ZeroParameter: TypeAlias = Any
# Elements of a run that are converted to float32 at a time, to multiply decay into a half-precision weight.
_DECAYED_AT_A_TIME = 2**20


def rank_part(slice_: Slice, exact: bool = False) -> Part:
    """What this rank holds of a slice and its weight; as `part.local_part`.

    Args:
        slice_: the slice.
        exact: want the values of its float32 master; every rank must ask for the same.
    """
    weight: ZeroParameter = slice_.weight
    active: ZeroParameter = slice_.active
    values = masters.safe_get_full_fp32_param(active) if exact else active.data
    rest = (slice_.index, slice_.rho, slice_.write, slice_.dim, "")
    if not is_partitioned(weight):
        return _Replicated(weight.data, values, *rest, owner=slice_)
    if not exact:
        values = _whole(active)
    own = weight.ds_tensor.data.view(-1)
    run = Run(own, dist.get_rank(weight.ds_process_group) * own.numel(), weight.ds_shape)
    return _Partitioned(own, values, *rest, owner=slice_, run=run)


@dataclass
class _Replicated(Part):
    """ZeRO-1 and 2: every rank has the weight and the slice, the slice's master is in pieces."""

    owner: Slice = field(kw_only=True)

    def keep(self, values: Tensor) -> None:
        self.owner.active.data.copy_(values)
        set_master(self.owner.active, values)


@dataclass
class _Partitioned(Part):
    """ZeRO-3: the weight is in pieces too; ``active``, rows that are taken and rows that are put are whole.

    Small weights stay gathered between their uses: what changes here changes there.
    """

    owner: Slice = field(kw_only=True)
    run: Run = field(kw_only=True)

    def take(self) -> Tensor:
        if _is_whole(self.owner.weight):
            return take_rows(self.owner.weight.data, self.index, self.dim)
        rows = self.run.take(self.index, self.dim)
        dist.all_reduce(rows)
        return rows

    is_plain = False

    def stored(self) -> Tensor:
        return self.run.take(self.index, self.dim)

    def put(self, rows: Tensor, seed: str | None = None) -> None:
        rows = rows.to(self.weight.dtype)
        self.run.put(self.index, rows, self.dim)
        if _is_whole(self.owner.weight):
            put_rows(self.owner.weight.data, self.index, rows, self.dim)

    def keep(self, values: Tensor) -> None:
        param: ZeroParameter = self.owner.active
        param.ds_tensor.data.view(-1).copy_(_own_run(param, values))
        if _is_whole(param):
            param.data.copy_(values)
        set_master(param, values)

    def decay(self, factor: float, seed: str | None) -> None:
        weight: ZeroParameter = self.owner.weight
        if _is_whole(weight):
            weight.partition()  # gathered again when it is used next
        if seed is None or not loses_digits(self.weight.dtype, torch.float32):
            self.weight.mul_(factor)
            return
        draws = seeded(f"{seed}.{self.run.start}.decay", self.weight.device)
        for values in self.weight.split(_DECAYED_AT_A_TIME):
            values.copy_(round_stochastically(values.float() * factor, self.weight.dtype, draws))


def _is_whole(param: ZeroParameter) -> bool:
    return param.ds_status == ZeroParamStatus.AVAILABLE


def _whole(param: nn.Parameter) -> Tensor:
    if _is_whole(param):
        return param.data
    with zero.GatheredParameters([param]):
        return param.data.clone()


def _own_run(param: ZeroParameter, values: Tensor) -> Tensor:
    """The elements of a whole parameter that this rank keeps under ZeRO-3, padded to the length of all runs."""
    length = param.ds_tensor.numel()
    own = values.new_zeros(length)
    start = dist.get_rank(param.ds_process_group) * length
    elements = values.reshape(-1)[start : start + length]
    own[: elements.numel()] = elements
    return own


def set_master(param: nn.Parameter, values: Tensor, key: str | None = None) -> None:
    """Overwrite the master of a slice, or some of its optimizer state; every rank its own part of it."""
    if is_partitioned(param):  # safe_set_full_* would run past the end where runs are padded
        own = _own_run(param, values)
        if key is None:
            masters.safe_set_local_fp32_param(param, own)
        else:
            masters.safe_set_local_optimizer_state(param, own, key)
    elif key is None:
        masters.safe_set_full_fp32_param(param, values)
    else:
        masters.safe_set_full_optimizer_state(param, values, key)
