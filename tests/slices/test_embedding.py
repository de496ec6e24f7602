"""Embeddings and tied heads: one slice of feature columns, gradients of all uses added, no V x d gradient."""

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from helpers import VOCABULARY, tiny_llama
from torch import nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.slices.ops.tap import embedding_squared_norms, embedding_tap

pytestmark = pytest.mark.oldest

V, D = 11, 8
INDEX = torch.tensor([0, 3, 5])


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_gradient_and_norms_are_autograds(padding_idx, weighted, shape):
    draws = torch.Generator().manual_seed(1)
    table = torch.randn(V, D, dtype=torch.float64, generator=draws)
    ids = torch.randint(V, shape, generator=draws)
    ids.view(-1)[:2] = 2
    dy = torch.randn(*shape, D, dtype=torch.float64, generator=draws)
    rho = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None

    full = table.clone().requires_grad_()
    F.embedding(ids, full, padding_idx=padding_idx).backward(dy)

    active = table[:, INDEX].clone().requires_grad_()
    norms = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    y = embedding_tap(F.embedding(ids, table), ids, active, INDEX, padding_idx=padding_idx, multiplier=rho, norms=norms)
    y.backward(dy)
    expected = full.grad[:, INDEX] * (1.0 if rho is None else rho)
    torch.testing.assert_close(active.grad, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(norms.grad, full.grad.square().sum(0), rtol=1e-13, atol=1e-13)


def test_norms_add_up_over_blocks_of_columns_and_repeated_tokens():
    ids = torch.tensor([4, 1, 4, 4, 0, 1])
    dy = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = torch.zeros(V, 10, dtype=torch.float64).index_add(0, ids, dy)
    for block in (1, 3, 10, 256):
        found = embedding_squared_norms(dy, ids, -1, block)
        torch.testing.assert_close(found, full.square().sum(0), rtol=1e-13, atol=0)


def test_scaled_embeddings_keep_their_scale_in_the_gradient():
    """Gemma multiplies what its embedding looks up: the gradient of the table has the factor in it."""

    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 7.0

    model = nn.Sequential(Scaled(V, D), nn.Linear(D, 3)).double()
    ids = torch.tensor([1, 1, 4])
    model(ids).sum().backward()
    expected = model[0].weight.grad.clone()
    convert_to_grass(model, GrassConfig(density=0.5, target_modules=["0"]))
    model(ids).sum().backward()
    slice_ = model[0].weight_slice
    torch.testing.assert_close(slice_.active.grad, expected[:, slice_.index])


def test_a_tied_matrix_gets_the_gradients_of_both_uses():
    tokens = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))
    plain, ours = (tiny_llama(tie_word_embeddings=True).double() for _ in range(2))
    plain(input_ids=tokens, labels=tokens).loss.backward()
    convert_to_grass(ours, GrassConfig(density=0.25, target_modules="all-matrices"))
    ours(input_ids=tokens, labels=tokens).loss.backward()
    slice_ = ours.lm_head.weight_slice
    expected = plain.lm_head.weight.grad[:, slice_.index]
    torch.testing.assert_close(slice_.active.grad, expected, rtol=0, atol=1e-13)
    head_only = plain.lm_head.weight.grad.clone()
    plain.zero_grad()
    plain(inputs_embeds=plain.model.embed_tokens(tokens).detach(), labels=tokens).loss.backward()
    assert not torch.allclose(head_only, plain.lm_head.weight.grad)  # the embedding's share is not nothing


def test_a_restored_tied_model_is_tied_and_trainable():
    model = tiny_llama(tie_word_embeddings=True)
    convert_to_grass(model, GrassConfig(density=0.25, target_modules="all-matrices"))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    restore_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    assert type(model.lm_head) is nn.Linear and not hasattr(model.lm_head, "weight_slice")


@pytest.mark.parametrize("tied", [False, True])
def test_no_gradient_of_the_vocabularys_size_times_the_width(tied):
    """The rows of the table are 211, the width 53, 5 tokens: a V x d gradient would show."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(211, 53)
            self.head = nn.Linear(53, 211, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    def sizes(model, optimizer):
        mode = Allocations()
        mode.weights = frozenset(m.weight.untyped_storage().data_ptr() for m in (model.embed, model.head))
        loss = model(torch.tensor([1, 5, 5, 9, 200])).square().sum()
        with mode:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        return mode.sizes

    plain = Model()
    assert 211 * 53 in sizes(plain, torch.optim.AdamW(plain.parameters(), foreach=False))
    model = Model()
    convert_to_grass(model, GrassConfig(density=0.25, update_interval=3, target_modules="all-matrices", stagger=1))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
    for step in range(5):
        observing = model.embed.weight_slice.norms is not None
        assert observing == (step % 3 == 0)
        assert 211 * 53 not in (found := sizes(model, optimizer)) or observing
        assert max(found) < 211 * 53 or observing


def test_a_module_registered_twice_leaves_no_slice_in_a_checkpoint():
    """T5's embedding is two modules in transformers 5 and one with two names in 4.57."""
    model = tiny_llama()
    model.shared = model.model.embed_tokens
    plain = list(model.state_dict())
    convert_to_grass(model, GrassConfig(density=0.5, target_modules="all-matrices"))
    assert list(model.state_dict()) == plain and "shared.weight" in plain


def test_unusual_embeddings_are_left_and_named():
    model = nn.Sequential(nn.Embedding(8, 8, max_norm=1.0), nn.Embedding(8, 8, sparse=True), nn.Embedding(8, 8))
    convert_to_grass(model, GrassConfig(target_modules="all-matrices"))
    assert set(model.grass.left_out) == {"0", "1"}
    assert all("max_norm, scale_grad_by_freq or sparse" in reason for reason in model.grass.left_out.values())
