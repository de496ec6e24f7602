"""`optim_args` in every form in which tools hand it on: text, a mapping, a mapping that became text."""

import json
from collections import UserDict

import pytest
import torch
import yaml
from helpers import trainer
from transformers import HfArgumentParser, TrainingArguments

from grass_hf import GrassConfig
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.convert.conversion import grass_slices

YAML = r"""
rank: 16
update_interval: 50
scale: 2.5e-1
share_index: false
select_until: null
slice_dtype: null
target_modules: [q_proj, v_proj]
exclude_modules: .*\.0\..*
rank_pattern:
  (q|k)_proj: 8
  '.*mlp\.(up|down){1,2}_proj': 4
selection: cycle
seed: 3
base: sgd
base.momentum: 0.9
base.nesterov: true
base.maximize: null
"""
MAPPING = yaml.safe_load(YAML)
CONFIG = GrassConfig(
    rank=16,
    update_interval=50,
    scale=0.25,
    share_index=False,
    target_modules=("q_proj", "v_proj"),
    exclude_modules=r".*\.0\..*",
    rank_pattern={"(q|k)_proj": 8, r".*mlp\.(up|down){1,2}_proj": 4},
    selection="cycle",
    seed=3,
)
# what tools make of a mapping
FORMS = {
    "mapping": lambda given: given,
    "another mapping": UserDict,
    "python": str,
    "json": json.dumps,
    "json with indents": lambda given: json.dumps(given, indent=2),
    "pairs": lambda given: ",".join(f"{key}={value}" for key, value in given.items()),  # axolotl
    "pairs with spaces": lambda given: ", ".join(f"{key} = {value}" for key, value in given.items()),
    "values as text": lambda given: {key: str(value) for key, value in given.items()},
    "yaml again": lambda given: yaml.safe_load(yaml.safe_dump(given)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form):
    parsed = parse_optim_args(FORMS[form](MAPPING))
    assert parsed.config == CONFIG
    assert parsed.base == "sgd"
    assert parsed.base_args == {"momentum": "0.9", "nesterov": "True", "maximize": "None"}
    assert GrassConfig.from_optim_args(FORMS[form](MAPPING)) == CONFIG


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "config",
    [
        GrassConfig(),
        GrassConfig(density=0.5, density_pattern={"(?:q|k)_proj": 0.75, ".*mlp.*": 1.0}, target_modules="all-matrices"),
        GrassConfig(rank=3, side="output", resident=False, scale_warmup=9, exclude_modules=("a", "b")),
        GrassConfig(rank=3, target_modules=r"model\.layers\.[0-9]{1,2}\.(q|k)_proj"),
        GrassConfig(rank=3, target_modules=("q_proj",), slice_dtype="bfloat16", weight_dtype="int8", side="output"),
    ],
    ids=["defaults", "density", "rank", "a regular expression", "one suffix"],
)
def test_there_and_back(config, form):
    fields = config.to_dict()
    assert parse_optim_args(FORMS[form](fields)).config == config


