"""Second moments of fresh rows, seeded: the mean of the slice's rows, and rows that stay untouched to the bit."""

import pytest
import torch

from grass_hf.optim.fresh_moments import Seed, seed_for
from grass_hf.optim.state_remap import carry_rows
from grass_hf.slices.ops.selection import Selection
from grass_hf.slices.slice import Slice

SOURCE = torch.tensor([2, -1, 0, -1])


def carried(state, shape, dim, source=SOURCE):
    carry_rows(state, torch.Size(shape), dim, source, {"lr": 0.1}, "layer", Seed())
    return state


@pytest.mark.parametrize("dim", [-2, -1])
def test_state_per_element(dim):
    shape = (4, 3) if dim == -2 else (3, 4)
    m, v = torch.randn(shape), torch.rand(shape)
    state = carried({"exp_avg": m.clone(), "exp_avg_sq": v.clone(), "step": torch.tensor(3.0)}, shape, dim)
    rows = [t if dim == -2 else t.t() for t in (state["exp_avg"], state["exp_avg_sq"], m, v)]
    for new, old in enumerate(SOURCE.tolist()):
        if old < 0:
            assert (rows[0][new] == 0).all()
            torch.testing.assert_close(rows[1][new], rows[3].mean(0))
        else:
            assert torch.equal(rows[0][new], rows[2][old]) and torch.equal(rows[1][new], rows[3][old])
    assert state["step"] == 3


def test_every_expert_has_a_mean_of_its_own():
    v, source = torch.rand(2, 4, 3), torch.stack([SOURCE, torch.tensor([-1, 1, 2, 3])])
    new = carried({"exp_avg_sq": v.clone()}, v.shape, -2, source)["exp_avg_sq"]
    torch.testing.assert_close(new[0, 1], v[0].mean(0))
    torch.testing.assert_close(new[1, 0], v[1].mean(0))
    assert torch.equal(new[1, 1:], v[1, 1:]) and torch.equal(new[0, 0], v[0, 2])


def test_padding_has_no_part_in_the_mean():
    v, real = torch.rand(2, 4, 3), torch.tensor([[True, True, True, False], [True, False, True, True]])
    for at, shape in ((0, (4, 3)), (slice(None), (2, 4, 3))):
        state = {"exp_avg_sq": v[at].clone()}
        source = SOURCE if at == 0 else SOURCE.expand(2, 4)
        carry_rows(state, torch.Size(shape), -2, source, {"lr": 0.1}, "layer", Seed(real[at]))
        torch.testing.assert_close(state["exp_avg_sq"].view(-1, 4, 3)[0, 1], v[0, :3].mean(0))
        if at != 0:
            torch.testing.assert_close(state["exp_avg_sq"][1, 3], v[1, [0, 2, 3]].mean(0))


def test_every_block_has_a_mean_of_its_own():
    v = torch.rand(4, 3)
    state, real = {"exp_avg_sq": v.clone()}, torch.tensor([True, False, True, True])
    carry_rows(state, v.shape, -2, SOURCE, {"lr": 0.1}, "layer", Seed(real, None, [(0, 2), (2, 4)]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.stack([v[2], v[0], v[0], v[2:].mean(0)]))


def test_factored_second_moments():
    rows, columns = torch.rand(4), torch.rand(3)
    state = carried({"exp_avg_sq_row": rows.clone(), "exp_avg_sq_col": columns.clone()}, (4, 3), -2)
    mean = rows.mean()
    torch.testing.assert_close(state["exp_avg_sq_row"], torch.stack([rows[2], mean, rows[0], mean]))
    assert torch.equal(state["exp_avg_sq_col"], columns)


def test_seeds_follow_the_norms_that_were_observed():
    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(torch.rand(2, 6, 3))
    part = Slice(owner, "weight", name="experts", rank=3, side="output")  # rows 0, 2 and 4 of both
    norms2 = torch.tensor([[3.0, 5, 1, 7, 2, 0], [1, 2, 3, 4, 5, 6]], dtype=torch.float64)
    chosen = Selection(torch.tensor([[1, 2, 5], [0, 3, 5]]))
    ratio = torch.tensor([[5 / 2, 1 / 2, 0.01], [1 / 3, 4 / 3, 6 / 3]], dtype=torch.float64)
    seed = seed_for(part, chosen, norms2)
    torch.testing.assert_close(seed.ratio, ratio)
    v = torch.rand(2, 3, 3)
    torch.testing.assert_close(seed.of(v, -2), v.mean(-2, keepdim=True) * ratio.float()[..., None])
    assert seed_for(part, chosen, None).ratio is None  # a rule that observes nothing


def test_quantised_second_moments():
    bnb = pytest.importorskip("bitsandbytes.functional")
    code = bnb.create_dynamic_map(signed=False)
    v = torch.rand(4, 2048) + 0.5
    codes, made = bnb.quantize_blockwise(v, code=code, blocksize=256)
    state = carried(
        {"state1": torch.zeros(4, 2048), "state2": codes, "absmax2": made.absmax, "qmap2": code}, v.shape, -2
    )
    new = bnb.dequantize_blockwise(state["state2"], absmax=state["absmax2"], code=code, blocksize=256)
    torch.testing.assert_close(new[1], v.mean(0), rtol=0.05, atol=0.02)
    torch.testing.assert_close(new[0], v[2], rtol=0.05, atol=0.02)
