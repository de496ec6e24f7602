"""What the tests that need a GPU share: where they run, a model of exact arithmetic, and runs to compare.

Without a GPU they are skipped; GRASS_TEST_DEVICE=cpu runs on the CPU what can be run there, to debug them.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, said before torch is used

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCABULARY, assert_same_weights, tiny_llama
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices

DEVICE = "cuda" if torch.cuda.is_available() else os.environ.get("GRASS_TEST_DEVICE", "")
ON_CPU = DEVICE != "cuda"
needs_device = pytest.mark.skipif(not DEVICE, reason="needs a GPU; GRASS_TEST_DEVICE=cpu debugs it on the CPU")
needs_cuda = pytest.mark.skipif(ON_CPU, reason="only CUDA has it")


class Rotary(nn.Module):
    """A model's rotary angles, which are float32 in a model of any dtype, as the CPU computes them."""

    def __init__(self, original):
        super().__init__()
        self.__dict__["original"] = original  # not registered, so it stays where it is

    def forward(self, x, position_ids):
        return tuple(values.to(x.device) for values in self.original(x.cpu(), position_ids.cpu()))


class Norm(nn.RMSNorm):
    """LLaMA's norm in the dtype of its input, by no fused kernel."""

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def exact_llama(**options):
    """`tiny_llama` in float64 without transformers' detours by float32, so that devices agree to its digits."""
    model = tiny_llama(**options)
    model.model.rotary_emb = Rotary(model.model.rotary_emb)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, Norm(child.weight.shape, eps=child.variance_epsilon))
    return model.double()


def tokens_of(step):
    starts = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(12)) % VOCABULARY


def loss_of(model, tokens):
    """The loss of the next tokens in the model's dtype; transformers' own is float32."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, device=DEVICE, steps=10, accumulation=1, clip=None):
    """(losses, rows of every slice after each step)."""
    losses, rows = [], []
    for step in range(steps):
        for micro in tokens_of(step).to(device).chunk(accumulation):
            loss = loss_of(model, micro) / accumulation
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([slice_.index.tolist() for slice_ in grass_slices(model)])
    return losses, rows


def walk(device, model, steps=10, accumulation=1, clip=None, **settings):
    """Train a model with Grass: (losses, rows, the model, back on the CPU)."""
    config = GrassConfig(**{"density": 0.25, "update_interval": 3, **settings})
    model = convert_to_grass(model.to(device), config)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    losses, rows = train(model, optimizer, device, steps, accumulation, clip)
    return losses, rows, restore_model(model).cpu()


def assert_same_walk(ours, theirs, tolerance=1e-9):
    assert ours[1] == theirs[1]
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
    assert_same_weights(ours[2], theirs[2], atol=tolerance)
