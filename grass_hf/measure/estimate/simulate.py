"""Training steps under a counter of live bytes, of fake tensors or of real ones.

The optimizer first makes its state, by a step on gradients of zeros. Then an ordinary step is counted, and for Grass
those that observe and select rows: forward, backward and optimizer step each, as a training loop takes them.
"""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ...config.settings import GrassConfig
from ...convert.conversion import grass_slices, is_converted
from ...optim.driving import controller_of
from ...slices.ops import row_norms, selection
from .fake_ranks import Engine
from .live_bytes import ACTIVATIONS, LOGITS, TEMPORARIES, LiveBytes
from .methods import make_optimizer, make_ready

Loss = Callable[[nn.Module], Tensor]

# Of how many turns of staggered selections a step is simulated.
MOST_TURNS = 4


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
        communication: buckets of DDP; layers that FSDP2 has gathered, and what it is about to send.
        temporaries: all the rest, the batch too.
    """

    weights: int = 0
    slices: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    logits: int = 0
    communication: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak: the sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def enable_checkpointing(model: nn.Module, every: bool | int = True, **options: Any) -> None:
    """Let a model of transformers recompute layers in backward, without reentry unless `use_reentrant=True`.

    Args:
        model: of any version of transformers; version 6 drops the name `gradient_checkpointing_enable`.
        every: True for all of its layers, n for every n-th one, as `every_n_layers` of the Trainer.
        options: further ones of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ValueError: the model or its version of transformers cannot.
    """
    enable = getattr(model, "activation_checkpointing_enable", getattr(model, "gradient_checkpointing_enable", None))
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise ValueError(
            f"gradient_checkpointing={every}, but {type(model).__name__} has none: leave it out, or lower batch "
            "or sequence."
        )
    every = int(every)
    if every > 1 and "every_n_layers" not in inspect.signature(enable).parameters:
        raise ValueError(
            f"gradient_checkpointing={every}, but {type(model).__name__} here has it for all layers only: install a "
            "later transformers, or give True."
        )
    enable({"use_reentrant": False, **options}, **({"every_n_layers": every} if every > 1 else {}))


class Simulation:
    """Training steps of one model under a counter; of fake tensors or of real ones.

    Args:
        live: the counter, entered.
        model: in its dtype; it is changed.
        loss: of the model, a scalar.
        gradient_checkpointing: as in `estimate_memory`.
        engine: that one rank of several runs under; None for a single process.

    Attributes:
        transient: activations, logits and temporaries where their sum was largest, in bytes.
    """

    def __init__(
        self,
        live: LiveBytes,
        model: nn.Module,
        loss: Loss,
        gradient_checkpointing: bool | int = False,
        engine: Engine | None = None,
    ):
        self.live, self.model, self.loss, self.engine = live, model.train(), loss, engine or Engine()
        self.transient: dict[str, int] = {}
        if gradient_checkpointing:
            # the second context is entered where a layer is recomputed
            enable_checkpointing(model, gradient_checkpointing, context_fn=lambda: (nullcontext(), live.forward()))

    def run(
        self, method: str, config: GrassConfig, optimizer: type[torch.optim.Optimizer], args: Mapping[str, Any]
    ) -> tuple[Breakdown, Breakdown | None]:
        """The ordinary step, and of the observing ones that which takes most."""
        self.live.mark([*self.model.parameters(), *self.model.buffers()], "weights")
        config = self.engine.adapt(config, self.model)
        self.model = make_ready(method, self.model, config)
        self.called = self.engine.wrap(self.model)
        self.optimizer = make_optimizer(method, self.model, config, optimizer, args)
        self._mark_model()
        self._make_state()
        step = self._step()
        if method != "grass" or not selection.needs_scores(config.selection):
            return step, None
        return step, max((self._observing_step(turn) for turn in self._turns()), key=lambda found: found.total)

    def _mark_model(self) -> None:
        self.live.mark([*self.model.parameters(), *self.model.buffers()], "weights")
        if is_converted(self.model):
            for slice_ in grass_slices(self.model):
                self.live.mark([slice_.active, slice_.index, slice_.rho, slice_.write, slice_.state.trained], "slices")

    def _make_state(self) -> None:
        """Let the optimizer make its state, by a step that no backward pass is needed for."""
        self._observe_nothing()
        for param in self._trainable():
            param.grad = torch.zeros_like(param)
        with self.live.compiled():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._observe_nothing()
        self._mark_state()

    def _observe_nothing(self) -> None:
        if (controller := getattr(self.optimizer, "grass", None)) is not None:
            controller.due.clear()
            for slice_ in controller.slices:
                slice_.norms = None

    def _turns(self) -> list[int]:
        """Steps of the interval on which slices select; of many those whose layers have the widest inputs, which an
        observation of columns keeps whole. What lives anyway, and when, only a simulation tells."""
        due: Counter[int] = Counter()
        for slice_ in {slice_.state.leader: slice_ for slice_ in controller_of(self.optimizer).slices}.values():
            due[slice_.state.phase] += slice_.state.size if slice_.side == "input" else 0
        return sorted(due, key=lambda phase: (due[phase], phase))[-MOST_TURNS:]

    def _observing_step(self, turn: int) -> Breakdown:
        controller = controller_of(self.optimizer)
        controller.step = controller.config.update_interval + turn
        controller.due.clear()
        controller.look_ahead()
        self._settle_one_of_each()
        return self._step()

    def _settle_one_of_each(self) -> None:
        """Multiply owed decay into one weight of each shape and dtype only.

        It takes thousands of small operations, nine tenths of the time of a simulation, and leaves nothing behind:
        what lives meanwhile is the same for every weight of a shape.
        """
        seen = set()
        for slice_ in controller_of(self.optimizer).slices:
            kind = (slice_.weight.shape, slice_.weight.dtype, slice_.active.dtype)
            if kind in seen:
                slice_.settle_decay = lambda seed=None: None  # type: ignore[method-assign]  # of this one slice
            seen.add(kind)

    def _step(self) -> Breakdown:
        # cycles that wait for the collector would be counted or not by chance
        gc.collect()
        self.live.start()
        with self.live.forward():
            loss = self.loss(self.called)
        with row_norms.norms_by(_norms_of_the_last_blocks):
            loss.backward()
        del loss
        self.live.mark((param.grad for param in self._trainable()), "gradients")
        with self.live.compiled():
            self.optimizer.step()
        self._mark_state()
        self.optimizer.zero_grad()
        most = self.live.most_of((ACTIVATIONS, LOGITS, TEMPORARIES))
        if sum(most.values()) > sum(self.transient.values()):
            self.transient = most
        return Breakdown(**self.live.at_peak())

    def _mark_state(self) -> None:
        if is_converted(self.model):
            for slice_ in grass_slices(self.model):
                self.live.mark((slice_.low, slice_.digest), "slices")
        for state in self.optimizer.state.values():
            self.live.mark(state.values(), "optimizer_state")

    def _trainable(self) -> Iterable[nn.Parameter]:
        return (param for param in self.model.parameters() if param.requires_grad)


def _norms_of_the_last_blocks(a: Tensor, b: Tensor, block: int = row_norms.NORM_BLOCK) -> Tensor:
    """`row_norms.squared_norms` as far as memory goes.

    A whole block and what is left of another run, and what dozens of earlier ones leave behind is there.
    """
    by_rows = a.shape[1] >= b.shape[1]
    longer = a if by_rows else b
    earlier = max(0, -(-longer.shape[1] // block) - 2) * block
    if not by_rows:
        return row_norms.norms_by_columns(a, b[:, earlier:], block)
    done = torch.empty(earlier, dtype=row_norms.accumulation_dtype(a.dtype), device=a.device)
    return torch.cat([done, row_norms.norms_by_rows(a[:, earlier:], b, block)])


def causal_loss(model: nn.Module, batch: int, sequence: int) -> Loss:
    """The loss of a causal language model of transformers on `batch` sequences of random tokens.

    Raises:
        ValueError: the model is something else, or the sequence is longer than it can read.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise ValueError(
            f"{type(model).__name__} has no config.vocab_size, so it is no language model of transformers: give "
            "loss=, a function of the model that returns its loss."
        )
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence > longest:
        raise ValueError(
            f"sequence={sequence} is longer than the model's max_position_embeddings={longest}: give fewer tokens, or "
            "a config with more positions."
        )
    config.use_cache = False
    tokens = torch.randint(vocabulary, (batch, sequence))
    return lambda model: model(input_ids=tokens, labels=tokens).loss


def vocabulary_of(model: nn.Module) -> int | None:
    """Size of a language model's vocabulary, None if it has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


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
