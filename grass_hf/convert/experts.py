"""The experts of a mixture, as transformers 5 keeps them: 3-D parameters behind its experts interface.

A class decorated with ``transformers.integrations.moe.use_experts_implementation`` promises parameters
``gate_up_proj`` or ``up_proj`` (E, 2 I, H) and ``down_proj`` (E, H, I), or both transposed, perhaps ``*_bias``, and
lets a function of ``(module, hidden_states, top_k_index, top_k_weights)`` stand in for its forward. `forward` is such
a function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..slices.ops.sharding import shape_of


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps the promises of the experts interface."""
    if not all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "num_experts", "has_bias")):
        return False
    return bool(parameters(module)) and not getattr(module, "_is_expert_parallel", False)


def parameters(module: nn.Module) -> list[str]:
    """Names of the experts' 3-D weights."""
    names = ("gate_up_proj", "up_proj", "down_proj")
    weights = {name: module._parameters.get(name) for name in names}
    return [name for name, weight in weights.items() if weight is not None and len(shape_of(weight)) == 3]


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Send every token through its experts.

    Args:
        module: the experts; a weight with a slice is tapped, one without takes part in autograd as ever.
        hidden_states: (T, H).
        top_k_index: int64 (T, k), the experts of each token.
        top_k_weights: (T, k).

    Returns:
        (T, H), in the dtype of `hidden_states`.
    """
    k = top_k_index.shape[-1]
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    tokens = torch.bincount(expert, minlength=module.num_experts).tolist()
    y = _product(module, "gate_up_proj" if module.has_gate else "up_proj", hidden_states[order // k], expert, tokens)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _product(module, "down_proj", y, expert, tokens)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    # back to the order of the tokens, then a sum over each token's experts: deterministic, unlike index_add
    y = torch.empty_like(y).index_copy(0, order, y)
    return y.view(-1, k, y.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def trial_input(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Two tokens for two experts each, to try a forward on."""
    weight = getattr(module, "gate_up_proj" if module.has_gate else "up_proj")
    hidden = weight.shape[1 if module.is_transposed else 2]
    states = torch.linspace(-1.0, 1.0, 2 * hidden, device=weight.device).view(2, hidden).to(weight.dtype)
    index = torch.tensor([[0, 1], [1, 0]], device=weight.device) % module.num_experts
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], device=weight.device, dtype=weight.dtype)
    return states, index, weights


def _product(module: Any, name: str, x: Tensor, expert: Tensor, tokens: list[int]) -> Tensor:
    weight, slice_ = getattr(module, name), getattr(module, f"{name}_slice", None)
    if slice_ is not None:
        y = slice_.grouped_linear(x, tokens)
    else:
        matrices = weight.unbind(0)  # one node in the graph, so one gradient of full size and not one per expert
        turned = (lambda w: w) if module.is_transposed else torch.t
        segments = zip(x.to(weight.dtype).split(tokens), matrices, strict=True)
        y = torch.cat([torch.mm(rows, turned(matrix)) for rows, matrix in segments])
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y
