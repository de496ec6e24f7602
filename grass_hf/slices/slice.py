"""The active slice: the small trainable parameter beside a frozen weight.

[Note: the active slice] The full weight stays in the plain module, frozen. Beside it lives one small trainable
parameter, ``active``, with the invariant ``weight[index] = write * active`` (columns for the other side). By the
chain rule its gradient is Grass's C = P^T G, so any optimizer, scheduler, scaler, DDP or clipping that works on
parameters works on it unchanged; after the optimizer's step `write_back` copies it into the weight.

A weight of experts, (E, m, n), is E matrices in one tensor: its slice is (E, r, n) or (E, m, r), its index (E, r),
and every expert selects for itself. What moves between weight and slice is in `grass_hf.slices.exchange`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import checks, drift, exchange
from .changes import Changes
from .doors import Doors
from .drift import Drift
from .evaluated import check_after_evaluation
from .frozen_weight import FrozenWeight
from .matrices import Matrices
from .ops import int8, sharding, tap
from .ops.double_backward import refuse_transforms
from .ops.grouped_linear import grouped_linear
from .ops.products import Layout
from .ops.row_norms import accumulation_dtype
from .ops.rows import selected_dim, take_rows
from .ops.selection import strided
from .ops.shared_columns import SharedColumns
from .ops.tapped_linear import tapped_linear
from .part import Part, SliceState, local_part

# Of which `linear` knows all that happens to them; fake ones are an estimator's.
_PLAIN = frozenset({Tensor, nn.Parameter, FrozenWeight, FakeTensor})
_LIVING: weakref.WeakSet[Slice] = weakref.WeakSet()
_made = 0


def slices_made() -> int:
    """How many slices this process has made so far."""
    return _made


def living_slices() -> Iterator[Slice]:
    """The slices of all models of this process."""
    return iter(list(_LIVING))


class Slice(Doors):
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
        by_sequence: what norms are of, see `ops.tap.tap`.
        resident: whether the slice stays in memory between steps, see [Note: released slices] in `slices.exchange`.
        vocabulary: whether the weight is an embedding, or the head, or both.

    Attributes:
        active: Parameter, (..., r, n) for side "output", (..., m, r) for "input", or transposed as the weight is.
        index: int64 buffer (..., r), not persistent.
        rho, write: float buffers (..., r), not persistent; None unless the rule draws with replacement.
        drift: what it knows of the last moment when it and its weight held the same values.
        changes: what was written into the weight, while somebody keeps track of it (`grass_hf.WeightDelta`).
        norms: the leaf (..., size) that collects squared norms while an observation is due, else None.
        dim: -2 or -1, the dimension of weight and slice along which rows (columns) are selected.
        before: what the weight was before, `surgery.Before`.
        rank_part: says what this rank has of the weight and the slice; `slice_.local_part`, or an engine's own.
    """

    owner: nn.Module
    before: Any
    index: Tensor
    rho: Tensor | None
    write: Tensor | None

    # what moves values
    held, hold, release = exchange.held, exchange.hold, exchange.release
    changes: Changes | None = None
    write_back = exchange.write_back
    settle_decay = exchange.settle_decay
    load_selection, current_selection = exchange.load_selection, exchange.current_selection
    take_new_weight, reload = exchange.take_new_weight, exchange.reload
    follow_edit = exchange.follow_edit
    mark_trained = exchange.mark_trained
    # what is checked
    blocks = checks.blocks
    check_alignment, check_rows, check_sharding = checks.check_alignment, checks.check_rows, checks.check_sharding

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
        resident: bool = True,
        vocabulary: bool = False,
    ):
        super().__init__()
        # not registered: the owner is the parent
        self.__dict__["owner"] = owner
        self.parameter = parameter
        self.side = side
        self.transposed = transposed
        self.dim = selected_dim(side, transposed)
        self.rank_part: Callable[[Slice, bool], Part] = local_part
        weight = self.weight
        size, batch = weight.shape[self.dim], weight.shape[:-2]
        index, multipliers = strided(size, rank, blocks).index.expand(*batch, rank).clone(), None
        if weighted:
            multipliers = torch.ones(*batch, rank, dtype=accumulation_dtype(dtype or weight.dtype))
        buffers = {"index": index, "rho": multipliers, "write": multipliers}
        self._kept = {key: values for key, values in buffers.items() if weight.is_meta and values is not None}
        for key, values in buffers.items():
            placed = None if values is None else values.to(weight.device, copy=True)
            self.register_buffer(key, placed, persistent=False)
        if int8.is_int8(weight):
            rows = int8.read_rows(weight, self.index)
        else:
            rows = take_rows(weight.detach(), self.index, self.dim)
        self.active = nn.Parameter(rows.to(dtype or weight.dtype))
        self.norms: Tensor | None = None
        trained = torch.full((*batch, size), -1, dtype=torch.int32)
        self.columns = columns
        self.by_sequence = by_sequence
        self.resident = resident
        self.vocabulary = vocabulary
        self.state = SliceState(name, size, rank, phase, leader or name, blocks, trained=trained)
        self.drift = Drift()
        self._register()

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.norms is not None:
            # as gradients are: a copy has none yet
            self.norms = torch.zeros_like(self.norms, requires_grad=True)
            active: Any = self.active
            active.grass_keeps_grad = self.rank_part is local_part
        self._register()

    def _register(self) -> None:
        global _made
        _made += 1
        _LIVING.add(self)

    @property
    def weight(self) -> nn.Parameter:
        """The full weight, (..., m, n) or as it is stored."""
        return getattr(self.owner, self.parameter)

    @property
    def is_released(self) -> bool:
        """Whether the slice has no memory of its own now."""
        return not self.resident and self.active.stride() == (0,) * self.active.dim()

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor | None:
        """`ops.tapped_linear.tapped_linear` of this weight, or None where product and tap cannot be one.

        They are in training forward passes that nothing observes, of plain tensors.
        """
        active: Any = self._parameters["active"]
        if (
            self.norms is not None
            or type(weight) not in _PLAIN
            or type(x) not in _PLAIN
            or type(active) not in _PLAIN
            or not torch.is_grad_enabled()
            or self.rank_part is not local_part
            or torch.compiler.is_compiling()
        ):
            return None
        refuse_transforms()
        drift.check_plain_pass(self, active, weight)
        if nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            sharding.refuse_join()
        # of a weight that is an embedding's too, `side` is what the embedding calls it
        buffers: dict[str, Any] = self._buffers
        side = "output" if self.dim == -2 else "input"
        return tapped_linear(x, weight, bias, active, buffers["index"], buffers["rho"], self.columns, side=side)

    def tap(self, y: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        """`ops.tap.tap` for a product ``y`` of this weight, which this use of it may see transposed."""
        if not torch.is_grad_enabled():
            check_after_evaluation(self)
            return y
        extras, index = self._extras(), self.index
        side = "output" if self.dim == selected_dim("output", transposed) else "input"
        gathers = side == "input" and self.norms is None and not torch.compiler.is_compiling()
        if gathers and self.columns is not None:
            extras["columns"] = self.columns.gather(x, index, y.dtype)
        return tap.tap(y, x, self.active, index, side=side, transposed=transposed, **extras)

    def embedding_tap(self, y: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """`ops.tap.embedding_tap` for rows of this weight."""
        if not torch.is_grad_enabled():
            check_after_evaluation(self)
            return y
        return tap.embedding_tap(y, ids, self.active, self.index, padding_idx=padding_idx, **self._extras())

    def grouped_linear(self, x: Tensor, tokens: list[int]) -> Tensor:
        """`ops.grouped_linear.grouped_linear` with this weight of experts."""
        extras = self._extras()
        extras.pop("by_sequence")  # tokens come sorted by expert, their sequences are not known any more
        placed: dict[str, Any] = {"side": self.side, "transposed": self.transposed}
        return grouped_linear(x, self.weight, tokens, self.active, self.index, **placed, **extras)

    def matrices(self, layout: Layout) -> Matrices:
        """This slice by the matrices that another's forward multiplies with, see `grass_hf.slices.ops.products`."""
        extras = self._extras()
        extras.pop("by_sequence")  # which tokens an expert sees says nothing about their sequences
        return Matrices(self.active, self.index, dim=self.dim, layout=layout, **extras)

    def _extras(self) -> dict[str, Any]:
        if not torch.compiler.is_compiling():
            refuse_transforms()
            look = drift.check_pass if torch.is_grad_enabled() else check_after_evaluation
            look(self)
            self.drop_stale_norms()
            self._move_norms()
            sharding.refuse_join()
        return {"multiplier": self.rho, "norms": self.norms, "by_sequence": self.by_sequence}

    def observe(self) -> None:
        """Collect squared gradient norms during the coming backward passes, until `end_observation`."""
        # Engines that shard put other parameters in its place, or take gradients away after every backward.
        active: Any = self.active
        active.grass_keeps_grad = self.rank_part is local_part and not sharding.is_sharded(self.active)
        dtype = accumulation_dtype(self.weight.dtype)
        shape = (*self.index.shape[:-1], self.state.size)
        self.norms = torch.zeros(shape, dtype=dtype, device=self.index.device, requires_grad=True)

    def end_observation(self) -> Tensor:
        """Stop observing; the squared norms (..., size), zero if no backward reached the layer."""
        norms, self.norms = self.norms, None
        assert norms is not None  # `observe` was called
        return torch.zeros_like(norms) if norms.grad is None else norms.grad

    def drop_stale_norms(self) -> None:
        """Forget norms whose gradients are gone: GradScaler may skip a step without telling the optimizer."""
        if self.norms is None or self.norms.grad is None or not getattr(self.active, "grass_keeps_grad", False):
            return
        if self.active.grad is None:
            self.norms.grad = None

    def _move_norms(self) -> None:
        """Have norms that are observed where the slice is: a model may move, and no parameter of it are they."""
        norms = self.norms
        if norms is None or norms.device == (device := self.index.device):
            return
        self.observe()
        if self.norms is not None and norms.grad is not None and not norms.is_meta:
            self.norms.grad = norms.grad.to(device)

    def extra_repr(self) -> str:
        return f"rank={self.state.rank}, side={self.side}"
