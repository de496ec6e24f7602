"""`MuonAdamW`: PyTorch's Muon over the slices and its AdamW over everything else, as one optimizer.

Muon takes matrices only, and is meant for hidden ones: embeddings, norms and heads have AdamW beside it. The Trainer
wants one optimizer. Muon keeps a momentum and no second moment, so a slice's state is half of AdamW's.

What is orthogonalised is the slice's momentum, r x n or m x r, and not the whole matrix's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .controller import GROUP_KEY


class MuonAdamW(torch.optim.Optimizer):
    """For `grass_optimizer(model, MuonAdamW, lr=...)`, or ``base=muon`` in the Trainer.

    Args:
        params: of a converted model.
        lr: of both. Muon's updates are scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``).
        betas, eps, fused: of AdamW.
        weight_decay: of both, decoupled.
        momentum, nesterov, ns_steps, adjust_lr_fn: of Muon, as in `torch.optim.Muon`.

    Raises:
        ValueError: an argument is out of range, PyTorch has no Muon yet (before 2.9), a slice is no matrix (experts),
            or, on the first step, there are no slices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        fused: bool | None = None,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon: install torch 2.9 or newer, or use AdamW.")
        both = {"lr": lr, "weight_decay": weight_decay}
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        # each on a parameter of its own, to have it check its arguments and fill in the others
        self._muon = torch.optim.Muon([torch.zeros(1, 1)], **both, **muon)
        self._adamw = torch.optim.AdamW([torch.zeros(1)], **both, betas=betas, eps=eps, fused=fused)
        super().__init__(params, {**self._muon.defaults, **self._adamw.defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if GROUP_KEY in param_group:
            for slice_ in param_group["params"]:
                if slice_.dim() != 2:
                    raise ValueError(
                        f"MuonAdamW orthogonalises matrices, and a slice of shape {tuple(slice_.shape)} holds those of "
                        "several experts: leave experts out by exclude_modules, or use AdamW."
                    )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slices = [group for group in self.param_groups if GROUP_KEY in group]
        if not slices:
            raise ValueError(
                "MuonAdamW has no slices to orthogonalise and would be AdamW for all: convert the model first, and "
                "make the optimizer by grass_optimizer(model, MuonAdamW, ...)."
            )
        others = [group for group in self.param_groups if GROUP_KEY not in group]
        for inner, groups in ((self._muon, slices), (self._adamw, others)):
            # the same objects, so that schedulers and checkpoints see one optimizer
            inner.state, inner.param_groups = self.state, groups
            inner.step()
        return loss
