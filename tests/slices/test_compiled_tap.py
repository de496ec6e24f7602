"""The tap in compiled graphs, and on a model that moves."""

import pytest
import torch
from helpers import tiny_llama

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

pytestmark = pytest.mark.oldest


def llama_steps(backend, tied=False, steps=10, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50, use_cache=False, tie_word_embeddings=tied))
    convert_to_grass(model, GrassConfig(**{"rank": 8, "update_interval": 3, "stagger": 1} | options))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    forward = torch.compile(model, fullgraph=True, backend=backend) if backend else model
    losses = []
    for step in range(steps):
        tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


COMPILED = [
    {},
    {"side": "output"},
    {"selection": "multinomial_norm"},
    {"selection": "uniform_nr"},
    {"target_modules": "all-matrices"},
    {"target_modules": "all-matrices", "tied": True},
]


def test_compiled_in_turns_a_graph_for_each():
    """The default has four turns; with a graph that observes nothing and one for evaluation torch's limit is 8."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    options = {"update_interval": 5, "stagger": GrassConfig.stagger, "steps": 14}
    compiled = llama_steps("aot_eager", **options)
    assert counters["stats"]["unique_graphs"] == GrassConfig.stagger + 1
    assert compiled == pytest.approx(llama_steps(None, **options), abs=1e-6)


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiled_fullgraph_never_recompiles_at_reselection(options):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = llama_steps("aot_eager", **options)
    graphs = 1 if options.get("selection") == "uniform_nr" else 2  # observe / not observe
    assert counters["stats"]["unique_graphs"] == graphs
    assert compiled == pytest.approx(llama_steps(None, **options), abs=1e-6)


@pytest.mark.slow
def test_compiled_with_inductor():
    torch._dynamo.reset()
    assert llama_steps("inductor") == pytest.approx(llama_steps(None), abs=1e-4)


def test_observed_norms_move_with_the_model():
    """accelerate moves a model whose optimizer has been made; tests/gpu/test_gpu.py trains such a one."""
    model = convert_to_grass(tiny_llama(), GrassConfig(density=0.25))
    grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    before = {slice_: slice_.norms for slice_ in grass_slices(model) if slice_.norms is not None}
    assert before and all(norms.grad is not None for norms in before.values())
    model.to("meta")
    for slice_, norms in before.items():
        assert slice_.norms.is_meta and slice_.norms.requires_grad and slice_.norms.shape == norms.shape
        assert slice_.norms.grad.is_meta
