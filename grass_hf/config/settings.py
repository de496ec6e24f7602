"""The settings of a Grass run: one frozen object, validated once, stdlib only.

The same fields are read from a dict, a YAML file, and the Trainer's ``--optim_args`` string; an unknown
key stops with the nearest valid one, because the Trainer itself would ignore it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import fields, presets, written

# The names of DESIGN's table; their maths is in `grass_hf.slices.ops.selection`.
# Rules that draw with replacement, so that their slices carry multipliers, and the others.
WITH_REPLACEMENT = ("multinomial_norm", "multinomial_norm2", "uniform")
_WITHOUT = ("top_r", "multinomial_norm_nr", "multinomial_norm2_nr", "multinomial_stale_nr", "uniform_nr", "cycle")
SELECTIONS = (*_WITHOUT, *WITH_REPLACEMENT)
SIDES = ("output", "input", "auto")
_CHOICES = {
    "selection": SELECTIONS,
    "side": SIDES,
    "score_by": ("batch", "sequence"),
    "state_policy": ("carry", "carry_seeded", "reset", "reset_warmup"),
    "decay": ("all", "active"),
    "rounding": ("stochastic", "nearest"),
    "weight_dtype": ("int8",),
    "slice_dtype": ("float32", "bfloat16", "float16", "float64"),
}

# The least value of whole numbers, and what is said of smaller ones.
_LEAST = {
    "update_interval": (1, "not a positive number of steps: the paper uses 200"),
    "select_until": (1, "not a positive number of steps: leave it out"),
    "scale_warmup": (0, "negative: give a number of optimizer steps, or 0"),
    "stagger": (1, "not a positive number of steps: 1 lets all layers select at once"),
    "row_blocks": (1, "not a positive number of parts: 1 has no parts"),
    "seed": (0, "negative: give 0 or a positive integer"),
}

# What int8 weights do not go with, and what to use instead.
_INT8_NEEDS = (
    ("side", ("input", "auto"), "output"),
    ("selection", WITH_REPLACEMENT, "multinomial_norm_nr"),
    ("resident", (False,), True),
)

DEFAULT_DENSITY = 0.25


@dataclass(frozen=True)
class GrassConfig:
    """Settings of Grass (arXiv 2406.17660, Algorithm 1).

    The defaults of `selection`, `side` and `state_policy` are not the paper's, which `preset("paper")` gives; why, says
    docs/concepts.md.

    Args:
        rank: number r of rows (or columns) of every target matrix that are trained at a time. A layer whose
            selected side is smaller is trained in full as an ordinary parameter.
        density: the same as a share of the selected side, in (0, 1]; give `rank` or `density`, not both.
            With neither, 0.25 (the paper's r = d/4).
        rank_pattern: ranks of some layers instead of `rank`, ``{"(q|k|v|o)_proj": 96}``. A key is a regular expression
            for the module's name or the end of it after a dot, and the first that matches counts: PEFT's semantics.
        density_pattern: the same for `density`, ``{".*self_attn.*": 0.5}``.
        update_interval: optimizer steps K between two selections of rows; the paper uses 200.
        select_until: optimizer steps after which no layer selects any more; None selects until the end.
        selection: how rows are chosen from the row norms of the gradient, see `slices.ops.selection`. By default drawn
            without replacement, as likely as their norms are large; "top_r" takes the largest (the paper).
        score_by: what the norms are of. "batch": the gradient of what one backward pass sees, as in the paper.
            "sequence": every sequence's own gradient, and their squares are added up, so that the rows do not depend
            on how a batch is split into micro-batches and ranks (experts score by batch).
        side: "input" selects columns of the weight, "output" rows (the paper), "auto" the longer side, which
            gives the smallest slice for a given `rank` (a square matrix takes "output").
        share_index: with side "input", let layers that read the same input (q, k and v; gate and up) select the same
            columns, by the sum of their scores, and keep them for backward once.
        scale: alpha, the multiplier of the learning rate of the slices.
        scale_warmup: optimizer steps in which `scale` rises linearly from zero: for training from random weights
            (docs/quality.md).
        target_modules: "all-linear" (every linear layer, Conv1D and expert but the output head), "all-matrices"
            (embeddings and output head too), a list of name suffixes, or a regular expression matched against the
            full module name: PEFT's semantics. Of embeddings and output heads feature columns are selected,
            whatever `side` says.
        exclude_modules: suffixes or a regular expression of modules never to compress: PEFT's semantics.
        state_policy: at reselection the optimizer state of rows that stay is kept, and fresh rows start with the second
            moment that the slice and their norms make likely ("carry_seeded") or with zero ("carry"); or all of it is
            dropped ("reset", the paper), or dropped and the slices' learning rate ramped up again ("reset_warmup").
        stagger: number of steps, spread evenly over the interval, on which a part each of the layers selects; 1
            lets all select at once (the paper). A step that observes keeps the whole inputs of its layers.
        decay: "all" lets weight decay reach the rows that are not being trained too (lazily); "active" not.
        slice_dtype: dtype of the slices and so of their gradients and optimizer state; None means float32 over
            half-precision weights, which would lose small updates otherwise, and else the weight's.
        rounding: how a row is rounded to a half-precision weight when it leaves the slice: "stochastic" keeps the
            digits in the mean, "nearest" drops them.
        row_blocks: equal parts of the rows of a weight that each train their share of the slice. 1 chooses among
            all rows; fully sharded training needs a multiple of the number of shards, and takes that number by itself.
        resident: keep the slices in memory between steps. False holds a slice only while it is stepped: it is loaded
            from the weight and released again, which saves r/m of the weights' memory (docs/memory.md). Slices then
            have the weights' dtype.
        weight_dtype: None keeps the weights as they are; "int8" stores the frozen weights of linear layers in eight
            bits, one scale per row (side "output"), and trains their slices in float32: docs/precision.md.
        seed: seed of the random selections.

    Raises:
        ValueError: a field is out of range; the sentence names it, its value and the remedy.
    """

    rank: int | None = None
    density: float | None = None
    # a dict has no hash
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    density_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)
    update_interval: int = 200
    select_until: int | None = None
    selection: str = "multinomial_norm_nr"
    score_by: str = "batch"
    side: str = "input"
    share_index: bool = True
    scale: float = 1.0
    scale_warmup: int = 0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    state_policy: str = "carry_seeded"
    stagger: int = 4
    decay: str = "all"
    slice_dtype: str | None = None
    rounding: str = "stochastic"
    row_blocks: int = 1
    resident: bool = True
    weight_dtype: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, set, tuple)):
                # A set has no order of its own; sorted, two equal configs compare equal.
                object.__setattr__(self, name, tuple(sorted(value, key=str) if isinstance(value, set) else value))
        for name in ("rank_pattern", "density_pattern"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(value) or None)
        for field in dataclasses.fields(self):
            fields.check_type(field.name, getattr(self, field.name), FIELD_TYPES[field.name])
        if self.rank is not None and self.density is not None:
            raise ValueError(
                f"rank={self.rank} and density={self.density} were both given: they set the same thing, keep one."
            )
        if self.rank is None and self.density is None:
            object.__setattr__(self, "density", DEFAULT_DENSITY)
        _check_rank("rank", self.rank)
        _check_density("density", self.density)
        self._check_patterns()
        for name, (least, problem) in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value} is {problem}.")
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} is not a positive number: 1.0 gives the slices the learning rate.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                fields.check_choice(name, getattr(self, name), choices)
        if not self.resident and self.selection in WITH_REPLACEMENT:
            raise ValueError(
                f"resident=False reloads slices from the weights, and selection={self.selection!r} trains multiples of "
                f"them: use resident=True, or {self.selection}_nr."
            )
        if self.weight_dtype == "int8":
            for name, value, needed in _INT8_NEEDS:
                if (set_to := getattr(self, name)) in value:
                    default = ", the default," if set_to == getattr(type(self), name) else ""
                    raise ValueError(
                        f"weight_dtype='int8' keeps one scale per row of a weight, which {name}={set_to!r}{default} "
                        f"does not go with: use {name}={needed!r}."
                    )
        if not self.target_modules:
            raise ValueError('target_modules is empty: give "all-linear", a list of suffixes or a regular expression.')

    def _check_patterns(self) -> None:
        for name, other, check in (("rank", "density", _check_rank), ("density", "rank", _check_density)):
            values = getattr(self, f"{name}_pattern") or {}
            if values and (beside := getattr(self, other)) is not None:
                raise ValueError(
                    f"{name}_pattern was given beside {other}={beside}: give {other}_pattern, or {name} for the rest."
                )
            for key, value in values.items():
                shown = f"{name}_pattern[{key!r}]"
                fields.check_type(shown, value, FIELD_TYPES[name][:1])
                check(shown, value)
                fields.check_expression(f"{name}_pattern", key)

    @property
    def pattern(self) -> dict[str, int] | dict[str, float]:
        """`rank_pattern` or `density_pattern`, whichever was given."""
        return self.rank_pattern or self.density_pattern or {}

    def pattern_key(self, name: str) -> str | None:
        """The key of the pattern that says the rank of the module `name`, or None."""
        return next((key for key in self.pattern if re.match(rf"(.*\.)?({key})$", name)), None)

    def rank_for(self, size: int, name: str = "") -> int:
        """Number of rows to train of a side with `size` rows, of the module `name`; may exceed `size` when `rank`
        does."""
        key = self.pattern_key(name)
        own = None if key is None else self.pattern[key]
        if self.rank is not None:
            return self.rank if own is None else int(own)
        return max(1, round((own or self.density or DEFAULT_DENSITY) * size))

    @property
    def shown_rank(self) -> str:
        """The rank, or the density, as titles say it."""
        shown = f"density {self.density}" if self.rank is None else f"r = {self.rank}"
        return shown + "".join(f", {value} of {key}" for key, value in self.pattern.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that it loads under ``weights_only=True`` and as JSON or YAML."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GrassConfig:
        """Build from a mapping; an unknown key raises a `ValueError` that names the nearest valid one.

        The key ``preset`` names a set of fields ("paper", "default", "pretraining", ...) that the other keys override.
        """
        values = presets.filled(values)
        for key in values:
            if key not in FIELD_TYPES:
                raise ValueError(fields.unknown_key(str(key), [*FIELD_TYPES, "preset"], "a setting of Grass"))
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> GrassConfig:
        """A named set of fields, and others that override it; as the key ``preset`` of `from_dict`."""
        return cls.from_dict({"preset": name, **fields})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> GrassConfig:
        """Build from a YAML file that maps field names to values."""
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                values = yaml.safe_load(file)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): give the path of a YAML file.") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that is none
            raise ValueError(f"{path} is not valid YAML: {error}.") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}: write one 'field: value' per line.")
        return cls.from_dict(values)

    @classmethod
    def from_optim_args(cls, given: str | Mapping[str, Any] | None) -> GrassConfig:
        """Build from the Trainer's ``optim_args``, text or a mapping; `config.optim_args` reads its other parts too."""
        values, _ = written.read(given, FIELD_TYPES, {})
        return cls.from_dict(presets.with_preset(values)[0])


def _check_rank(name: str, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ValueError(
            f"{name}={rank} is not a positive number of rows: give 1 or more, for example a quarter of the hidden "
            "size, or use density=0.25."
        )


def _check_density(name: str, density: float | None) -> None:
    if density is not None and not 0.0 < density <= 1.0:
        raise ValueError(f"{name}={density} is not a share in (0, 1]: 0.25 trains a quarter at a time.")


FIELD_TYPES = fields.kinds_of(GrassConfig)


def parse_field(name: str, text: str, where: str = "optim_args") -> Any:
    """The value of a field of `GrassConfig` that is written as text; `where` is named in errors."""
    return fields.parse(name, text, FIELD_TYPES[name], where)
