"""The duty after every optimizer step: write back, and now and then choose other rows.

Per step, with t the optimizer's step count and K the update interval:

    before:  refuse gradients that are not finite
    after:   weight[index] = write * active                            every layer
             owed *= 1 - lr * weight_decay                             every layer, for the rows not trained
             if a layer is due (t = phase, phase + K, ...):
                 scores = sum over ranks and micro-batches of ||G_i||^2, observed during this step's backward
                 load the rows that `selection.select` chooses, remap their optimizer state
             let the layers that are due at t + 1 observe

So the step that observes still trains the old rows. Everything is idempotent or counted by real steps: a step that
GradScaler skipped, or the fake one by which torch.distributed.checkpoint makes optimizer state (learning rate 0,
zero gradients), changes nothing here.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..convert.audit import watching
from ..convert.conversion import describe
from ..convert.record import conversion_of
from ..slices import drift, evaluated
from ..slices.exchange import write_back_all
from ..slices.ops import selection
from ..slices.ops.sharding import check_agreement, forget_residuals, local, world_size
from ..slices.slice import Slice
from . import base_record, driving, guards, rate_warmup, reselection, resume
from .chunked_step import step_in_chunks
from .driving import driving_class, plain_class
from .fresh_moments import Seed, seed_for
from .link import Link
from .owed_decay import owe
from .parameter_groups import GROUP_KEY, LettingGo
from .state_remap import carry_rows


class GrassController(LettingGo):
    """Keeps the slices of one model and one optimizer in step; `grass_hf.optim.factory.attach` makes it.

    Attributes:
        link: to the model.
        optimizer: any `torch.optim.Optimizer` over its trainable parameters, or an engine's that has one inside.
        base: the `torch.optim.Optimizer` itself.
        replicas: process group of the ranks that hold this model, None for all.
        config: the model's `GrassConfig`.
        step: optimizer steps done.
        due: names of the layers that select after the current step.
        is_stepping: whether the optimizer's own step runs now.
        asked: settings with which the optimizer was made, by slice; a checkpoint remembers them.
        following: whether the optimizer's steps count; an engine that takes the optimizer over ends it.
    """

    following = True
    _rates_known = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        replicas: dist.ProcessGroup | None = None,
        *,
        replace: bool = False,
    ):
        if not replace:
            conversion_of(model).refuse_second()
        self.replicas = replicas
        self.optimizer = self.base = optimizer
        self.config = conversion_of(model).config
        self.step = 0
        self.due: set[str] = set()
        self.is_stepping = self._has_stepped = self._has_moved = False
        self.link = Link(conversion_of(model), optimizer)
        self.asked = base_record.asked(self)
        optimizer.__class__ = driving_class(plain_class(optimizer))
        optimizer.grass = self  # type: ignore[attr-defined]  # it is a `Driving` now
        self.look_ahead()

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in vars(self).items() if key not in ("optimizer", "base")}
        # a process group belongs to its process
        return {**kept, "link": copy.copy(self.link), "due": set(self.due), "is_stepping": False, "replicas": None}

    def belongs_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that this is the controller of an optimizer that was copied."""
        self.optimizer = self.base = self.link.optimizer = optimizer

    @property
    def model(self) -> nn.Module | None:
        """The model, None for a copied optimizer whose model was not copied with it."""
        return self.link.model

    @property
    def slices(self) -> list[Slice]:
        """The model's slices; none once `restore_model` was called, or where the model is not known."""
        return self.link.slices

    # -- the step ----------------------------------------------------------------------------------------------

    def follows(self, optimizer: object) -> bool:
        """Whether what is done to an optimizer counts for the slices: an engine may have taken it over.

        A wrapper that imitates the class of the optimizer in it, as Lightning's do, is taken for the optimizer.
        """
        return self.following and (self.optimizer is optimizer or self.optimizer in vars(optimizer).values())

    @torch._disable_dynamo  # in a step that is compiled as well, as torch's own optimizers do for what cannot be
    def around(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Take a step with all that belongs to it; `original` is the optimizer's own.

        Raises:
            RuntimeError: the optimizer does not drive the slices any more, or never did.
        """
        slices = self.slices
        self.link.require()
        with contextlib.ExitStack() as rates:

            def prepare() -> None:
                self._before_step()
                # not before the closure: schedulers, users and freed weights change the rates that are put back
                rates.close()
                factors = rate_warmup.factors(self.config, self.step, self.slices, self.groups)
                rates.enter_context(rate_warmup.changed(factors))

            args, kwargs, makes_gradients = driving.after_closure(prepare, args, kwargs)
            if not makes_gradients:
                prepare()
            self.is_stepping = True
            try:
                if self.config.resident:
                    result = original(*args, **kwargs)
                else:
                    result = step_in_chunks(self.optimizer, original, slices, *args, **kwargs)
            finally:
                self.is_stepping = False
        self._after_step()
        return result

    # -- the optimizer's other methods -------------------------------------------------------------------------

    def saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict with what Grass remembers."""
        return resume.add(state_dict, self) if self.slices else state_dict

    def loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take up what Grass remembers; the rest is for the optimizer.

        Raises:
            RuntimeError: the optimizer was copied without its model.
        """
        slices = self.slices
        if self.link.conversion is None:
            self.link.require()
        return resume.restore(state_dict, self) if slices else state_dict

    def loaded(self, state_dict: dict[str, Any]) -> None:
        """Follow the loading of a state dict."""
        if self.slices:
            base_record.keep_dtypes(state_dict, resume.read_meta(state_dict["param_groups"]), self)

    def forget_norms(self) -> None:
        """Drop the norms observed so far in this step, with the gradients that they belong to."""
        for slice_ in self.slices:
            if slice_.norms is not None:
                slice_.norms.grad = None

    def metrics(self) -> dict[str, float]:
        """``grass/coverage`` and ``grass/energy``, see `reselection.metrics`."""
        return reselection.metrics(self.slices, self.config, self.step)

    def settle(self) -> None:
        """Multiply in all weight decay that rows are owed: the end of training."""
        for slice_ in self.slices:
            evaluated.follow_edited(slice_)
            slice_.settle_decay(self._rounding_seed(slice_))

    # -- before the step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self) -> None:
        slices = self.slices
        for slice_ in () if self._has_stepped else slices:
            slice_.settle_unfilled()
            slice_.check_alignment()
            slice_.check_sharding()
        drift.check_step(slices)
        guards.check_any_reached(slices, self.parameters(), self.step, self._reached)
        if not self._has_stepped:
            guards.check_replicas(self.link.driven, self.replicas)
            weights = guards.int8_weights(slices) if world_size(self.replicas) > 1 else ""
            said = f"step={self.step}; {describe(self.link.driven)}; {weights}"
            check_agreement("the first step", said, group=self.replicas)
            guards.check_each_reached(slices, self.step, self._reached, self.model)
        if slices and self.step < 2 and not self._rates_known:
            self._rates_known = guards.check_rates(self.optimizer.param_groups, self.config.scale, self.asked)
        self._check_finite(slices)

    # -- after the step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_step(self) -> None:
        slices = self.slices
        if not self._was_real(slices):
            self.look_ahead()  # forget what a skipped step observed
            return
        if not self._has_stepped:
            self._has_stepped = True
            watching.stepped(self.link.driven)
        groups = self.groups()
        self._has_moved = self._has_moved or guards.check_moved(self.optimizer, slices, self.step)
        self._write_back(slices)
        owe(slices, groups, self.config.decay == "all")
        self._select([slice_ for slice_ in slices if slice_.state.name in self.due], groups)
        self.step += 1
        self.look_ahead()

    def _was_real(self, slices: list[Slice]) -> bool:
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return False
        if any(group["lr"] is None or group["lr"] > 0 for group in self.optimizer.param_groups):
            return any(slice_.active.grad is not None for slice_ in slices)
        return any(bool(local(slice_.active.grad).any()) for slice_ in slices if slice_.active.grad is not None)

    def _select(self, due: list[Slice], groups: dict[int, dict]) -> None:
        """Load new rows into the slices that are due; one that could not be observed stays due."""
        if due:
            watching.watch_again_if_changed(self.link.driven)
        for slice_ in due:
            slice_.mark_trained(reselection.turn_of(self.config, self.step))
        moved = False
        for slice_, chosen, norms2 in reselection.choose(due, self.config, self.step, self.replicas):
            seed = seed_for(slice_, chosen, norms2) if self.config.state_policy == "carry_seeded" else None
            source = slice_.load_selection(chosen, self._rounding_seed(slice_))
            moved |= bool((source < 0).any())
            if self.config.state_policy.startswith("carry"):
                self._carry_state(slice_, source, groups[id(slice_.active)], seed)
            else:
                self._drop_state(slice_, groups[id(slice_.active)])
                slice_.state.reset_step = self.step
            self.due.discard(slice_.state.name)
        if moved:
            forget_residuals()

    def look_ahead(self) -> None:
        """Let the layers that are due after the coming step observe its backward passes."""
        until = math.inf if self.config.select_until is None else self.config.select_until
        scored = selection.needs_scores(self.config.selection)
        phase = self.step % self.config.update_interval if self.step < until else None
        for slice_ in self.slices:
            state = slice_.state
            if state.phase == phase:
                self.due.add(state.name)
            if scored and state.name in self.due:
                slice_.observe()
            elif slice_.norms is not None:
                slice_.norms = None

    # -- what an engine with a step of its own does in its own way ----------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def stepped_dtype(self, param: nn.Parameter) -> torch.dtype:
        """The dtype of what the optimizer steps over for a parameter."""
        return param.dtype

    def groups(self) -> dict[int, dict[str, Any]]:
        """The parameter group of each slice, by the id of its parameter."""
        return {id(p): group for group in self.optimizer.param_groups if GROUP_KEY in group for p in group["params"]}

    def _reached(self, param: nn.Parameter) -> bool:
        return guards.has_gradient(param)

    def _check_finite(self, slices: list[Slice]) -> None:
        if not hasattr(self.optimizer, "found_inf"):  # else GradScaler decides, inside the fused step
            guards.check_finite(slices, self.step)

    def _write_back(self, slices: list[Slice]) -> None:
        write_back_all(slices)

    def _carry_state(self, slice_: Slice, source: Tensor, group: dict[str, Any], seed: Seed | None) -> None:
        state = self.optimizer.state.get(slice_.active, {})
        carry_rows(state, local(slice_.active).shape, slice_.dim, source, group, slice_.state.name, seed)

    def _drop_state(self, slice_: Slice, group: dict[str, Any]) -> None:
        self.optimizer.state.pop(slice_.active, None)
