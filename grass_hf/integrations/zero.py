"""ZeRO-1, 2 and 3: a controller that follows DeepSpeed's step instead of the optimizer's.

[Note: what ZeRO takes over] `deepspeed.initialize` flattens the optimizer's parameters group by group and splits the
flat vectors over the ranks, as float32 masters that it steps the optimizer over, group by group. From then on

* the step that counts is that of DeepSpeed's optimizer: it decides whether to step, and gathers the new parameters
  after the optimizer's own step;
* gradients leave ``.grad`` in backward, so hooks note which parameters one has reached;
* a slice's values with all digits, and its optimizer state, lie in pieces on several ranks. DeepSpeed's ``safe_get``
  functions bring them together for slices that select anew, and ``safe_set`` functions take them apart again;
* under ZeRO-3 the frozen weight lies in pieces too (`slices.ops.flat_runs`). After a step every rank gathers the
slice, r x n,
  and overwrites the elements of its own run; when a slice selects, what all runs hold of the new rows is added up. No
  weight is gathered but for forward and backward.

Checkpoints: DeepSpeed writes masters and optimizer state itself; the rest travels in its ``client_state``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import utils as masters
from deepspeed import zero
from torch import Tensor, nn

from ..convert.conversion import grass_slices
from ..convert.modules import GrassModule
from ..optim import guards, resume
from ..optim.controller import GrassController
from ..optim.fresh_moments import Seed
from ..optim.state_remap import carry_rows
from ..slices.ops.grouping import groups_by_size
from ..slices.ops.row_norms import accumulation_dtype
from ..slices.ops.sharding import is_partitioned, shape_of
from ..slices.slice import Slice
from .zero_checkpoint import check_files, read_client_state
from .zero_parts import rank_part, set_master

CLIENT_KEY = "grass"
# Elements of slices that ZeRO-3 gathers at a time to write them back.
_GATHERED_AT_A_TIME = 2**26


class ZeroController(GrassController):
    """Takes the slices of a model over from the controller of the optimizer that DeepSpeed has taken over.

    Args:
        previous: controller of the base optimizer.
        engine: what `deepspeed.initialize` returned.

    Attributes:
        base: the optimizer that steps over masters.
        engine: DeepSpeed's.
    """

    def __init__(self, previous: GrassController, engine):
        self.engine, base, model = engine, previous.optimizer, previous.model
        assert model is not None  # DeepSpeed was given it
        if engine.optimizer.optimizer is not base:
            raise ValueError(
                f"DeepSpeed made another optimizer of {type(base).__name__}, which does not drive the Grass slices: "
                "use base=adamw_torch, or another one that it steps as it is."
            )
        self._place = {id(p): flat for flat in _layout(engine.optimizer) for p in flat.params}
        self._seen: set[int] = set()
        for param in model.parameters():
            if id(param) in self._place:
                param.register_hook(functools.partial(self._see, id(param)))
        for module in model.modules():
            if isinstance(module, GrassModule):
                _fetch_slices_with(module)
        for slice_ in grass_slices(model):
            slice_.rank_part = rank_part
            if slice_.rho is not None and slice_.write is not None:  # DeepSpeed casts all buffers to the weights' dtype
                dtype = accumulation_dtype(slice_.active.dtype)
                slice_.rho, slice_.write = slice_.rho.to(dtype), slice_.write.to(dtype)
        super().__init__(model, engine.optimizer, previous.replicas, replace=True)
        self._follow_checkpoints()
        self.base, self.asked = base, previous.asked
        base.grass = self

    # -- the engine's step --------------------------------------------------------------------------------------

    def _see(self, number: int, _: Tensor) -> None:
        self._seen.add(number)

    def _reached(self, param: nn.Parameter) -> bool:
        return id(param) in self._seen

    def parameters(self) -> list[nn.Parameter]:
        return [] if self.model is None else [p for p in self.model.parameters() if id(p) in self._place]

    def stepped_dtype(self, param: nn.Parameter) -> torch.dtype:
        place = self._place.get(id(param))  # none of the flat ones that DeepSpeed steps
        return param.dtype if place is None else place.values.dtype

    def groups(self) -> dict[int, dict[str, Any]]:
        # looked up every time, because loading a state puts other dicts in the groups' places
        groups = self.base.param_groups
        return {id(slice_.active): groups[self._place[id(slice_.active)].group] for slice_ in self.slices}

    def _was_real(self, slices: list[Slice]) -> bool:
        return not getattr(self.optimizer, "overflow", False) and any(self._reached(slice_.active) for slice_ in slices)

    def _after_step(self) -> None:
        super()._after_step()
        self._seen.clear()

    def _check_finite(self, slices: list[Slice]) -> None:
        if getattr(self.optimizer, "check_grad_overflow", False) or self.engine.fp16_enabled():
            return  # DeepSpeed skips the step
        numbers = {self._place[id(slice_.active)].number for slice_ in slices}
        grads = [grad for number in numbers for grad in _gradients(self.optimizer, number)]
        bad = torch.zeros(1, device=self.engine.device)
        if grads and not bool(torch.nn.utils.get_total_norm(grads).isfinite()):
            bad += 1
        dist.all_reduce(bad)
        if not bool(bad):
            return
        for slice_ in slices:
            grad = masters.safe_get_full_grad(slice_.active)
            if grad is not None and not bool(grad.isfinite().all()):
                raise guards.not_finite(slice_.state.name, self.step)

    def _write_back(self, slices: list[Slice]) -> None:
        for chunk in groups_by_size(slices, _elements, _GATHERED_AT_A_TIME):
            with zero.GatheredParameters([slice_.active for slice_ in chunk if is_partitioned(slice_.active)]):
                super()._write_back(chunk)

    # -- optimizer state ----------------------------------------------------------------------------------------

    def _state_keys(self, slice_: Slice) -> list[str]:
        """Names of the optimizer state that is stored per element of the slice.

        Raises:
            ValueError: some is stored in another way.
        """
        flat = self._place[id(slice_.active)]
        state = self.base.state.get(flat.values, {})
        if not is_partitioned(slice_.active):
            # DeepSpeed looks it up once, after the step of the first group, before the others have any
            masters.lazy_init_hp_params_optimizer_state(flat.params, flat.values, self.base.state)
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
        for key, value in tensors.items():
            if value.shape != flat.values.shape or not value.is_floating_point():
                raise ValueError(
                    f"{type(self.base).__name__} keeps {key!r} of shape {tuple(value.shape)} and {value.dtype} for "
                    f"{flat.values.numel()} elements, which cannot be carried from row to row under ZeRO: use an "
                    "optimizer with state per element (adamw_torch, lion_32bit, sgd), FSDP2 or DDP."
                )
        return list(tensors)

    def _carry_state(self, slice_: Slice, source: Tensor, group: dict[str, Any], seed: Seed | None) -> None:
        for key in self._state_keys(slice_):
            values = masters.safe_get_full_optimizer_state(slice_.active, key)
            carry_rows({key: values}, values.shape, slice_.dim, source, group, slice_.state.name, seed)
            set_master(slice_.active, values, key)

    def _drop_state(self, slice_: Slice, group: dict[str, Any]) -> None:
        self._carry_state(slice_, torch.full(slice_.index.shape, -1), group, None)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _follow_checkpoints(self) -> None:
        save, load = self.engine.save_checkpoint, self.engine.load_checkpoint

        @functools.wraps(save)
        def save_checkpoint(save_dir, tag=None, client_state=None, *args, **kwargs):
            asked = inspect.signature(save).bind(save_dir, tag, client_state, *args, **kwargs).arguments
            asked["client_state"] = {**(client_state or {}), CLIENT_KEY: resume.remember(self)}
            # the weights of slices are frozen, and trained: a Trainer leaves frozen ones out for adapters
            asked.pop("exclude_frozen_parameters", None)
            return save(**asked)

        @functools.wraps(load)
        def load_checkpoint(load_dir, tag=None, *args, **kwargs):
            asked = inspect.signature(load).bind(load_dir, tag, *args, **kwargs).arguments
            if asked.get("load_module_only") or not asked.get("load_optimizer_states", True):
                raise ValueError(
                    "load_checkpoint without optimizer states would leave the Grass slices without their rows: load "
                    "the saved model with from_pretrained, and convert it."
                )
            check_files(self.engine, load_dir, tag)
            resume.check_remembered(read_client_state(self.engine, load_dir, tag).get(CLIENT_KEY), self)
            path, client_state = load(load_dir, tag, *args, **kwargs)
            if path is not None:
                resume.recall(client_state.pop(CLIENT_KEY, None), self)
                for slice_ in self.slices:
                    held = rank_part(slice_, True)
                    held.keep(held.active)
            return path, client_state

        self.engine.save_checkpoint, self.engine.load_checkpoint = save_checkpoint, load_checkpoint
        for name in ("module_state_dict", "_zero3_consolidated_16bit_state_dict"):
            setattr(self.engine, name, self._plain(getattr(self.engine, name)))

    def _plain(self, collect: Callable[..., dict[str, Any] | None]) -> Callable[..., dict[str, Any] | None]:
        """One of DeepSpeed's functions that make a state dict, without slices, which its collector of ZeRO-3 finds
        because it walks parameters, and with the weights under them, which are frozen and trained."""

        @functools.wraps(collect)
        def plain(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
            asked = inspect.signature(collect).bind(*args, **kwargs).arguments
            leave_out = asked.pop("exclude_frozen_parameters", False)
            found, names = collect(**asked), _names(self.engine.module)
            if found is None:  # only the first rank has it
                return None
            for name, kind in names.items():
                if kind == "slice" or (leave_out and kind == "frozen"):
                    found.pop(name, None)
            return found

        return plain


def _names(model: nn.Module) -> dict[str, str]:
    """What each parameter is: "slice", "frozen" by the user, or "trained", by its slice or itself."""
    parts = list(grass_slices(model))
    slices, weights = ({id(getattr(slice_, name)) for slice_ in parts} for name in ("active", "weight"))
    named = model.named_parameters(remove_duplicate=False)
    kinds = {True: "trained", False: "frozen"}
    return {
        name: "slice" if id(param) in slices else kinds[param.requires_grad or id(param) in weights]
        for name, param in named
    }


@dataclass(frozen=True)
class _Flat:
    """A flat vector of masters.

    Attributes:
        number: its own.
        group: number of its parameter group.
        values: this rank's part of it, which the optimizer steps over.
        params: the parameters that it holds the masters of.
    """

    number: int
    group: int
    values: Tensor
    params: list[nn.Parameter]


def _layout(optimizer) -> list[_Flat]:
    """The flat vectors of DeepSpeed's optimizer: one per parameter group, several under ZeRO-3."""
    groups = None
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        found = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        groups = optimizer.sub_group_to_group_id
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
        found = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    else:  # ZeRO-1 with bfloat16 weights and float32 gradients
        found = zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
    return [_Flat(n, groups[n] if groups else n, values, params) for n, (values, params) in enumerate(found)]


def _gradients(optimizer, number: int) -> list[Tensor]:
    """This rank's part of the gradients of a flat vector of masters."""
    if hasattr(optimizer, "averaged_gradients"):
        return [grad for grad in optimizer.averaged_gradients.get(number) or () if grad is not None]
    return [optimizer.fp32_groups_gradient_flat_partition[number]]


def _fetch_slices_with(module: GrassModule) -> None:
    """ZeRO-3 gathers a module's own parameters before its forward: let slices be among them."""
    for slice_ in module.own_slices().values():
        if is_partitioned(slice_.active):
            zero.register_external_parameter(module, slice_.active)


def _elements(slice_: Slice) -> int:
    return shape_of(slice_.active).numel()
