"""Writing rows or columns with a note of what changed, beside a copy and a comparison of all."""

import pytest
import torch

from grass_hf.slices.ops import replacing
from grass_hf.slices.ops.bits import Elements, as_bits, differing
from grass_hf.slices.ops.rows import put_rows, take_rows

SHAPES = [(5, 7), (24, 16), (3, 9, 8), (1, 1)]
SHARES = [0.0, 0.01, 0.1, 1.0]


def some(shape, share, draws):
    return torch.rand(shape, generator=draws) < share


@pytest.mark.parametrize("at_a_time", [16, 2**18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_a_copy_and_a_comparison(monkeypatch, shape, dim, dtype, at_a_time):
    monkeypatch.setattr(replacing, "_AT_A_TIME", at_a_time)
    draws = torch.Generator().manual_seed(0)
    for share in SHARES:
        tensor = torch.randn(shape, generator=draws).to(dtype)
        tensor.view(-1)[0] = torch.nan
        index = torch.randperm(shape[dim], generator=draws)[: -(-shape[dim] // 2)]
        rows = take_rows(tensor, index, dim)
        changed, all_changed = Elements(rows.numel(), rows.device), torch.zeros(rows.shape, dtype=torch.bool)
        expected = tensor.clone()
        for _ in range(3):
            before = rows.clone()
            rows = torch.where(some(rows.shape, share, draws), rows * 1.5 + 1, rows)
            all_changed |= as_bits(before) != as_bits(rows)
            replacing.replace_rows(tensor, index, rows, dim, changed)
            put_rows(expected, index, rows, dim)
        assert torch.equal(as_bits(tensor), as_bits(expected))
        assert torch.equal(changed.positions(), all_changed.view(-1).nonzero().squeeze(1))
        assert changed.nbytes <= max(-(-rows.numel() // 8), 0)


def test_a_weight_and_an_index_of_any_kind():
    """Columns of a transposed weight, each expert's own rows, and rows that begin in the middle of eight bytes."""
    draws = torch.Generator().manual_seed(0)
    flat = torch.randn(4 * 8 + 1, generator=draws).bfloat16()[1:]
    for tensor in (torch.randn(8, 6, generator=draws).bfloat16().t(), torch.randn(2, 8, 6, generator=draws)):
        index = torch.tensor([[1, 3], [0, 2]]) if tensor.dim() == 3 else torch.tensor([4, 2])
        new = take_rows(tensor, index, -2) + 1
        changed = Elements(new.numel(), new.device)
        replacing.replace_rows(tensor, index, new, -2, changed)
        assert torch.equal(take_rows(tensor, index, -2), new) and changed.positions().numel() == new.numel()
    assert torch.equal(differing(flat, flat + 0), torch.zeros(32, dtype=torch.bool))


def test_differing_counts_bits():
    old = torch.tensor([0.0, 1.0, float("nan"), 2.0] * 8, dtype=torch.bfloat16)
    new = old.clone()
    new[0], new[9] = -0.0, 3.0
    assert differing(old, new).tolist() == [0, 9]
    assert differing(old, -old).dtype is torch.bool and differing(old, -old).all()
