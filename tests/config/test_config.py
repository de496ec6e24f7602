"""Settings: what is read, what is refused, and that each refusal names the value and the remedy."""

import dataclasses

import pytest

from grass_hf import GrassConfig
from grass_hf.config import settings
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.config.presets import PRESETS

# arguments -> words that the sentence must hold
REFUSED = [
    ({"rank": 0}, ["rank=0", "1 or more"]),
    ({"rank": -3}, ["rank=-3", "1 or more"]),
    ({"rank": 2.5}, ["rank=2.5", "whole number"]),
    ({"rank": True}, ["rank=True", "whole number"]),
    ({"density": 0.0}, ["density=0.0", "(0, 1]"]),
    ({"density": 1.5}, ["density=1.5", "(0, 1]"]),
    ({"density": float("nan")}, ["density=nan"]),
    ({"rank": 8, "density": 0.5}, ["rank=8", "density=0.5", "keep one"]),
    ({"rank_pattern": {"q_proj": 8}}, ["rank_pattern", "density=0.25", "density_pattern", "or rank"]),
    ({"rank": 8, "density_pattern": {"q_proj": 0.5}}, ["density_pattern", "rank=8", "rank_pattern"]),
    ({"rank": 8, "rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']=0", "1 or more"]),
    ({"rank": 8, "rank_pattern": {"q_proj": 0.5}}, ["rank_pattern['q_proj']=0.5", "whole number"]),
    ({"density_pattern": {"q_proj": 2}}, ["density_pattern['q_proj']=2", "(0, 1]"]),
    ({"density_pattern": {"(q_proj": 0.5}}, ["density_pattern='(q_proj'", "not a valid regular expression"]),
    ({"density_pattern": {1: 0.5}}, ["density_pattern", "a mapping of patterns"]),
    ({"density_pattern": "q_proj"}, ["density_pattern='q_proj'", "a mapping of patterns"]),
    ({"update_interval": 0}, ["update_interval=0", "paper uses 200"]),
    ({"select_until": 0}, ["select_until=0", "leave it out"]),
    ({"update_interval": "200"}, ["update_interval='200'", "whole number"]),
    ({"selection": "topr"}, ["selection='topr'", "top_r"]),
    ({"side": "outputs"}, ["side='outputs'", "'output'"]),
    ({"state_policy": "keep"}, ["state_policy='keep'", "carry, carry_seeded, reset, reset_warmup"]),
    ({"decay": "none"}, ["decay='none'", "all, active"]),
    ({"slice_dtype": "fp32"}, ["slice_dtype='fp32'", "float32"]),
    ({"scale": 0.0}, ["scale=0.0", "1.0"]),
    ({"scale": float("inf")}, ["scale=inf"]),
    ({"seed": -1}, ["seed=-1"]),
    ({"stagger": True}, ["stagger=True", "a whole number"]),
    ({"stagger": 0}, ["stagger=0", "1 lets all layers select at once"]),
    ({"scale_warmup": -1}, ["scale_warmup=-1", "is negative"]),
    ({"target_modules": []}, ["target_modules", "all-linear"]),
    ({"target_modules": [1]}, ["target_modules", "list"]),
]
REFUSED_TEXT = [
    ("rnak=4", ["rnak", "rank"]),
    ("update_intervall=4", ["update_intervall", "did you mean update_interval"]),
    ("bse=sgd", ["bse", "base"]),
    ("zzz=4", ["zzz", "known are", "base"]),
    ("rank", ["'rank'", "key=value"]),
    ("rank=", ["key=value"]),
    ("rank=4,rank=5", ["rank", "twice"]),
    ("rank=four", ["rank='four'", "whole number"]),
    ("stagger=yes", ["stagger='yes'", "a whole number"]),
    ("share_index=yes", ["share_index='yes'", "true or false"]),
    ("rank=8,density=0.5", ["keep one"]),
    ("density_pattern=q_proj", ["density_pattern", "'q_proj'", "pattern:number"]),
    ("density_pattern=q_proj:half", ["'q_proj:half'", "pattern:number"]),
    ("selection=best", ["selection='best'"]),
]


@pytest.mark.parametrize("values, words", REFUSED, ids=lambda v: str(v)[:40])
def test_refused_with_name_value_and_remedy(values, words):
    with pytest.raises(ValueError) as error:
        GrassConfig(**values)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text, words", REFUSED_TEXT)
def test_optim_args_refused(text, words):
    with pytest.raises(ValueError) as error:
        parse_optim_args(text)
    for word in words:
        assert word in str(error.value)


def test_optim_args_are_read():
    text = "rank=256, update_interval=200,selection=top_r,base=adamw_torch,share_index=false,scale=0.25,base.eps=1e-6"
    parsed = parse_optim_args(text)
    assert parsed.config == GrassConfig(rank=256, selection="top_r", share_index=False, scale=0.25)
    assert parsed.base == "adamw_torch" and parsed.base_args == {"eps": "1e-6"}
    assert parse_optim_args(None).config == GrassConfig()
    assert parse_optim_args("target_modules=q_proj;v_proj").config.target_modules == ("q_proj", "v_proj")
    assert parse_optim_args(r"target_modules=.*\.mlp\..*").config.target_modules == r".*\.mlp\..*"
    said = parse_optim_args("density_pattern=(?:q|k)_proj:0.5;.*mlp.*:1").config
    assert said.density_pattern == {"(?:q|k)_proj": 0.5, ".*mlp.*": 1} and said.density == 0.25
    assert parse_optim_args("rank=8,rank_pattern=q_proj:4").config == GrassConfig(rank=8, rank_pattern={"q_proj": 4})
    assert parse_optim_args("slice_dtype=none").config.slice_dtype is None
    assert GrassConfig.from_optim_args("rank=8").rank == 8
    assert parse_optim_args("rank=8", target_modules=["q_proj"]).config.target_modules == ("q_proj",)


