"""The selection rules: unbiased where they claim it, optimal where they claim it, and deterministic."""

import itertools

import pytest
import torch

from grass_hf.config.settings import SELECTIONS
from grass_hf.slices.ops.selection import (
    draws_of,
    generator,
    needs_scores,
    probabilities,
    select,
    strided,
    with_replacement,
)

SIZE, RANK = 12, 4
SCORES = torch.rand(SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 2 + 0.01
UNBIASED = [rule for rule in SELECTIONS if with_replacement(rule)]
WITHOUT = [rule for rule in SELECTIONS if rule.endswith("_nr")]


def draw(rule, number, scores=SCORES, rank=RANK):
    return select(rule, scores, len(scores), rank, generator(0, number, "layer"))


@pytest.mark.parametrize("rule", UNBIASED)
def test_unbiased_rules_have_mean_identity(rule):
    """E[P P^T] = I over 10^4 draws: P P^T is diagonal, with multiplicity * rho^2 at the drawn rows."""
    draws = 10_000
    diagonal = torch.zeros(draws, SIZE, dtype=torch.float64)
    for number in range(draws):
        chosen = draw(rule, number)
        rows = chosen.index[: chosen.count]
        diagonal[number, rows] = (chosen.write * chosen.rho)[: chosen.count]
    error = diagonal.std(dim=0) / draws**0.5
    assert ((diagonal.mean(dim=0) - 1).abs() < 5 * error).all()


def test_the_unbiasedness_test_would_see_a_bias():
    diagonal = torch.zeros(2_000, SIZE, dtype=torch.float64)
    for number in range(len(diagonal)):
        diagonal[number, draw("multinomial_norm_nr", number).index] = 1
    error = diagonal.std(dim=0) / len(diagonal) ** 0.5
    assert not ((diagonal.mean(dim=0) - 1).abs() < 5 * error).any()


def test_top_r_has_the_least_reconstruction_error():
    gradient = torch.randn(7, 5, dtype=torch.float64)

    def error(rows):
        p = torch.zeros(7, len(rows), dtype=torch.float64)
        p[list(rows), range(len(rows))] = 1
        return float((gradient - p @ p.t() @ gradient).norm())

    chosen = select("top_r", gradient.square().sum(1), 7, 3, generator(0, 0, ""))
    best = min(itertools.combinations(range(7), 3), key=error)
    assert chosen.index.tolist() == list(best)


@pytest.mark.parametrize("rule", WITHOUT)
def test_inclusion_probabilities_without_replacement(rule):
    """Against the exact distribution of sequential draws, enumerated."""
    scores = torch.tensor([4.0, 1.0, 0.25, 2.0, 0.5], dtype=torch.float64)
    q = probabilities(rule, scores, 5)
    exact = torch.zeros(5, dtype=torch.float64)
    for order in itertools.permutations(range(5), 2):
        chance = q[order[0]] * q[order[1]] / (1 - q[order[0]])
        exact[list(order)] += chance
    draws = 10_000
    seen = torch.zeros(5, dtype=torch.float64)
    for number in range(draws):
        seen[draw(rule, number, scores, 2).index] += 1
    error = (exact * (1 - exact) / draws).sqrt()
    assert ((seen / draws - exact).abs() < 5 * error).all()


def table_q(rule, scores):
    """The table of DESIGN.md by hand: unbiasedness alone would not see that two rules' q are swapped."""
    norms = [float(s) ** 0.5 for s in scores]
    powers = {"uniform": 0, "multinomial_norm": 1, "multinomial_stale": 1, "multinomial_norm2": 2}
    power = powers[rule.removesuffix("_nr")]
    weights = torch.tensor([norm**power for norm in norms], dtype=torch.float64)
    return weights / weights.sum()


@pytest.mark.parametrize("rule", UNBIASED)
def test_rows_with_replacement_are_drawn_with_the_tables_probabilities(rule):
    draws, q = 4_000, table_q(rule, SCORES)
    counts = torch.zeros(SIZE, dtype=torch.float64)
    for number in range(draws):
        chosen = draw(rule, number)
        rows = slice(chosen.count)
        counts[chosen.index[rows]] += (chosen.write / chosen.rho)[rows]
    error = (q * (1 - q) / (draws * RANK)).sqrt()
    assert ((counts / (draws * RANK) - q).abs() < 5 * error).all()


@pytest.mark.parametrize("rule", WITHOUT)
def test_first_row_without_replacement_has_the_tables_probabilities(rule):
    """With one draw the inclusion probability is q itself."""
    draws, q = 4_000, table_q(rule, SCORES)
    counts = torch.zeros(SIZE, dtype=torch.float64)
    for number in range(draws):
        counts[draw(rule, number, rank=1).index] += 1
    error = (q * (1 - q) / draws).sqrt()
    assert ((counts / draws - q).abs() < 5 * error).all()


def test_equal_norms_and_no_norms_still_select():
    for rule in SELECTIONS:
        for scores in (torch.zeros(SIZE), torch.full((SIZE,), 3.0)):
            chosen = draw(rule, 0, scores)
            assert 1 <= chosen.count <= RANK and chosen.index.shape == (RANK,)
    # among equals the first rows win, so that ranks agree
    assert draw("top_r", 0, torch.full((SIZE,), 3.0)).index.tolist() == list(range(RANK))


def test_probabilities_follow_the_table():
    norms = SCORES.sqrt()
    torch.testing.assert_close(probabilities("multinomial_norm", SCORES, SIZE), norms / norms.sum())
    torch.testing.assert_close(probabilities("multinomial_norm2_nr", SCORES, SIZE), SCORES / SCORES.sum())
    assert (probabilities("uniform", None, SIZE) == 1 / SIZE).all()
    assert (probabilities("multinomial_norm", torch.zeros(SIZE), SIZE) == 1 / SIZE).all()


@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize("number", range(20))
def test_shape_of_a_selection(rule, number):
    chosen = draw(rule, number)
    rows = chosen.index[: chosen.count]
    assert chosen.index.shape == (RANK,) and chosen.index.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist()))
    if with_replacement(rule):
        q = probabilities(rule, SCORES if needs_scores(rule) else None, SIZE)
        torch.testing.assert_close(chosen.rho[: chosen.count], (RANK * q[rows]).rsqrt())
        multiplicity = (chosen.write / chosen.rho)[: chosen.count]
        torch.testing.assert_close(multiplicity, multiplicity.round())
        assert multiplicity.sum() == pytest.approx(RANK)
        assert (chosen.rho[chosen.count :] == 0).all() and (chosen.write[chosen.count :] == 1).all()
    else:
        assert chosen.count == RANK and chosen.rho is None and chosen.write is None


