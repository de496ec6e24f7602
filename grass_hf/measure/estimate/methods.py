"""Training methods side by side: what each trains, and with which optimizer state.

    grass      the slices of the targets, and the ordinary parameters
    adamw      everything
    frozen     everything but the targets: the limit that Grass approaches at small ranks
    lora       PEFT's adapters of the targets, of the same rank and in the dtype of slices; nothing else
    adamw8bit  everything, with the state of bitsandbytes' AdamW8bit
    galore     everything; of each target the state is computed: 2 r max(m, n) for the moments, r min(m, n) for the
               projector, in the weight's dtype (arXiv 2403.03507, Table 1; galore_torch's "std" projection)
    apollo     the same without a stored projector, which APOLLO draws from a seed: 2 r max(m, n) (arXiv 2412.05270)

The last two are not run: their optimizers decompose and multiply real gradients on the side. A stand-in allocates
their state, and their temporaries in the step are left out, in their favour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...config.fields import unknown_key
from ...config.settings import GrassConfig
from ...convert.conversion import convert_to_grass
from ...convert.dtypes import slice_dtype
from ...convert.targets import Target, plan
from ...optim.factory import grass_optimizer

METHODS = ("grass", "adamw", "frozen", "lora", "adamw8bit", "galore", "apollo")
# Methods whose optimizer state is allocated by formula, without running their optimizer.
COMPUTED = ("galore", "apollo")

_ADAMW: dict[str, Any] = {"lr": 1e-4, "fused": True}


def check_method(method: str) -> None:
    """Refuse an unknown method, or one whose package is missing, with a sentence."""
    if method not in METHODS:
        raise ValueError(f"method={unknown_key(method, METHODS, 'a method that can be estimated')}")
    if method == "adamw8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise ValueError(
                "method='adamw8bit' runs bitsandbytes' optimizer, which is not installed: pip install bitsandbytes, "
                "or leave the method out."
            ) from None


def make_ready(method: str, model: nn.Module, config: GrassConfig) -> nn.Module:
    """Make a model ready for a method, in place where possible.

    Args:
        method: one of `METHODS`.
        model: a plain model.
        config: the targets, and the rank or density of all methods that have one.
    """
    if method == "grass":
        convert_to_grass(model, config)
    elif method == "frozen":
        for target in plan(model, config).targets:
            getattr(target.module, target.parameter).requires_grad_(False)
    elif method == "lora":
        model = _with_adapters(model, config)
    return model


def make_optimizer(
    method: str,
    model: nn.Module,
    config: GrassConfig,
    optimizer_class: type[torch.optim.Optimizer],
    optimizer_args: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """The optimizer of a model that is ready, and sharded if it is to be.

    Args:
        method, model, config: as for `make_ready`.
        optimizer_class: of grass, frozen and lora; the others have their own.
        optimizer_args: its arguments.
    """
    if method == "grass":
        return grass_optimizer(model, optimizer_class, **optimizer_args)
    params = [p for p in model.parameters() if p.requires_grad]
    if method in ("frozen", "lora"):
        return optimizer_class(params, **optimizer_args)
    if method == "adamw":
        return torch.optim.AdamW(params, **_ADAMW)
    if method == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=1e-4)
    targets = {id(getattr(target.module, target.parameter)): target for target in plan(model, config).targets}
    return _StandIn(params, lambda p: _low_rank_state(method, p, targets.get(id(p))))


def default_optimizer_args(optimizer_class: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """The arguments with which an optimizer is made if none are given: fused AdamW, as the Trainer's default."""
    return dict(_ADAMW) if optimizer_class is torch.optim.AdamW else {"lr": 1e-4}


def _with_adapters(model: nn.Module, config: GrassConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = plan(model, config).targets
    for target in targets:
        if target.parameter != "weight":
            raise ValueError(f"method='lora' has no adapters for {target.name}, a tensor of experts: leave it out.")
    ranks = {target.name: target.rank for target in targets}
    settings = LoraConfig(r=max(ranks.values()), target_modules=list(ranks), rank_pattern=ranks)
    # PEFT casts adapters by swapping tensors, which fake ones refuse: they are made without memory and filled here
    first: nn.Parameter = getattr(targets[0].module, targets[0].parameter)
    dtype = slice_dtype(first.dtype, config)
    with unset_fake_temporarily():
        model = get_peft_model(model, settings, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.device.type == "meta":
                module._parameters[name] = nn.Parameter(torch.zeros(param.shape, dtype=dtype))
    return model


def _low_rank_state(method: str, param: nn.Parameter, target: Target | None) -> list[torch.Size]:
    if target is None or param.dim() != 2:
        return [param.shape, param.shape]
    shorter, longer = sorted(param.shape)
    rank = min(target.rank, shorter)
    projector = [(rank, shorter)] if method == "galore" else []
    return [torch.Size(shape) for shape in [(rank, longer), (rank, longer), *projector]]


class _StandIn(torch.optim.Optimizer):
    """Allocates the state that an optimizer would have, and does nothing else."""

    def __init__(self, params: list[nn.Parameter], shapes: Callable[[nn.Parameter], list[torch.Size]]):
        super().__init__(params, {})
        self.shapes = shapes

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss, whatever is given
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    made = [param.new_zeros(shape) for shape in self.shapes(param)]
                    self.state[param] = {str(number): tensor for number, tensor in enumerate(made)}
