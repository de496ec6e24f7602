"""A float32 number is a bfloat16 and sixteen bits more: `grass_hf.slices.low_bits`."""

import torch

from grass_hf.slices.low_bits import castable, joined, low_bits, low_bits_of_cast, rounded


def of_bits(*bits):
    return torch.tensor([bit - (bit >> 31 << 32) for bit in bits], dtype=torch.int32).view(torch.float32)[None]


FIRST = torch.tensor([0])


def test_ties_and_signs():
    edges = of_bits(0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x8000, 0x80000001, 0x7F7FFFFF, 0x3F80FFFF)
    values = torch.cat([edges, torch.randn(1, 4096)], dim=1)
    weight = rounded(values)
    assert (weight.float() - values)[:, :6].abs().le(values[:, :6].abs().clamp(min=1e-37) * 2**-8).all()
    assert torch.equal(weight[:, 8:], values[:, 8:].bfloat16())
    assert torch.equal(joined(weight, FIRST, -2, low_bits(values, weight, FIRST)), values)


def test_ties_that_were_cast():
    values = torch.cat([of_bits(0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x8000), torch.randn(1, 4096)], dim=1)
    weight = values.bfloat16()
    back = joined(weight, FIRST, -2, low_bits_of_cast(values))
    assert torch.equal(back.bfloat16(), weight) and torch.equal(back[:, 5:], values[:, 5:])
    assert (back.view(torch.int32) - values.view(torch.int32)).abs().tolist()[0][:5] == [1, 0, 1, 0, 1]
    away = rounded(values)
    cast = joined(away, FIRST, -2, castable(low_bits(values, away, FIRST)))
    assert torch.equal(cast.bfloat16(), away) and (cast.view(torch.int32) - values.view(torch.int32)).abs().max() == 1


def test_infinities_stay_infinities_and_nan_stays_nan():
    values = of_bits(0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)
    weight = rounded(values)
    assert torch.equal(weight.float(), values) or torch.equal(weight[:, :2].float(), values[:, :2])
    assert weight[:, 2:].isnan().all()
    back = joined(weight, FIRST, -2, low_bits(values, weight, FIRST))
    assert torch.equal(back[:, :2], values[:, :2]) and back[:, 2:].isnan().all()


def test_low_bits_that_no_number_of_this_weight_can_have_do_not_count():
    weight = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, 1.0]], dtype=torch.bfloat16)
    for low in (-(2**15), -1, 1, 2**15 - 1):
        back = joined(weight, FIRST, -2, torch.full((1, 5), low, dtype=torch.int16))
        assert not back.isnan().any() and (back.bfloat16()[:, 4] - 1).abs() <= 2**-7
        assert back[:, :2].abs().max() < 1e-38 and (back[:, 2:4].abs() > 3e38).all()
