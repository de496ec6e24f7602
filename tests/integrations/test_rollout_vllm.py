"""vLLM's sparse patches, filled by us; checked by vLLM's own code where a wheel of it lies unpacked.

Importing vLLM wants a GPU's libraries. Its loader of patches wants only torch: GRASS_VLLM=folder, in which a wheel was
unpacked, lets it apply ours to a model (pip download --no-deps vllm; python -m zipfile -e vllm-*.whl folder).
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from test_weight_delta import Normed, Run

from grass_hf.integrations.rollouts.vllm import chunks, sparse_patches

LOADER = Path(os.environ.get("GRASS_VLLM", ""), "vllm/model_executor/model_loader/checkpoint_weight_patch.py")


@dataclass
class SparseWeightPatch:
    """As vLLM 0.33 declares it."""

    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple


def sent(run):
    return sparse_patches(run.delta, SparseWeightPatch)


def test_patches_are_what_vllm_asks_for():
    run = Run(lambda: tiny_llama(tie_word_embeddings=True), target_modules="all-matrices")
    for _ in range(4):
        run.step()
        for patch in sent(run):
            assert patch.indices.dtype == torch.int32 and patch.indices.is_contiguous() and patch.values.is_contiguous()
            assert patch.indices.dim() == patch.values.dim() == 1 and patch.indices.numel() == patch.values.numel()
            assert patch.indices.unique().numel() == patch.indices.numel()
            assert patch.full_shape == tuple(run.replica[patch.name].shape)
            run.replica[patch.name].view(-1)[patch.indices.long()] = patch.values
        for other, first in run.delta.aliases.items():
            run.replica[other].copy_(run.replica[first])
        run.check()


def test_chunks():
    run = Run()
    run.step()
    patches = sent(run)
    assert [len(group) for group in chunks(patches, 1)] == [1] * len(patches)
    assert list(chunks(patches)) == [patches]


def test_what_vllm_cannot_take_stops_and_is_not_lost():
    run = Run()
    run.step()
    run.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        sent(run)
    run.synchronise()
    run = Run(Normed)
    run.step()
    with pytest.raises(ValueError, match=r"norm\.num_batches_tracked is torch\.int64"):
        sent(run)
    with pytest.raises(ValueError, match=r"pip install .vllm>=0\.33"):
        sparse_patches(run.delta)


@pytest.mark.skipif(not LOADER.is_file(), reason="GRASS_VLLM names no unpacked wheel of vLLM")
def test_vllms_own_loader_applies_them():
    spec = importlib.util.spec_from_file_location("checkpoint_weight_patch", LOADER)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)

    class Engine(torch.nn.Module):
        """A model with vLLM's interface: it loads by name, each tensor by one copy."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def load_weights(self, weights):
            own = self.model.state_dict()
            for name, tensor in weights:
                own[name].copy_(tensor)
            return {name for name, _ in weights}

    run = Run(weight_decay=0.0)
    engine = Engine(tiny_llama().to(torch.bfloat16))
    for _ in range(5):
        run.step()
        patches = [
            theirs.CheckpointWeightPatch(p.name, p.full_shape, p.values.dtype, p.values, p.indices) for p in sent(run)
        ]
        assert theirs.load_checkpoint_weight_patches(engine, patches) == {patch.name for patch in patches}
        run.replica = engine.model.state_dict()
        run.check()
