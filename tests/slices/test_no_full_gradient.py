"""No m x n gradient ever exists: a dispatch mode sees every tensor made in backward and in the optimizer's step."""

import pytest
import torch
from allocations import Allocations
from torch import nn
from torch.utils.checkpoint import checkpoint

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices.ops import row_norms

# Sizes whose products no other tensor has.
TOKENS, WIDTHS = 7, (61, 83, 53)
FULL = {61 * 83, 83 * 53}


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.Tanh(), nn.Linear(WIDTHS[1], WIDTHS[2]))


def sizes_in_step(model, optimizer, checkpointed=None):
    """Sizes of all tensors made in one step's backward and update; `checkpointed` is ``use_reentrant`` or None."""
    x = torch.randn(TOKENS, WIDTHS[0], requires_grad=True)
    y = model(x) if checkpointed is None else checkpoint(model, x, use_reentrant=checkpointed)
    mode = Allocations()
    mode.weights = frozenset(
        module.weight.untyped_storage().data_ptr() for module in model if hasattr(module, "weight")
    )
    with mode:
        y.square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return mode.sizes


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("rule", ["top_r", "multinomial_norm", "uniform_nr"])
def test_no_tensor_of_full_size_on_any_step(monkeypatch, side, checkpointed, rule):
    monkeypatch.setattr(
        row_norms.squared_norms, "__defaults__", (16,)
    )  # blocks as far below m as 256 is in a real model
    model = stack()
    convert_to_grass(model, GrassConfig(density=0.25, update_interval=3, stagger=1, side=side, selection=rule))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    for step in range(7):
        observing = [layer.norms is not None for layer in grass_slices(model)]
        assert all(observing) == (step % 3 == 0 and rule != "uniform_nr")
        sizes = sizes_in_step(model, optimizer, checkpointed)
        assert not sizes & FULL, f"step {step}"
        assert max(sizes) < min(FULL)


def test_the_mode_sees_the_full_gradient_of_an_ordinary_model():
    model = stack()
    assert sizes_in_step(model, torch.optim.AdamW(model.parameters(), foreach=False)) >= FULL


def test_input_side_keeps_only_selected_columns_for_backward():
    def saved_elements(side):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        convert_to_grass(model, GrassConfig(density=0.25, side=side, selection="uniform_nr"))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(torch.randn(10, 64))
        return sum(t.numel() for t in kept if t.is_floating_point())

    assert saved_elements("output") == 10 * 64
    assert saved_elements("input") == 10 * 16
