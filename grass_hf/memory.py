"""`estimate_memory`: the peak of live tensor bytes of a training step, simulated without allocating anything.

The real model class, the real conversion and the real optimizer run under torch's `FakeTensorMode`, in which tensors
have shapes and no memory, while `LiveBytes` counts what would live. After an optimizer step that makes the state,
two steps are counted: an ordinary one, and for Grass one that observes and selects rows. The larger peak is the peak.

Counted are tensors. What comes on top of them on a device: the allocator's rounding and fragmentation, what kernels
allocate inside themselves, and the driver's context.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)

from . import selection
from .config import GrassConfig
from .convert import grass_slices, is_converted
from .live import LiveBytes
from .methods import COMPUTED, check_method, default_optimizer_args, prepare

_DTYPES = ("float32", "bfloat16", "float16", "float64")

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Breakdown:
    """Bytes that live at the peak of one step, by what they are.

    Attributes:
        weights: parameters and buffers of the model, adapters included.
        slices: active slices, their indices and multipliers.
        gradients: what is in some parameter's ``.grad`` by the end of backward.
        optimizer_state: tensors of ``optimizer.state``.
        activations: what a forward pass, or a recomputation under gradient checkpointing, leaves for backward.
        logits: tensors with the vocabulary as last dimension, and their gradients.
        temporaries: all the rest.
    """

    weights: int = 0
    slices: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak: the sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate_memory` found, in bytes.

    Attributes:
        method: grass, adamw, frozen, lora, adamw8bit, galore or apollo.
        step: at the peak of an ordinary step.
        observing: at the peak of a step that observes gradient norms and selects rows; None for other methods and
            for selection rules that never observe.
        computed: whether the optimizer's state was allocated by formula instead of running the optimizer.
    """

    method: str
    step: Breakdown
    observing: Breakdown | None
    computed: bool

    @property
    def at_peak(self) -> Breakdown:
        """The step with the larger peak."""
        return max((s for s in (self.step, self.observing) if s is not None), key=lambda s: s.total)

    @property
    def peak(self) -> int:
        """Bytes at the larger peak."""
        return self.at_peak.total


def estimate_memory(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    config: GrassConfig | None = None,
    *,
    method: str = "grass",
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    optimizer_args: Mapping[str, Any] | None = None,
    batch: int = 1,
    sequence: int = 256,
    dtype: str | None = None,
    gradient_checkpointing: bool = False,
    loss: Loss | None = None,
) -> MemoryEstimate:
    """Simulate training steps and count the bytes of live tensors at the peak; nothing is allocated.

    Args:
        model_or_factory: a model, which is left as it is, or a function that makes one: called with fake tensors
            as the default, so import what it needs before.
        config: settings of Grass; its targets and its rank serve the other methods too. None takes the defaults.
        method: "grass", "adamw", "frozen" (targets frozen), "lora" (same rank and targets), "adamw8bit", "galore"
            or "apollo" (optimizer state computed, see `grass_hf.methods`).
        optimizer: class of grass, frozen and lora.
        optimizer_args: of that class; None means fused AdamW, or the learning rate alone for another class.
        batch: sequences per step.
        sequence: tokens per sequence, none of them padding.
        dtype: of the parameters, "bfloat16" say; None keeps the model's.
        gradient_checkpointing: recompute layers in backward, without reentry.
        loss: the scalar loss of a model; None means a causal language model of transformers on random tokens.

    Returns:
        A `MemoryEstimate`, in bytes.

    Raises:
        ValueError: a setting is out of range or does not fit the model, or what it does depends on values of
            tensors (experts that tokens choose), which fake tensors do not have.
    """
    config = config or GrassConfig()
    check_method(method)
    for name, value in (("batch", batch), ("sequence", sequence)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive whole number: give 1 or more.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(_DTYPES)}.")
    if optimizer_args is None:
        optimizer_args = default_optimizer_args(optimizer)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            model = _fake_model(model_or_factory, mode, dtype)
            loss = loss or causal_loss(model, batch, sequence)
            with LiveBytes(_vocabulary(model)) as live:
                simulated = Simulation(live, model, loss, gradient_checkpointing)
                step, observing = simulated.run(method, config, optimizer, optimizer_args)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{type(model).__name__} decides by the values of tensors ({error.func}), which a simulation does not "
            "have: its memory cannot be estimated."
        ) from error
    return MemoryEstimate(method, step, observing, method in COMPUTED)


