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

import functools
import math
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import base_record, checkpoint, guards, reselect, selection, warmup
from .convert import describe, grass_slices
from .distributed import check_agreement, local, world_size
from .remap import carry_rows
from .seeding import Seed, seed_for
from .slices import Slice
from .stepping import step_in_chunks

# A parameter group that holds slices carries this key; its value is the phase of its layers, or -1 for any.
GROUP_KEY = "grass_phase"
# Beside it, in a group of slices of embeddings and heads where they are stepped as ordinary parameters are.
VOCABULARY_KEY = "grass_vocabulary"


class GrassController:
    """Keeps the slices of one model and one optimizer in step; `grass_hf.optim.attach` makes it.

    Attributes:
        model: the converted model.
        optimizer: any `torch.optim.Optimizer` over its trainable parameters, or an engine's that has one inside.
        base: the `torch.optim.Optimizer` itself.
        replicas: process group of the ranks that hold this model, None for all.
        config: the model's `GrassConfig`.
        step: optimizer steps done.
        due: names of the layers that select after the current step.
        asked: settings with which the optimizer was made, by slice; a checkpoint remembers them.
        following: whether the optimizer's steps count; an engine that takes the optimizer over ends it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, replicas: dist.ProcessGroup | None = None):
        self.model, self.replicas = model, replicas
        self.optimizer = self.base = optimizer
        self.config = model.grass.config
        self.step = 0
        self.due: set[str] = set()
        self.following = True
        self._has_stepped = False
        self._slices_of: Any = None
        self._slices: list[Slice] = []
        self.asked = base_record.asked(self)
        self._follow_step()
        self._follow_zero_grad()
        self._follow_state()
        self.look_ahead()

    def _follow_step(self) -> None:
        # Wrapped rather than hooked: a subclass whose step calls super().step() would run step hooks twice.
        original = self.optimizer.step

        @functools.wraps(original)
        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.following:
                return original(*args, **kwargs)
            self._before_step()
            with warmup.changed(self._rate_factors(self.slices)):
                if self.config.resident:
                    result = original(*args, **kwargs)
                else:
                    result = step_in_chunks(self.optimizer, original, self.slices, *args, **kwargs)
            self._after_step()
            return result

        # a bound method, because learning rate schedulers wrap it again and look for one
        self.optimizer.step = types.MethodType(step, self.optimizer)

    def _follow_zero_grad(self) -> None:
        # Norms observed belong to the gradients: a step whose gradients are dropped must not leave its norms behind.
        original = self.optimizer.zero_grad

        def zero_grad(_: torch.optim.Optimizer, set_to_none: bool = True) -> None:
            original(set_to_none=set_to_none)  # accelerate looks for this argument's name
            self.forget_norms()

        self.optimizer.zero_grad = types.MethodType(zero_grad, self.optimizer)

    def _follow_state(self) -> None:
        def add(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return checkpoint.add(state_dict, self) if self.following else state_dict

        self.optimizer.register_state_dict_post_hook(add)
        # Wrapped rather than hooked: bitsandbytes replaces load_state_dict and runs no hooks.
        load = self.optimizer.load_state_dict

        @functools.wraps(load)
        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            load(checkpoint.restore(state_dict, self) if self.following else state_dict, *args, **kwargs)

        self.optimizer.load_state_dict = load_state_dict

    @property
    def slices(self) -> list[Slice]:
        """The model's slices; none once `restore_model` was called."""
        conversion = getattr(self.model, "grass", None)
        if self._slices_of is not conversion:  # a walk over all modules, some times in every step
            self._slices_of, self._slices = conversion, list(grass_slices(self.model))
        return self._slices

    def forget_norms(self) -> None:
        """Drop the norms observed so far in this step, with the gradients that they belong to."""
        for part in self.slices:
            if part.norms is not None:
                part.norms.grad = None

    def metrics(self) -> dict[str, float]:
        """``grass/coverage``: share of all rows trained so far; ``grass/energy``: share of the squared gradient
        norm that the selected rows held when they were selected, absent before the first observation."""
        trained = total = 0
        held = seen = 0.0
        for layer in self.slices:
            if self.step:
                layer.mark_trained(reselect.turn_of(self.config, self.step))
            trained += int((layer.state.trained >= 0).sum())
            total += layer.state.trained.numel()
            if layer.state.energy is not None:
                held += layer.state.energy[0]
                seen += layer.state.energy[1]
        metrics = {"grass/coverage": trained / total if total else 0.0}
        if seen > 0:
            metrics["grass/energy"] = held / seen
        return metrics

    def settle(self) -> None:
        """Multiply in all weight decay that rows are owed: the end of training."""
        for layer in self.slices:
            layer.settle_decay(self._rounding_seed(layer))

    # -- before the step ---------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        layers = self.slices
        if not layers:  # restore_model was called
            return
        guards.check_any_reached(layers, self.parameters(), self.step, self._reached)
        if not self._has_stepped:
            guards.check_replicas(self.model, self.replicas)
            weights = guards.int8_weights(layers) if world_size(self.replicas) > 1 else ""
            said = f"step={self.step}; {describe(self.model)}; {weights}"
            check_agreement("the first step", said, group=self.replicas)
            guards.check_each_reached(layers, self.step, self._reached)
            for part in layers:
                part.check_alignment()
                part.check_sharding()
        self._check_finite(layers)

    def _rate_factors(self, layers: list[Slice]) -> list[warmup.Factor]:
        """What the coming step's learning rates are multiplied with."""
        found: list[warmup.Factor] = []
        if layers and self.step < self.config.scale_warmup:
            scaled = [group for group in self.groups().values() if VOCABULARY_KEY not in group]
            found += warmup.after_start(self.config.scale_warmup, self.step, scaled)
        if self.config.state_policy == "reset_warmup":
            found += warmup.after_reset(self.config, self.step, layers, self.groups())
        return found

    # -- after the step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_step(self) -> None:
        layers = self.slices
        if not self._was_real(layers):
            self.look_ahead()  # forget what a skipped step observed
            return
        self._has_stepped = True
        groups = self.groups()
        self._write_back(layers)
        for layer in layers:
            self._owe_decay(layer, groups[id(layer.active)])
        self._select([layer for layer in layers if layer.state.name in self.due], groups)
        self.step += 1
        self.look_ahead()

    def _was_real(self, layers: list[Slice]) -> bool:
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return False
        grads = [layer.active.grad for layer in layers if layer.active.grad is not None]
        if any(group["lr"] is None or group["lr"] > 0 for group in self.optimizer.param_groups):
            return bool(grads)
        return any(bool(local(grad).any()) for grad in grads)

    def _owe_decay(self, layer: Slice, group: dict[str, Any]) -> None:
        state = layer.state
        state.recalled = False
        decay = group.get("weight_decay") or 0.0
        if decay and self.config.decay == "all" and (state.rank < state.size or layer.rho is not None):
            state.owed *= 1.0 - float(group["lr"]) * float(decay)

    def _select(self, due: list[Slice], groups: dict[int, dict]) -> None:
        """Load new rows into the slices that are due; one that could not be observed stays due."""
        for part in due:
            part.mark_trained(reselect.turn_of(self.config, self.step))
        for part, chosen, norms2 in reselect.choose(due, self.config, self.step, self.replicas):
            seed = seed_for(part, chosen, norms2) if self.config.state_policy == "carry_seeded" else None
            source = part.load_selection(chosen, self._rounding_seed(part))
            if self.config.state_policy.startswith("carry"):
                self._carry_state(part, source, groups[id(part.active)], seed)
            else:
                self._drop_state(part, groups[id(part.active)])
                part.state.reset_step = self.step
            self.due.discard(part.state.name)

    def _rounding_seed(self, part: Slice) -> str | None:
        if self.config.rounding == "nearest":
            return None
        return f"{self.config.seed}:{self.step}:{part.state.name}:rounding"

    def look_ahead(self) -> None:
        """Let the layers that are due after the coming step observe its backward passes."""
        until = math.inf if self.config.select_until is None else self.config.select_until
        scored = selection.needs_scores(self.config.selection)
        for layer in self.slices:
            state = layer.state
            if self.step % self.config.update_interval == state.phase and self.step < until:
                self.due.add(state.name)
            if scored and state.name in self.due:
                layer.observe()
            elif layer.norms is not None:
                layer.norms = None

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

    def _check_finite(self, layers: list[Slice]) -> None:
        if not hasattr(self.optimizer, "found_inf"):  # else GradScaler decides, inside the fused step
            guards.check_finite(layers, self.step)

    def _write_back(self, layers: list[Slice]) -> None:
        for layer in layers:
            layer.write_back()

    def _carry_state(self, part: Slice, source: Tensor, group: dict[str, Any], seed: Seed | None) -> None:
        state = self.optimizer.state.get(part.active, {})
        carry_rows(state, local(part.active).shape, part.dim, source, group, part.state.name, seed)

    def _drop_state(self, part: Slice, group: dict[str, Any]) -> None:
        self.optimizer.state.pop(part.active, None)
