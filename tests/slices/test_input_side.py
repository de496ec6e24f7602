"""side="input": only the selected columns of an input are kept for backward, once for all layers that read it."""

import copy
import pickle

import pytest
import torch
from helpers import VOCABULARY, tiny_llama
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices

pytestmark = pytest.mark.oldest

TOKENS, WIDTH, INNER = 30, 32, 48


def saved_bytes(model, run):
    """Bytes that `run` keeps for backward beside the model's own tensors: every storage once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(kept.values())


def block(**settings):
    torch.manual_seed(0)
    config = tiny_llama(intermediate_size=INNER).config
    model = nn.Sequential(LlamaMLP(config))
    convert_to_grass(model, GrassConfig(density=0.25, selection="uniform_nr", **settings))
    return model


def of_block(**settings):
    model, x = block(**settings), torch.randn(TOKENS, WIDTH, requires_grad=True)
    return saved_bytes(model, lambda: model(x * 1.0))  # an activation, as inside a model


def test_saved_bytes_of_an_mlp_fall_by_what_is_not_selected():
    """gate and up read one input of 32 columns, down one of 48; a quarter of each is kept instead of all."""
    whole, kept = of_block(side="output"), of_block(side="input")
    assert whole - kept == 4 * TOKENS * (WIDTH - WIDTH // 4 + INNER - INNER // 4)
    separate = of_block(side="input", share_index=False)
    assert separate - kept == 4 * TOKENS * WIDTH // 4  # gate's columns and up's


def test_saved_bytes_of_a_llama_fall():
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))

    def of(**settings):
        model = tiny_llama()
        convert_to_grass(model, GrassConfig(density=0.25, selection="uniform_nr", **settings))
        return saved_bytes(model, lambda: model(input_ids=tokens).logits)

    inputs = 2 * 4 * 32 * (32 + 32 + 32 + 48)  # two layers: what q/k/v, o, gate/up and down read
    saved = of(side="output") - of(side="input")
    # attention keeps its own output, o_proj's input, whatever we do
    assert saved == pytest.approx(0.75 * (inputs - 2 * 4 * 32 * 32), rel=0.1)


def test_siblings_choose_together_by_the_sum_of_their_scores():
    model = nn.Sequential(LlamaMLP(tiny_llama().config)).double()
    plain = copy.deepcopy(model)
    convert_to_grass(model, GrassConfig(rank=5, side="input", selection="top_r", update_interval=2, stagger=1))
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=1e-3)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    optimizer.step()
    gate, up, down = (getattr(model[0], name).weight_slice for name in ("gate_proj", "up_proj", "down_proj"))
    scores = sum(getattr(plain[0], name).weight.grad.square().sum(0) for name in ("gate_proj", "up_proj"))
    assert gate.index.tolist() == up.index.tolist() == scores.topk(5).indices.sort().values.tolist()
    alone = plain[0].down_proj.weight.grad.square().sum(0)
    assert down.index.tolist() == alone.topk(5).indices.sort().values.tolist()
    own = plain[0].up_proj.weight.grad.square().sum(0)
    assert up.state.energy == pytest.approx((float(own[up.index].sum()), float(own.sum())))


def test_columns_are_never_stale():
    """One x for all steps, over selections and after in-place changes of x: gradients are of the current columns."""
    model = nn.Sequential(LlamaMLP(tiny_llama().config)).double()
    convert_to_grass(model, GrassConfig(rank=5, side="input", update_interval=1, selection="uniform_nr"))
    optimizer = grass_optimizer(model, torch.optim.SGD, lr=1e-2)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        reference = LlamaMLP(tiny_llama().config).double()
        reference.load_state_dict({k: v for k, v in model[0].state_dict().items() if not k.endswith("active")})
        kept = model(x)  # alive until the end of the step, and with it the columns
        kept.square().sum().backward()
        reference(x).square().sum().backward()
        for name in ("gate_proj", "up_proj", "down_proj"):
            slice_ = getattr(model[0], name).weight_slice
            expected = getattr(reference, name).weight.grad[:, slice_.index]
            torch.testing.assert_close(slice_.active.grad, expected, rtol=0, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        x.mul_(1.5)


def test_the_whole_model_copies_and_pickles():
    model = tiny_llama()
    convert_to_grass(model, GrassConfig(density=0.25, side="input"))
    tokens = torch.arange(8)[None]
    out = model(input_ids=tokens, labels=tokens).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=tokens, labels=tokens).loss, out)
        ours, theirs = list(grass_slices(model)), list(grass_slices(twin))
        assert len(ours) == len(theirs) and ours[0].columns is not theirs[0].columns
        assert theirs[0].columns is theirs[1].columns is theirs[2].columns is not None
        assert all(slice_.weight is not twin_part.weight for slice_, twin_part in zip(ours, theirs, strict=True))
