"""What the property-based tests share: hypothesis with its settings, and configs with any valid values.

CI runs the same examples every time (``derandomize``); elsewhere each run tries new ones.
"""

import os

import pytest

hypothesis = pytest.importorskip("hypothesis")  # the environment of the oldest versions has none

from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from grass_hf.config.settings import SELECTIONS, SIDES, WITH_REPLACEMENT, GrassConfig  # noqa: E402

settings.register_profile("grass", deadline=None, database=None, max_examples=50)
settings.register_profile("grass-ci", settings.get_profile("grass"), derandomize=True)
settings.load_profile("grass-ci" if os.environ.get("CI") else "grass")

# Names of modules: "m3", "m0.q_proj.m_9".
_parts = st.text("aq_09", max_size=4).map("m{}".format)
names = st.lists(_parts, min_size=1, max_size=3).map(".".join)
# Regular expressions, put together of pieces that people write.
_PIECES = (".*", r"\.", "mlp", "(q|k)_proj", "layers", "[0-9]+", "v{1,2}", r"\d", "(?:up|down)", "attn", ":")
expressions = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=4).map("".join)
suffixes = st.lists(names, min_size=1, max_size=3).map(tuple)
counts = st.integers(1, 10**9)
shares = st.floats(1e-6, 1.0)


@st.composite
def configs(draw) -> GrassConfig:
    """Any config that is valid: every field has any of its values, those that exclude each other apart."""
    int8 = draw(st.booleans())
    resident = int8 or draw(st.booleans())
    plain = [rule for rule in SELECTIONS if rule not in WITH_REPLACEMENT]
    fields = {
        "update_interval": draw(counts),
        "select_until": draw(st.none() | counts),
        "selection": draw(st.sampled_from(SELECTIONS if resident and not int8 else plain)),
        "score_by": draw(st.sampled_from(("batch", "sequence"))),
        "side": "output" if int8 else draw(st.sampled_from(SIDES)),
        "share_index": draw(st.booleans()),
        "scale": draw(st.floats(1e-300, 1e300) | st.integers(1, 9)),
        "scale_warmup": draw(st.integers(0, 10**9)),
        "target_modules": draw(st.sampled_from(("all-linear", "all-matrices")) | suffixes | expressions),
        "exclude_modules": draw(st.none() | suffixes | expressions),
        "state_policy": draw(st.sampled_from(("carry", "carry_seeded", "reset", "reset_warmup"))),
        "stagger": draw(counts),
        "decay": draw(st.sampled_from(("all", "active"))),
        "slice_dtype": draw(st.sampled_from((None, "float32", "bfloat16", "float16", "float64"))),
        "rounding": draw(st.sampled_from(("stochastic", "nearest"))),
        "row_blocks": draw(counts),
        "resident": resident,
        "weight_dtype": "int8" if int8 else None,
        "seed": draw(st.integers(0, 2**63)),
    }
    kind, values = draw(st.sampled_from((("rank", counts), ("density", shares))))
    fields[kind] = draw(values)
    fields[f"{kind}_pattern"] = draw(st.none() | st.dictionaries(expressions, values, min_size=1, max_size=3))
    return GrassConfig(**fields)
