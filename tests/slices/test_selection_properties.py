"""Whatever the sizes, scores and blocks: every rule chooses rows that can be trained, the same ones every time."""

import torch
from properties import hypothesis, st

from grass_hf.config.settings import SELECTIONS
from grass_hf.slices.ops.selection import (
    aligned,
    bounds,
    draws_of,
    fits,
    needs_scores,
    select,
    strided,
    with_replacement,
)

given = hypothesis.given


@st.composite
def sides(draw):
    """Rows of a side, how many of them are trained, and blocks that can have their share of both."""
    size = draw(st.integers(1, 40))
    rank, blocks = draw(st.integers(1, size)), draw(st.integers(1, 6))
    hypothesis.assume(fits(size, rank, blocks))
    return size, rank, blocks


# Squared norms: nothing at all, equal ones, and such as float32 gradients have at most.
norms2 = st.just(0.0) | st.just(1.0) | st.floats(1e-90, 1e78)


@st.composite
def selections(draw, rules=SELECTIONS):
    """The arguments of `select`."""
    (size, rank, blocks), rule = draw(sides()), draw(st.sampled_from(rules))
    scores = draw(st.lists(norms2, min_size=size, max_size=size)) if needs_scores(rule) else None
    trained = draw(st.lists(st.integers(-1, 9), min_size=size, max_size=size))
    return {
        "rule": rule,
        "size": size,
        "rank": rank,
        "blocks": blocks,
        "scores": None if scores is None else torch.tensor(scores, dtype=torch.float64),
        "turn": draw(st.integers(0, 9)),
        "trained": torch.tensor(trained) if rule == "multinomial_stale_nr" else None,
    }


def drawn(case, seed=0, step=0, layer="layer"):
    return select(**case, draws=draws_of(case["rule"], seed, step, layer))


@given(selections())
def test_every_rule_chooses_rows_that_can_be_trained(case):
    chosen = drawn(case)
    index, rank = chosen.index, case["rank"]
    assert index.dtype == torch.int64 and index.shape == (rank,)
    assert int(index.min()) >= 0 and int(index.max()) < case["size"]
    if with_replacement(case["rule"]):
        real = chosen.rho > 0
        assert int(real.sum()) == chosen.count == index[real].unique().numel()
        assert (chosen.write[~real] == 1).all() and (chosen.write > 0).all() and chosen.write.isfinite().all()
        # c rho of a row is its count times rho: the counts of all rows are the draws
        torch.testing.assert_close((chosen.write / chosen.rho)[real].sum(), torch.tensor(float(rank)).double())
    else:
        assert chosen.rho is None and chosen.write is None
        assert (index.diff() > 0).all()  # distinct, in order


@given(selections())
def test_every_block_trains_its_own_rows(case):
    chosen = drawn(case)
    pairs = zip(bounds(case["size"], case["blocks"]), bounds(case["rank"], case["blocks"]), strict=True)
    for (low, high), (first, last) in pairs:
        part = chosen.index[first:last]
        assert ((part >= low) & (part < high)).all()
    assert aligned(chosen.index, case["size"], case["blocks"])


@given(selections(), st.integers(0, 2**40), st.integers(0, 10**6))
def test_seed_step_and_layer_say_which_rows(case, seed, step):
    first, again = (drawn(case, seed, step) for _ in range(2))
    assert torch.equal(first.index, again.index)
    for one, other in ((first.rho, again.rho), (first.write, again.write)):
        assert (one is None and other is None) or torch.equal(one, other)
    if case["rule"] == "cycle":  # its permutation lasts for the whole run
        assert torch.equal(first.index, drawn(case, seed, step + 1).index)


@given(selections())
def test_rows_with_a_gradient_go_first(case):
    """Of rules without replacement: a row without a gradient is chosen only where no row with one is left."""
    hypothesis.assume(needs_scores(case["rule"]) and not with_replacement(case["rule"]))
    chosen, scores = drawn(case).index, case["scores"]
    pairs = zip(bounds(case["size"], case["blocks"]), bounds(case["rank"], case["blocks"]), strict=True)
    for (low, high), (first, last) in pairs:
        lively = int((scores[low:high] > 0).sum())
        assert int((scores[chosen[first:last]] > 0).sum()) == min(lively, last - first)


@given(selections(rules=("top_r",)))
def test_top_r_leaves_no_larger_row_out(case):
    chosen, scores = drawn(case).index, case["scores"]
    pairs = zip(bounds(case["size"], case["blocks"]), bounds(case["rank"], case["blocks"]), strict=True)
    for (low, high), (first, last) in pairs:
        taken = chosen[first:last]
        left = torch.tensor(sorted(set(range(low, high)) - set(taken.tolist())))
        if len(left) and len(taken):
            assert scores[left].max() <= scores[taken].min()


@given(sides(), st.integers(0, 99), st.integers(1, 3))
def test_a_cycle_takes_every_row_once_a_round(side, seed, rounds):
    """In as many turns as a block's rows take, no row of it is taken more than once more often than another."""
    size, rank, blocks = side
    counts = torch.zeros(size, dtype=torch.int64)
    pairs = list(zip(bounds(size, blocks), bounds(rank, blocks), strict=True))
    for turn in range(rounds * size):
        chosen = select("cycle", None, size, rank, draws_of("cycle", seed, turn, "layer"), blocks, turn)
        counts[chosen.index] += 1
        for (low, high), (first, last) in pairs:
            seen, shares = counts[low:high], last - first
            if shares and (turn + 1) * shares % (high - low) == 0:  # whole rounds
                assert (seen == (turn + 1) * shares // (high - low)).all()
            elif high > low:
                assert seen.max() - seen.min() <= 1


@given(sides())
def test_the_rows_to_begin_with_are_distinct_and_each_blocks_own(side):
    size, rank, blocks = side
    index = strided(size, rank, blocks).index
    assert index.shape == (rank,) and (index.diff() > 0).all() and int(index[0]) >= 0 and int(index[-1]) < size
    assert aligned(index, size, blocks)
