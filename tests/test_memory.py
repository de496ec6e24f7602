"""The estimator against real training steps, and what it refuses."""

import weakref

import pytest
import torch
from helpers import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from grass_hf import GrassConfig, convert_to_grass, estimate_memory, grass_optimizer


class Counter(TorchDispatchMode):
    """Live bytes in the plainest way: after every operation, the sizes of all storages that are not gone."""

    def __init__(self, *known):
        super().__init__()
        self.storages, self.peak = weakref.WeakSet(), 0
        for tensor in known:
            self.storages.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.storages.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum({s._cdata: s.nbytes() for s in self.storages}.values()))
        return out


def small_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300, use_cache=False))


def real_peaks(model, config, batch, sequence, checkpointing, steps=3):
    """Peaks in bytes of real training steps, the first with an empty optimizer."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    convert_to_grass(model, config)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (batch, sequence))
    known = [*model.parameters(), *model.buffers(), tokens]
    known += [part.state.trained for part in optimizer.grass.slices]
    known += [part.norms for part in optimizer.grass.slices if part.norms is not None]
    peaks = []
    counter = Counter(*known)
    del known  # it would keep what a training loop lets go
    with counter:
        for _ in range(steps):
            counter.peak = 0
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            peaks.append(counter.peak)
    return peaks


SETTINGS = {
    "tiny, float32": (tiny_llama, {"rank": 8}, torch.float32, 2, 24, False),
    "small, input side": (small_llama, {"rank": 24, "side": "input"}, torch.float32, 2, 64, False),
    "small, all matrices": (
        small_llama,
        {"density": 0.5, "target_modules": "all-matrices"},
        torch.float32,
        1,
        16,
        False,
    ),
    "small, bfloat16": (small_llama, {"rank": 24}, torch.bfloat16, 2, 64, False),
    "small, pure bfloat16, checkpointing": (
        small_llama,
        {"rank": 64, "slice_dtype": "bfloat16"},
        torch.bfloat16,
        4,
        64,
        True,
    ),
    "small, all matrices, input side, checkpointing": (
        small_llama,
        {"rank": 48, "side": "input", "target_modules": "all-matrices"},
        torch.float32,
        2,
        128,
        True,
    ),
    "small, few tokens": (small_llama, {"rank": 80}, torch.bfloat16, 1, 4, False),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_estimate_is_what_a_real_run_holds(setting):
    make, options, dtype, batch, sequence, checkpointing = setting
    # the steps 0 and 2 observe, and only from the first on is there an optimizer state
    config = GrassConfig(update_interval=2, **options)
    name = str(dtype).removeprefix("torch.")
    shape = {"batch": batch, "sequence": sequence, "gradient_checkpointing": checkpointing}
    estimate = estimate_memory(make(), config, dtype=name, **shape)
    _, ordinary, observing = real_peaks(make().to(dtype), config, batch, sequence, checkpointing)
    assert estimate.step.total == pytest.approx(ordinary, rel=0.01)
    assert estimate.observing.total == pytest.approx(observing, rel=0.01)
    assert estimate.peak == pytest.approx(max(ordinary, observing), rel=0.01)