class Simulation:
    """Training steps of one model under a counter; of fake tensors or of real ones.

    Args:
        live: the counter, entered.
        model: in its dtype; it is changed.
        loss: of the model, a scalar.
        gradient_checkpointing: as in `estimate_memory`.
    """

    def __init__(self, live: LiveBytes, model: nn.Module, loss: Loss, gradient_checkpointing: bool = False):
        self.live, self.model, self.loss = live, model.train(), loss
        if gradient_checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable", None)
            if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
                raise ValueError(
                    f"gradient_checkpointing=True, but {type(model).__name__} has none: leave it out, or lower batch "
                    "or sequence."
                )
            # the second context is entered where a layer is recomputed
            contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), live.forward())}
            enable(gradient_checkpointing_kwargs=contexts)

    def run(
        self, method: str, config: GrassConfig, optimizer: type[torch.optim.Optimizer], args: Mapping[str, Any]
    ) -> tuple[Breakdown, Breakdown | None]:
        """The ordinary step and the observing one."""
        self.live.mark([*self.model.parameters(), *self.model.buffers()], "weights")
        self.model, self.optimizer = prepare(method, self.model, config, optimizer, args)
        self._mark_model()
        self._make_state()
        step = self._step()
        if method != "grass" or not selection.needs_scores(config.selection):
            return step, None
        self._let_observe()
        return step, self._step()

    def _mark_model(self) -> None:
        self.live.mark([*self.model.parameters(), *self.model.buffers()], "weights")
        if is_converted(self.model):
            for part in grass_slices(self.model):
                self.live.mark([part.active, part.index, part.rho, part.write, part.state.trained], "slices")

    def _make_state(self) -> None:
        """Let the optimizer make its state, by a step that no backward pass is needed for."""
        self._observe_nothing()
        for param in self._trainable():
            param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._observe_nothing()
        self._mark_state()

    def _observe_nothing(self) -> None:
        if (controller := getattr(self.optimizer, "grass", None)) is not None:
            controller.due.clear()
            for part in controller.slices:
                part.norms = None

    def _let_observe(self) -> None:
        """Go to a step at which slices are due: with staggered ones, the step with most bytes of weights due."""
        controller = self.optimizer.grass
        due: Counter[int] = Counter()
        for part in controller.slices:
            due[part.state.phase] += part.weight.nbytes
        controller.step = controller.config.update_interval + due.most_common(1)[0][0]
        controller.due.clear()
        controller.look_ahead()
        self._settle_one_of_each()

    def _settle_one_of_each(self) -> None:
        """Multiply owed decay into one weight of each shape and dtype only.

        It takes thousands of small operations, nine tenths of the time of a simulation, and leaves nothing behind:
        what lives meanwhile is the same for every weight of a shape.
        """
        seen = set()
        for part in self.optimizer.grass.slices:
            kind = (part.weight.shape, part.weight.dtype, part.active.dtype)
            if kind in seen:
                part.settle_decay = lambda seed=None: None
            seen.add(kind)

    def _step(self) -> Breakdown:
        # cycles that wait for the collector would be counted or not by chance
        gc.collect()
        self.live.start()
        with self.live.forward():
            loss = self.loss(self.model)
        loss.backward()
        del loss
        self.live.mark((param.grad for param in self._trainable()), "gradients")
        self.optimizer.step()
        self._mark_state()
        self.optimizer.zero_grad()
        return Breakdown(**self.live.at_peak())

    def _mark_state(self) -> None:
        for state in self.optimizer.state.values():
            self.live.mark(state.values(), "optimizer_state")

    def _trainable(self) -> Iterable[nn.Parameter]:
        return (param for param in self.model.parameters() if param.requires_grad)


def causal_loss(model: nn.Module, batch: int, sequence: int) -> Loss:
    """The loss of a causal language model of transformers on `batch` sequences of random tokens.

    Raises:
        ValueError: the model is something else, or the sequence is longer than it can read.
    """
    vocabulary = _vocabulary(model)
    if vocabulary is None:
        raise ValueError(
            f"{type(model).__name__} has no config.vocab_size, so it is no language model of transformers: give "
            "loss=, a function of the model that returns its loss."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence > longest:
        raise ValueError(
            f"sequence={sequence} is longer than the model's max_position_embeddings={longest}: give fewer tokens, or "
            "a config with more positions."
        )
    model.config.use_cache = False
    tokens = torch.randint(vocabulary, (batch, sequence))
    return lambda model: model(input_ids=tokens, labels=tokens).loss


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _fake_model(
    model_or_factory: nn.Module | Callable[[], nn.Module], mode: FakeTensorMode, dtype: str | None
) -> nn.Module:
    if isinstance(model_or_factory, nn.Module):
        with FakeCopyMode(mode):
            model = copy.deepcopy(model_or_factory)
    else:
        model = model_or_factory()
    return model if dtype is None else cast_parameters(model, getattr(torch, dtype))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model's parameters another dtype, in place; ties stay, and buffers keep theirs, as in from_pretrained."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_floating_point() and param.dtype != dtype:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
                module._parameters[name] = made[id(param)]
    return model
