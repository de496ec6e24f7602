"""Any settings are read back as they were written, and what cannot be read is one sentence with the field's name."""

import dataclasses
import json

import pytest
import yaml
from properties import configs, expressions, hypothesis, names, shares, st

from grass_hf import GrassConfig
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.config.settings import FIELD_TYPES

given, example = hypothesis.given, hypothesis.example


def written(value) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, dict):
        return ";".join(f"{pattern}:{number!r}" for pattern, number in value.items())
    if isinstance(value, tuple):
        return ";".join(value) + (";" if len(value) == 1 else "")
    return str(value)


def rendered(config: GrassConfig) -> str:
    """A config as the text of --optim_args; fields that have none of the two ways to say a rank are left out."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ",".join(f"{name}={written(value)}" for name, value in fields.items())


@given(configs())
def test_every_config_comes_back_from_a_dict_json_and_yaml(config):
    fields = config.to_dict()
    assert GrassConfig.from_dict(fields) == config
    assert GrassConfig.from_dict(json.loads(json.dumps(fields))) == config
    assert GrassConfig.from_dict(yaml.safe_load(yaml.safe_dump(fields))) == config


@given(configs())
def test_every_config_comes_back_from_optim_args(config):
    assert parse_optim_args(rendered(config)).config == config
    fields = config.to_dict()
    for form in (fields, str(fields), json.dumps(fields)):
        parsed = parse_optim_args(form)
        assert parsed.config == config and parsed.base is None and parsed.base_args == {}


@given(configs(), st.dictionaries(names.map(lambda name: name.replace(".", "_")), st.floats(0, 1), max_size=3))
def test_the_base_optimizers_arguments_stand_beside_any_config(config, base):
    text = ",".join([rendered(config), "base=sgd", *(f"base.{name}={value!r}" for name, value in base.items())])
    parsed = parse_optim_args(text)
    assert (parsed.config, parsed.base) == (config, "sgd")
    assert {name: float(value) for name, value in parsed.base_args.items()} == base


def outcome(read, *args) -> str:
    """What was said of a mistake; any other error than a `ValueError` of ours goes through."""
    try:
        read(*args)
    except ValueError as error:
        return str(error)
    return ""


@given(st.text(max_size=40) | st.text("{}[]()'\":,;=.0123456789abnr \n", max_size=40))
@example("{[1]: 2}")
@example("{'a': [1]}")
@example('{"a":' * 5000)
def test_any_text_is_read_or_refused_with_a_sentence(text):
    said = outcome(parse_optim_args, text)
    assert not said or said.startswith("optim_args") or any(name in said for name in (*FIELD_TYPES, "preset"))


@pytest.mark.parametrize("field", [*FIELD_TYPES, "preset"])
@given(text=st.text(max_size=30).filter(lambda text: not set(text) & set(",=")))
@example(text="[")
@example(text="{1: 2}")
@example(text="a{99999999999}:1")
@hypothesis.settings(max_examples=15)
def test_any_value_of_a_field_is_read_or_refused_with_its_name(field, text):
    said = outcome(parse_optim_args, f"{field}={text}")
    assert not said or field in said


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("field", [*FIELD_TYPES, "preset"])
@given(value=anything | st.sets(st.integers() | st.text(max_size=3), max_size=3))
@example(value={1, "a"})
@example(value=["a"])
@example(value={"a{99999999999}": 1})
@example(value=float("nan"))
@hypothesis.settings(max_examples=15)
def test_any_object_is_taken_or_refused_with_its_name(field, value):
    beside = {"rank": 4} if field == "rank_pattern" else {}
    for read in (GrassConfig.from_dict, parse_optim_args):
        said = outcome(read, {field: value} | beside)
        assert not said or field in said
        assert not said or said[-1] in ".?"


@given(st.text(max_size=8) | st.integers() | st.none() | st.booleans())
def test_an_unknown_setting_is_named(key):
    hypothesis.assume(key not in FIELD_TYPES and key not in ("preset", "base"))
    assert repr(key).strip("'\"") in outcome(GrassConfig.from_dict, {key: 1})
    assert "optim_args" in outcome(parse_optim_args, {key: 1}) or str(key).startswith("base.")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x01", b"a: 2001-99-99", b"{", b"- 1", b"3: 4", b"preset: [paper]", b"a: &x [*x]"]
)
def test_any_file_is_read_or_refused_with_its_name(tmp_path, content):
    path = tmp_path / "grass.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        GrassConfig.from_yaml(path)
    assert (
        str(path) in str(error.value) or "is not a setting of Grass" in str(error.value) or "preset" in str(error.value)
    )


@given(shares, st.integers(1, 10**6), expressions)
def test_a_density_gives_a_rank_between_one_and_the_side(density, size, key):
    config = GrassConfig(density=density, density_pattern={key: density})
    assert 1 <= config.rank_for(size) <= size
    assert config.rank_for(size, "model.layers.0.mlp.up_proj") == config.rank_for(size)
