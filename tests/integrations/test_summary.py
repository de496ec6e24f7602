"""The table that a run starts with, also for loops of one's own: `grass_hf.summary`."""

import pytest
import torch
from helpers import tiny_llama
from torch import nn

import grass_hf
from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations.coverage import coverage_of


def made(model, **settings):
    convert_to_grass(model, GrassConfig(**settings))
    return grass_optimizer(model, torch.optim.AdamW, lr=1e-3)


def test_it_prints_what_is_trained_and_how(capsys):
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    optimizer = made(model, density=0.25, update_interval=7, scale=0.5, selection="top_r")
    report = grass_hf.summary(model, optimizer, steps=100)
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "AdamW",
        "K = 7",
        "top_r",
        "slices 0.0005",
        "others 0.001",
        f"{total:,} parameters",
        "after 100 steps",
    ):
        assert words in printed
    assert f"{total:,} parameters" in printed
    assert report.elements == report.trained_in_all == total
    assert report.trained_now == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "will ever be trained" not in printed  # 28 steps reach every row


def test_a_run_that_is_too_short_is_told_how_much_it_reaches(capsys):
    model = tiny_llama()
    grass_hf.summary(model, made(model, density=0.25, update_interval=100, stagger=1, selection="cycle"), steps=200)
    printed = " ".join(capsys.readouterr().out.split())
    assert "K x 1/density = 400 steps would reach every row, and 200 are planned" in printed
    assert "about 62% of the compressed weights will ever be trained" in printed


@pytest.mark.parametrize("stagger", [1, 3])
@pytest.mark.parametrize("selection", ["cycle", "uniform_nr", "top_r"])
def test_a_run_reaches_no_more_than_the_table_says(selection, stagger):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    optimizer = made(model, density=0.125, update_interval=3, selection=selection, stagger=stagger)
    said = grass_hf.summary(model, optimizer, steps=10).coverage
    for _ in range(10):
        model(torch.randn(4, 32)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    reached = optimizer.grass.metrics()["grass/coverage"]
    assert reached <= said.most + 1e-6
    if stagger == 1 and selection == "cycle":
        assert reached == pytest.approx(said.expected, abs=0.03)
    if selection == "uniform_nr":
        assert reached == pytest.approx(said.expected, abs=0.06)


def test_at_80_columns_every_name_can_be_read():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.ModuleDict(
                {"a_rather_long_name_of_a_block": nn.ModuleDict({"projection_of_queries": nn.Linear(64, 4096)})}
            )
            self.transformer_of_the_model = nn.ModuleDict({"layers_of_the_decoder": inner})

    model = Deep()
    text = str(grass_hf.summary(model, made(model, density=0.25)))
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    names = "".join(line.split("4096")[0].strip(" 1") for line in text.splitlines())
    whole = "transformer_of_the_model.layers_of_the_decoder.a_rather_long_name_of_a_block.projection_of_queries"
    for part in whole.split("."):
        assert part in names
    model = tiny_llama()
    text = str(grass_hf.summary(model, made(model, density=0.25)))
    assert "model.layers.*.self_attn.q_proj" in text and "lm_head.weight" in text


def test_coverage_stops_with_the_selections():
    config = GrassConfig(density=0.25, update_interval=10, select_until=20, stagger=1, selection="cycle")
    assert coverage_of([(1, 4, 8)], config, 1000).expected == 0.625


def test_what_is_no_grass_run_gets_a_sentence():
    model = nn.Sequential(nn.Linear(8, 8))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="convert_to_grass"):
        grass_hf.summary(model, plain)
    optimizer = made(model, density=0.5)
    with pytest.raises(ValueError, match="grass_optimizer"):
        grass_hf.summary(model, plain)
    with pytest.raises(ValueError, match="steps=0"):
        grass_hf.summary(model, optimizer, steps=0)


def test_the_bytes_of_slices_are_those_between_steps():
    def table_of(dtype, **settings):
        model = tiny_llama().to(dtype)
        report = grass_hf.summary(model, made(model, density=0.5, **settings))
        return report.grass.slices, sum(slice_.active.numel() for slice_ in grass_slices(model))

    for dtype, settings, each in (
        (torch.bfloat16, {}, 4),
        (torch.bfloat16, {"resident": False}, 2),
        (torch.bfloat16, {"resident": False, "slice_dtype": "bfloat16"}, 0),
        (torch.float32, {"resident": False}, 0),
    ):
        found, numbers = table_of(dtype, **settings)
        assert found == each * numbers