@pytest.mark.parametrize(
    "given, words",
    [
        ({"rnk": 8}, "'rnk' is not a setting of Grass: did you mean rank?"),
        ({"base.": 1}, "'base.' is not a setting of Grass"),
        ({True: 8}, "'True' is not a setting of Grass"),
        ({"rank": "eight"}, "rank='eight' is not a whole number"),
        ({"rank": 8.5}, "rank=8.5 is a float: rank takes a whole number"),
        ({"rank": True}, "rank=True is a bool"),
        ({"rank": [8]}, "rank=(8,) is a tuple: rank takes a whole number"),
        ({"rank": {"q_proj": 8}}, "rank={'q_proj': 8} is a dict: rank takes a whole number"),
        ({"share_index": 1}, "share_index=1 is a int: share_index takes true or false"),
        ({"side": "inptu"}, "side='inptu' is not known: did you mean 'input'?"),
        ({"rank_pattern": {"q_proj": "many"}, "rank": 4}, "rank_pattern['q_proj']='many' is a str"),
        ({"rank_pattern": ["q_proj"], "rank": 4}, "rank_pattern=('q_proj',) is a tuple"),
        ({"target_modules": [1]}, "target_modules=(1,) is a tuple"),
        ({"base": {"name": "sgd"}}, "base={'name': 'sgd'} is a dict and not a name: write 'base: sgd'"),
        ({"preset": 3}, "preset=3 is a int and not a name"),
        ({"rank": 8, "density": 0.5}, "rank=8 and density=0.5 were both given"),
        (["rank=8"], "optim_args=['rank=8'] is a list: give text of the form key=value"),
        (8, "optim_args=8 is a int"),
        ("{rank: 8}", "begins as a mapping and is neither JSON nor a Python dict: write key=value"),
        ("{'rank': 8", "begins as a mapping"),
        ('{"rnk": 8}', "did you mean rank?"),
        ("target_modules=[q_proj,v_proj", "'v_proj' is not of the form key=value"),
        ("rank_pattern={'q_proj': 'x'},rank=4", "rank_pattern['q_proj']='x' is a str"),
    ],
)
def test_what_is_wrong_is_said(given, words):
    with pytest.raises(ValueError) as error:
        parse_optim_args(given)
    assert words in str(error.value)


def test_nothing_and_null_are_the_defaults():
    for given in (None, "", {}, "{}", {"rank": None, "density": None}, {"base": None, "preset": None}):
        assert parse_optim_args(given) == parse_optim_args(None)
    assert parse_optim_args({"preset": "muon", "base": None}).base == "muon"
    assert parse_optim_args({"rank": 8}, density=0.5).config == GrassConfig(rank=8)
    assert parse_optim_args({"rank": None}, density=0.5).config == GrassConfig(density=0.5)


def through_yaml(path, output):
    path.write_text(yaml.safe_dump({"output_dir": str(output), "optim": "grass", "optim_args": MAPPING}))
    return HfArgumentParser(TrainingArguments).parse_yaml_file(str(path))[0]


def through_trl(path, output):
    trl = pytest.importorskip("trl")
    path.write_text(yaml.safe_dump({"output_dir": str(output), "optim": "grass", "optim_args": MAPPING}))
    return trl.TrlParser(TrainingArguments).parse_args_and_config(["--config", str(path)])[0]


def through_flags(path, output):
    words = ["--output_dir", str(output), "--optim", "grass", "--optim_args", json.dumps(MAPPING)]
    return HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)[0]


@pytest.mark.parametrize("parse", [through_yaml, through_trl, through_flags])
def test_parsers_of_the_tools_hand_it_on(tmp_path, parse):
    args = parse(tmp_path / "settings.yaml", tmp_path / "out")
    assert parse_optim_args(args.optim_args).config == CONFIG
    # what is filed beside a run, and made arguments of again
    for form in (args.to_dict(), json.loads(args.to_json_string())):
        again = TrainingArguments(output_dir=form["output_dir"], optim=form["optim"], optim_args=form["optim_args"])
        assert parse_optim_args(again.optim_args).config == CONFIG
    assert "optim_args" in args.to_sanitized_dict()


def test_a_mapping_trains_as_its_text_does(tmp_path):
    mapping = {"rank": 8, "update_interval": 2, "base": "adamw_torch", "base.betas": [0.8, 0.95]}
    models = []
    for number, given in enumerate((mapping, json.dumps(mapping), "rank=8,update_interval=2,base=adamw_torch")):
        options = {"adam_beta1": 0.8, "adam_beta2": 0.95} if number == 2 else {}
        job = trainer(
            tmp_path / str(number), optim_args=given, max_steps=3, save_strategy="steps", save_steps=3, **options
        )
        job.train()
        assert job.optimizer.param_groups[0]["betas"] == (0.8, 0.95)
        assert {slice_.state.rank for slice_ in grass_slices(job.model)} == {8}
        models.append(job.model.state_dict())
        saved = torch.load(tmp_path / str(number) / "checkpoint-3" / "training_args.bin", weights_only=False)
        assert saved.optim_args == given
    for name, weight in models[0].items():
        assert all(torch.equal(weight, other[name]) for other in models[1:])
