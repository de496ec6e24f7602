"""What is replaced while a step is simulated: it is used, and put back afterwards."""

import pytest
import torch
from helpers import tiny_llama

from grass_hf import GrassConfig, estimate_memory
from grass_hf.integrations.simulation import replaced
from grass_hf.measure.estimate import simulate
from grass_hf.measure.estimate.live_bytes import LiveBytes
from grass_hf.slices.ops import row_norms


def test_norms_are_computed_as_far_as_memory_goes(monkeypatch):
    """The whole of them takes most of the time of a simulation."""
    calls, shortened = [], simulate._norms_of_the_last_blocks

    def counted(a, b):
        calls.append(a.shape)
        return shortened(a, b)

    monkeypatch.setattr(simulate, "_norms_of_the_last_blocks", counted)
    estimate_memory(tiny_llama(), GrassConfig(rank=4, stagger=1), batch=1, sequence=8)
    assert len(calls) >= 7
    a, b = torch.randn(3, 5), torch.randn(3, 4)
    seen = len(calls)
    torch.testing.assert_close(row_norms.squared_norms(a, b), (a.t() @ b).square().sum(1))
    assert len(calls) == seen


class Base:
    def name(self):
        return "base"


class Derived(Base):
    def other(self):
        return "own"


@pytest.mark.parametrize("name", ["name", "other"])
def test_what_is_replaced_comes_back_also_after_an_error(name):
    before, own = getattr(Derived(), name)(), dict(vars(Derived))
    with pytest.raises(KeyError), replaced(Derived, name, lambda self: "other"):
        assert getattr(Derived(), name)() == "other"
        raise KeyError
    assert getattr(Derived(), name)() == before and dict(vars(Derived)) == own


def test_storages_are_resized_by_torch_again_after_counting():
    before = torch.UntypedStorage.resize_
    with LiveBytes():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before
