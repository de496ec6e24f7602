"""Communication hooks and local SGD: two ranks that send or average in other ways than DDP does."""

import pytest
import torch
from forks import ranks


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    file = tmp_path_factory.mktemp("hooks") / "found.pt"
    ranks(2, "averaging.hooks", str(file), 2)
    return torch.load(file)


@pytest.mark.parametrize("hook", ["fp16", "powersgd"])
def test_at_full_rank_a_hook_does_what_it_does_to_plain_training(hooks, hook):
    plain, ours = hooks[hook, None]["weights"], hooks[hook, 1.0]["weights"]
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_residuals_of_rows_that_left_are_dropped(hooks):
    assert hooks["powersgd", None]["kept"] == [False] * 2 + [True] * 6
    assert hooks["powersgd", 1.0]["kept"] == [False] * 2 + [True] * 6, "no row leaves"
    # rows change after steps 0, 3 and 6
    assert hooks["powersgd", 0.25]["kept"] == [False, False, True, False, True, True, False, True]


def test_averages_of_parameters_stop_or_are_right(tmp_path):
    file = tmp_path / "found.pt"
    ranks(2, "averaging.local_sgd", str(file), 2)
    found = torch.load(file)
    for name in ("averager", "optimizer"):
        assert "was changed and its weight was not" in found[name] and "local SGD" in found[name]
    assert found["accelerate"] == {"agree": True, "same": True}
