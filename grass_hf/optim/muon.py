"""`MuonAdamW`: Muon over the slices of hidden matrices and PyTorch's AdamW over everything else, as one optimizer.

Muon (K. Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes matrices only, and is meant for hidden ones:
embeddings, norms and heads have AdamW beside it, here also where they are slices. The Trainer wants one optimizer.
Muon keeps a momentum and no second moment, so a slice's state is half of AdamW's.

What is orthogonalised is the slice's momentum, r x n or m x r (of experts, each one's), and not the whole matrix's.

[Note: batches] `torch.optim.Muon` takes one matrix at a time, in some twenty operations. A model has hundreds of
slices, of a few shapes, and a GPU would be done with one before the next operation arrives. So slices of one shape are
orthogonalised together, `BATCH_BYTES` of them at a time, which bounds the temporary copies.

[Note: dtype of the products] Five iterations do not need digits, so accelerators multiply in bfloat16, as PyTorch's
Muon always does. A CPU multiplies in the slice's dtype, float32 at least: many have no bfloat16 arithmetic, and emulate
it at a tenth of the speed or less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..slices.ops.row_norms import accumulation_dtype
from ..slices.ops.sharding import local
from .parameter_groups import GROUP_KEY, VOCABULARY_KEY

# Of slices that are orthogonalised at a time: enough work for each launch, little beside a model.
BATCH_BYTES = 64 * 2**20
# The quintic of Jordan's post, whose slope at zero is as large as can be while singular values stay around one.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_ADJUSTMENTS = (None, "original", "match_rms_adamw")


class MuonAdamW(torch.optim.Optimizer):
    """For `grass_optimizer(model, MuonAdamW, lr=...)`, or ``base=muon`` in the Trainer.

    Args:
        params: of a converted model.
        lr: of both. Muon's updates are scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``).
        betas: of AdamW.
        eps: of AdamW.
        fused: of AdamW.
        weight_decay: of both, decoupled.
        momentum: share of the past in Muon's running mean of gradients, from 0 up to, but not including, 1.
        nesterov: orthogonalise the mean of gradient and running mean instead of the running mean.
        ns_steps: iterations of Newton and Schulz, from 1 to 99.
        adjust_lr_fn: for an update of p x q, "match_rms_adamw" multiplies its rate by 0.2 sqrt(max(p, q)) (Liu et al.
            2025, arXiv 2502.16982), "original" or None by sqrt(max(1, p / q)).

    Raises:
        ValueError: an argument is out of range, or, on the first step, there are no slices of hidden matrices.
    """

    # asks `grass_hf.optim.factory.attach` for groups of their own for the slices of embeddings and heads
    vocabulary_apart = True

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
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum} is out of range: give 0 or more, and less than 1, as 0.95.")
        if not isinstance(ns_steps, int) or not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps={ns_steps} is out of range: give a whole number from 1 to 99, as 5.")
        if adjust_lr_fn not in _ADJUSTMENTS:
            known = ", ".join(map(str, _ADJUSTMENTS))
            raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} is not known: choose one of {known}.")
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "fused": fused}
        # on a parameter of its own, to have it check its arguments and fill in the others
        self._adamw = torch.optim.AdamW([torch.zeros(1)], **both)
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {**self._adamw.defaults, **muon})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        names = ("lr", "betas", "eps", "weight_decay", "fused")
        self._adamw = torch.optim.AdamW([torch.zeros(1)], **{name: self.defaults[name] for name in names})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon: list[dict[str, Any]] = []
        adamw: list[dict[str, Any]] = []
        for group in self.param_groups:
            (muon if GROUP_KEY in group and VOCABULARY_KEY not in group else adamw).append(group)
        if not muon:
            raise ValueError(
                "MuonAdamW has no slices of hidden matrices to orthogonalise and would be AdamW for all: convert the "
                "model first, with such matrices among the targets, and make the optimizer by "
                "grass_optimizer(model, MuonAdamW, ...)."
            )
        for group in muon:
            for batch in _batches(param for param in group["params"] if param.grad is not None):
                self._step_batch(batch, group)
        # the same objects, so that schedulers and checkpoints see one optimizer
        self._adamw.state = self.state
        self._adamw.param_groups = adamw
        self._adamw.step()
        return loss

    def _step_batch(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        """A step of slices that have the same shape, (p, q) or (E, p, q)."""
        grads = [param.grad for param in batch if param.grad is not None]  # all have one
        means = [self._mean(*pair) for pair in zip(batch, grads, strict=True)]
        if batch[0].dim() > 2:  # experts are whole on a rank; a DTensor of unevenly many would have to move
            batch, grads, means = ([local(tensor) for tensor in tensors] for tensors in (batch, grads, means))
        torch._foreach_lerp_(means, grads, 1.0 - group["momentum"])
        updates = torch._foreach_lerp(grads, means, group["momentum"]) if group["nesterov"] else means
        stacked = torch.stack(updates)
        del updates
        stacked = stacked.to(product_dtype(stacked.dtype, stacked.device))
        made = orthogonalised(stacked.flatten(0, -3), group["ns_steps"]).view(stacked.shape).to(batch[0].dtype)
        lr = float(group["lr"])
        if group["weight_decay"]:
            torch._foreach_mul_(batch, 1.0 - lr * group["weight_decay"])
        rows, columns = batch[0].shape[-2:]
        factor = _size_factor(rows, columns, group["adjust_lr_fn"])
        torch._foreach_add_(batch, made.unbind(0), alpha=-lr * factor)

    def _mean(self, param: Tensor, grad: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        return state["momentum_buffer"]


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """Matrices with about the singular vectors of others, and singular values around one.

    Args:
        matrices: (b, p, q), in the dtype of the products.
        steps: iterations, each of which takes a singular value s to a s + b s^3 + c s^5.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which slices of `dtype` are orthogonalised; see [Note: dtype of the products]."""
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return accumulation_dtype(dtype) if device.type == "cpu" or emulated else torch.bfloat16


def _size_factor(rows: int, columns: int, adjustment: str | None) -> float:
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _batches(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that can be stacked, `BATCH_BYTES` of them at a time; see [Note: batches]."""
    alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for param in params:
        alike[param.shape, param.dtype, param.device, getattr(param, "placements", None)].append(param)
    for members in alike.values():
        size = max(1, BATCH_BYTES // max(1, members[0].nbytes))
        for start in range(0, len(members), size):
            yield members[start : start + size]
