"""Runs of a weight's elements: what all ranks put and take is what is done to the whole weight."""

import itertools

import pytest
import torch

from grass_hf.slices.ops.flat_runs import Run
from grass_hf.slices.ops.rows import put_rows, take_rows

SHAPES = [(7, 5), (8, 4), (1, 9), (9, 1), (3, 4, 5), (2, 6, 3)]


def runs(weight: torch.Tensor, ranks: int) -> list[Run]:
    """As ZeRO-3 cuts: equal lengths, the last one padded."""
    length = -(-weight.numel() // ranks)
    padded = torch.cat([weight.flatten(), torch.full((ranks * length - weight.numel(),), 77.0)])
    return [Run(values.clone(), rank * length, weight.shape) for rank, values in enumerate(padded.split(length))]


def chosen(shape, dim: int) -> torch.Tensor:
    """Distinct rows (columns) in no order, one of them twice as padding."""
    size, batch = shape[dim], shape[:-2]
    rows = [torch.randperm(size)[: max(1, size // 2)] for _ in range(int(torch.tensor(batch).prod()) if batch else 1)]
    rows = [torch.cat([own, own[:1]]) for own in rows]
    return torch.stack(rows).view(*batch, -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [-2, -1])
def test_what_all_runs_take_adds_up_to_the_rows(shape, dim):
    for ranks in (1, 2, 3, 4, 8, 50):
        weight, index = torch.randn(shape), chosen(shape, dim)
        taken = [run.take(index, dim) for run in runs(weight, ranks)]
        assert torch.equal(sum(taken), take_rows(weight, index, dim))
        held = sum(int((part != 0).sum()) for part in taken)
        assert held == take_rows(weight, index, dim).numel()  # nobody takes what another one has


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [-2, -1])
def test_what_all_runs_put_is_put_into_the_weight(shape, dim):
    for ranks in (1, 2, 3, 4, 8, 50):
        weight, index = torch.randn(shape), chosen(shape, dim)
        rows = take_rows(torch.randn(shape), index, dim)
        parts = runs(weight, ranks)
        for run in parts:
            run.put(index, rows, dim)
        put_rows(weight, index, rows, dim)
        joined = torch.cat([run.values for run in parts])
        assert torch.equal(joined[: weight.numel()].view(shape), weight)
        assert (joined[weight.numel() :] == 77.0).all()


def test_pieces_are_three_at_most_and_cover_the_run():
    for height, width, start, length in itertools.product((1, 4), (1, 5), range(0, 9, 2), range(1, 12)):
        shape = torch.Size((height, width))
        run = Run(torch.zeros(length), start, shape)
        pieces = list(run.pieces())
        assert len(pieces) <= 3
        for piece, _, _ in pieces:
            piece += 1
        assert run.values.tolist() == [1.0 if start + i < shape.numel() else 0.0 for i in range(length)]