def test_presets_are_sets_of_fields_that_others_override():
    assert GrassConfig.preset("default") == GrassConfig()
    paper = GrassConfig.from_dict({"preset": "paper", "update_interval": 50})
    assert (paper.selection, paper.state_policy, paper.side, paper.update_interval) == ("top_r", "reset", "output", 50)
    assert GrassConfig.preset("paper", rank=8).density is None
    assert GrassConfig.preset("pretraining") == GrassConfig(selection="cycle")
    parsed = parse_optim_args("preset=max_memory,rank=8,side=input,base=adamw_torch", target_modules=["q_proj"])
    assert parsed.config == GrassConfig(rank=8, side="input", resident=False, target_modules=["q_proj"])
    for name, words in (
        ("papre", "did you mean paper"),
        ("x", "known are default, max_memory, muon, muon_eighth, muon_quarter, paper, pretraining"),
    ):
        with pytest.raises(ValueError, match=words):
            GrassConfig.preset(name)
        with pytest.raises(ValueError, match=words):
            parse_optim_args(f"preset={name}")


def test_a_preset_may_name_a_base_optimizer_too():
    parsed = parse_optim_args("preset=muon")
    (attention,) = parsed.config.density_pattern
    assert parsed.config == GrassConfig(density=0.25, density_pattern={attention: 1.0}) and parsed.base == "muon"
    parsed = parse_optim_args("preset=muon,rank=8,base=adamw_torch")
    assert (parsed.config, parsed.base) == (GrassConfig(rank=8), "adamw_torch")
    parsed = parse_optim_args("preset=muon_quarter,rank=8")  # which replaces both ways of saying the same
    assert (parsed.config, parsed.base) == (GrassConfig(rank=8), "muon")
    # which a config alone would not follow
    for values, said in (({"preset": "muon"}, "preset='muon'"), ({"base": "sgd"}, "base='sgd'")):
        with pytest.raises(ValueError, match=f"^{said} names the optimizer .* a GrassConfig does not hold"):
            GrassConfig.from_dict(values)


def test_defaults_and_those_of_the_paper():
    config, paper = GrassConfig(), GrassConfig.preset("paper")
    assert (config.density, config.update_interval, config.target_modules) == (0.25, 200, "all-linear")
    assert (config.selection, config.side, config.state_policy) == ("multinomial_norm_nr", "input", "carry_seeded")
    # Algorithm 1: these four are what differs
    algorithm_1 = {"selection": "top_r", "side": "output", "state_policy": "reset", "stagger": 1}
    assert paper == GrassConfig(**algorithm_1)
    # and a change of a default does not reach it
    said = {**algorithm_1, "density": 0.25, "update_interval": 200, "target_modules": "all-linear"}
    assert PRESETS["paper"] == said and PRESETS["default"] == {}
    assert GrassConfig(rank=64).density is None


def test_unknown_key_of_a_dict_names_the_nearest():
    with pytest.raises(ValueError, match=r"'intervall'.*did you mean update_interval\?"):
        GrassConfig.from_dict({"intervall": 3})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GrassConfig().rank = 3


def test_dict_round_trip():
    config = GrassConfig(rank=3, rank_pattern={"a": 2}, target_modules=["a", "b"], slice_dtype="float32", seed=7)
    assert GrassConfig.from_dict(config.to_dict()) == config
    assert type(config.to_dict()["target_modules"]) is list


def test_yaml(tmp_path):
    file = tmp_path / "grass.yaml"
    file.write_text("rank: 16\nselection: uniform_nr\ntarget_modules: [q_proj]\n")
    assert GrassConfig.from_yaml(file) == GrassConfig(rank=16, selection="uniform_nr", target_modules=["q_proj"])
    for text, word in [("rank: [", "not valid YAML"), ("- 3", "list"), ("rnk: 3", "rank")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=word):
            GrassConfig.from_yaml(file)
    with pytest.raises(ValueError, match="cannot be read"):
        GrassConfig.from_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    "config, size, rank", [({"rank": 5}, 3, 5), ({"density": 0.25}, 10, 2), ({"density": 0.01}, 9, 1)]
)
def test_rank_for(config, size, rank):
    assert GrassConfig(**config).rank_for(size) == rank


# Algorithm 1's rules, section 3.3 and Table 1 of the paper.
OF_THE_PAPER = {
    "selection": {
        "top_r",
        "uniform",
        "uniform_nr",
        "multinomial_norm",
        "multinomial_norm_nr",
        "multinomial_norm2",
        "multinomial_norm2_nr",
    },
    "state_policy": {"reset"},
}


@pytest.mark.parametrize("field", OF_THE_PAPER)
def test_what_is_neither_the_papers_nor_in_use_is_marked_as_research(field):
    in_use = {getattr(GrassConfig(), field), *(preset.get(field) for preset in PRESETS.values())}
    assert set(settings.RESEARCH[field]) == set(settings._CHOICES[field]) - OF_THE_PAPER[field] - in_use
    for value in settings.RESEARCH[field]:
        said = " ".join(GrassConfig.__doc__.split())
        assert f'"{value}", research)' in said or f'"{value}" is research' in said
