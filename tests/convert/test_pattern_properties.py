"""Whatever is named: what exclude_modules matches is never taken, and the order of names does not matter."""

import re

import pytest
from properties import hypothesis, st
from torch import nn

from grass_hf import GrassConfig
from grass_hf.convert.patterns import matched_uses

given = hypothesis.given

LEAVES = ("q_proj", "v_proj", "up_proj", "proj", "head")


class Block(nn.Module):
    def __init__(self, leaves):
        super().__init__()
        for leaf in leaves:
            setattr(self, leaf, nn.Linear(2, 2))


def model(shapes) -> nn.Module:
    """Two levels of blocks: "layers.0.mlp.up_proj"."""
    made = nn.Module()
    made.layers = nn.ModuleList(nn.ModuleDict({name: Block(leaves) for name, leaves in shape}) for shape in shapes)
    made.head = nn.Linear(2, 2)
    return made


blocks = st.tuples(st.sampled_from(("mlp", "self_attn", "proj")), st.sets(st.sampled_from(LEAVES), min_size=1))
models = st.lists(st.lists(blocks, min_size=1, max_size=2), min_size=1, max_size=3).map(model)
ends = st.lists(
    st.sampled_from((*LEAVES, "mlp.up_proj", "self_attn.q_proj", "0.mlp.proj", "mlp", "q", "roj")),
    min_size=1,
    max_size=3,
    unique=True,
).map(tuple)
patterns = st.sampled_from(
    (".*", ".*q_proj", r".*\.(mlp|self_attn)\..*", r"layers\.0\..*", "q_proj", ".*(q|v)_proj", "head", ".*head")
)


def names(module, config) -> set[str] | str:
    """What is taken, or the sentence that says why nothing can be."""
    try:
        return {use.name for use in matched_uses(module, config)[0]}
    except ValueError as error:
        return str(error)


def matches(pattern, name: str) -> bool:
    """The rule as the docs have it: the end of a name after a dot, or a regular expression for the whole name."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in pattern)


def linears(module) -> set[str]:
    return {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}


@given(models, st.just("all-linear") | patterns | ends, st.none() | patterns | ends)
def test_what_is_excluded_is_never_taken_and_the_rest_is(module, target, exclude):
    config = GrassConfig(density=0.5, target_modules=target, exclude_modules=exclude)
    excluded = {name for name in linears(module) if exclude is not None and matches(exclude, name)}
    wanted = linears(module) if target == "all-linear" else {n for n in linears(module) if matches(target, n)}
    taken = names(module, config)
    if isinstance(taken, set):
        assert taken == wanted - excluded
        return
    # a sentence that begins with the field which is wrong, and only where one is
    everything = [name for name, _ in module.named_modules()]
    useless = isinstance(target, tuple) and not all(any(matches((end,), n) for n in everything) for end in target)
    assert taken.startswith(("target_modules", "exclude_modules"))
    assert useless or not wanted - excluded or (exclude is not None and not excluded)


@given(models, ends, st.none() | ends, st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(module, target, exclude, random):
    def shuffled(ends):
        return None if ends is None else tuple(random.sample(ends, len(ends)))

    first = names(module, GrassConfig(target_modules=target, exclude_modules=exclude))
    other = names(module, GrassConfig(target_modules=shuffled(target), exclude_modules=shuffled(exclude)))
    assert first == other or (isinstance(first, str) and isinstance(other, str))


@given(models, ends)
def test_a_list_and_its_regular_expression_take_the_same(module, target):
    expression = rf"(.*\.)?({'|'.join(map(re.escape, target))})"
    by_list, by_pattern = (names(module, GrassConfig(target_modules=said)) for said in (target, expression))
    if isinstance(by_list, set):
        assert by_list == by_pattern


@given(models, ends, patterns | ends)
def test_excluding_more_takes_nothing_more(module, target, exclude):
    all_of_them = names(module, GrassConfig(target_modules=target))
    fewer = names(module, GrassConfig(target_modules=target, exclude_modules=exclude))
    if isinstance(fewer, set):
        assert fewer <= all_of_them


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "[z-a]", "*"])
def test_what_is_no_regular_expression_is_refused_by_its_field(pattern):
    module = model([[("mlp", {"q_proj"})]])
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=rf"^{field}=.* is not a valid regular expression"):
            matched_uses(module, GrassConfig(**{field: pattern}))