def test_rows_without_gradient_come_last():
    scores = torch.zeros(8)
    scores[[1, 6]] = 1.0
    for number in range(50):
        assert {1, 6} <= set(draw("multinomial_norm_nr", number, scores, 3).index.tolist())
        assert set(draw("multinomial_norm", number, scores, 3).index.tolist()) <= {1, 6}
    thirds = {tuple(draw("multinomial_norm_nr", n, scores, 3).index.tolist()) for n in range(50)}
    assert len(thirds) > 3  # the row that fills up is random, not always the first


def test_draws_depend_on_seed_step_and_layer_alone():
    def rows(*key):
        return select("uniform_nr", None, 1000, 10, generator(*key)).index.tolist()

    assert rows(0, 5, "a") == rows(0, 5, "a")
    assert len({tuple(rows(*key)) for key in [(0, 5, "a"), (1, 5, "a"), (0, 6, "a"), (0, 5, "b")]}) == 4


@pytest.mark.parametrize("size, rank", [(16, 4), (10, 3), (7, 7), (5, 1), (100, 33)])
def test_first_rows_are_evenly_strided(size, rank):
    rows = strided(size, rank).index
    assert rows.tolist() == [j * size // rank for j in range(rank)]
    if size % rank == 0:  # aligned with every even sharding: each shard holds its share
        shards = [((rows >= s * size // rank) & (rows < (s + 1) * size // rank)).sum() for s in range(rank)]
        assert shards == [1] * rank


@pytest.mark.parametrize("size, rank, blocks", [(12, 3, 1), (10, 4, 1), (7, 7, 1), (12, 4, 2)])
def test_a_cycle_gives_every_row_its_turn(size, rank, blocks):
    def turn(number, seed=0, layer="a"):
        draws = draws_of("cycle", seed, number, layer)  # the step of a turn does not matter
        return select("cycle", None, size, rank, draws, blocks, turn=number).index.tolist()

    trained = torch.zeros(size, dtype=torch.int64)
    for number in range(20):
        rows = turn(number)
        assert len(set(rows)) == rank and rows == sorted(rows)
        trained[rows] += 1
        assert trained.max() - trained.min() <= 1  # nobody is more than one turn ahead
    assert turn(3) == turn(3)
    if rank < size:
        runs = {tuple(tuple(turn(number, *key)) for number in range(3)) for key in [(0, "a"), (1, "a"), (0, "b")]}
        assert len(runs) == 3


def test_the_longer_a_row_waits_the_likelier_it_is():
    """q is norm times staleness: 1 in the slice, one more per turn outside, of a row that never was in it turn + 2."""
    trained = torch.tensor([4, 3, 0, -1], dtype=torch.int32)
    scores, draws = torch.tensor([4.0, 1.0, 0.25, 0.0]), 4_000
    q = torch.tensor([2.0 * 1, 1.0 * 2, 0.5 * 5, 0.0 * 6], dtype=torch.float64)
    q /= q.sum()
    counts = torch.zeros(4, dtype=torch.float64)
    for number in range(draws):
        random = generator(0, number, "layer")
        counts[select("multinomial_stale_nr", scores, 4, 1, random, turn=4, trained=trained).index] += 1
    assert ((counts / draws - q).abs() <= 5 * (q * (1 - q) / draws).sqrt()).all()


def test_staleness_of_every_block_is_its_own():
    trained = torch.tensor([9, 9, 9, 0, 0, 9, 9, 9], dtype=torch.int32) * 10**8
    for number in range(20):
        random = generator(0, number, "layer")
        rows = select("multinomial_stale_nr", torch.ones(8), 8, 2, random, 2, turn=9 * 10**8, trained=trained)
        assert rows.index.tolist() == [3, 4]


def test_a_turn_of_shorter_intervals_counts_as_the_last_one():
    """Resumed with longer intervals, a run is at a smaller turn than its rows: no row then waited for less than one."""
    trained, counts = torch.tensor([9, 1], dtype=torch.int32), torch.zeros(2)
    for number in range(1_000):
        random = generator(0, number, "layer")
        counts[select("multinomial_stale_nr", torch.ones(2), 2, 1, random, turn=1, trained=trained).index] += 1
    assert abs(float(counts[0]) - 500) <= 5 * (1_000 / 4) ** 0.5
